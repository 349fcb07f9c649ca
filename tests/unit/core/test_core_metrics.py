"""The endpoint for Prometheus, scraped over a real loopback connection."""

import asyncio
import contextlib
import urllib.error
from collections.abc import AsyncIterator, Iterable

import grpc
import pytest

from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import alias_service_pb2_grpc as alias_rpc
from mint_api.v1 import base_model_service_pb2 as pb
from mint_api.v1 import base_model_service_pb2_grpc as rpc
from mint_core import errors, metrics
from mint_core.channel import call, connect
from mint_core.config import ServiceSettings, load
from mint_core.metrics import Figure, counter, gauge
from mint_core.server import Addresses, Binding, Services, running
from support.prometheus import handled, scraped


class Settings(ServiceSettings):
    """Settings of the service under test."""

    section = "example"


class BaseModels(rpc.BaseModelServiceServicer):
    async def GetBaseModel(
        self, request: pb.GetBaseModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetBaseModelResponse:
        if request.name == "slow":
            await asyncio.sleep(60)
        if request.name:
            raise errors.NotFound(f"{request.name} is not there")
        return pb.GetBaseModelResponse()


class Aliases(alias_rpc.AliasServiceServicer):
    async def WatchAliases(
        self, request: alias_pb.WatchAliasesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[alias_pb.WatchAliasesResponse]:
        yield alias_pb.WatchAliasesResponse()
        yield alias_pb.WatchAliasesResponse()
        if request.parent:
            raise errors.Unavailable("gone in mid-stream")


@contextlib.asynccontextmanager
async def served(figures: metrics.Figures | None = None, listen: str = "127.0.0.1:0") -> AsyncIterator[Addresses]:
    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(
            public=[
                Binding(rpc.add_BaseModelServiceServicer_to_server, BaseModels(), "mint.v1.BaseModelService"),
                Binding(alias_rpc.add_AliasServiceServicer_to_server, Aliases(), "mint.v1.AliasService"),
            ],
            figures=figures,
        )

    settings = load(Settings, ["--listen", "127.0.0.1:0", "--telemetry.metrics-listen", listen], {})
    async with running("example", settings, build) as addresses:
        yield addresses


async def test_calls_are_counted_by_how_they_ended() -> None:
    async with served() as addresses, connect(addresses.public) as channel:
        stub = rpc.BaseModelServiceStub(channel)
        for _ in range(3):
            await call(stub.GetBaseModel, pb.GetBaseModelRequest())
        with pytest.raises(errors.NotFound):
            await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="m"))
        with pytest.raises(errors.Unimplemented):
            await call(stub.ListBaseModels, pb.ListBaseModelsRequest())
        with pytest.raises(errors.DeadlineExceeded):
            await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="slow"), timeout_s=0.1)
        samples = await scraped(addresses.metrics)
        while "CANCELLED" not in handled(samples, "GetBaseModel"):  # the server hears of it a moment later
            samples = await scraped(addresses.metrics)
        assert handled(samples, "GetBaseModel") == {"OK": 3, "NOT_FOUND": 1, "CANCELLED": 1}
        assert handled(samples, "ListBaseModels") == {"UNIMPLEMENTED": 1}
        labels = {"grpc_type": "unary", "grpc_service": "mint.v1.BaseModelService", "grpc_method": "GetBaseModel"}
        assert samples.of("grpc_server_handling_seconds_count", **labels) == 5
        assert 0 < samples.of("grpc_server_handling_seconds_sum", **labels) < 60
        assert samples.of("process_resident_memory_bytes") > 1e6


async def test_streams_are_counted_when_they_end() -> None:
    async with served() as addresses, connect(addresses.public) as channel:
        stub = alias_rpc.AliasServiceStub(channel)
        assert len([each async for each in stub.WatchAliases(alias_pb.WatchAliasesRequest())]) == 2
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [each async for each in stub.WatchAliases(alias_pb.WatchAliasesRequest(parent="x"))]
        assert handled(await scraped(addresses.metrics), "WatchAliases") == {"OK": 1, "UNAVAILABLE": 1}


async def test_what_a_caller_makes_up_becomes_no_label() -> None:
    async with served() as addresses, connect(addresses.public) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/mint.v1.BaseModelService/Invented")(b"")
        assert handled(await scraped(addresses.metrics), "Invented") == {}


async def test_a_services_figures_are_read_at_each_scrape_on_its_loop() -> None:
    loop, num_read = asyncio.get_running_loop(), 0

    async def figures() -> Iterable[Figure]:
        nonlocal num_read
        assert asyncio.get_running_loop() is loop
        num_read += 1
        return [
            gauge("mint_example_adapters", "Adapters.", 7, tier="disk"),
            counter("mint_example_reads", "Scrapes.", num_read),
            gauge("mint_example_adapters", "Adapters.", 2, tier='"host"\n'),
        ]

    async with served(figures) as addresses:
        assert num_read == 0
        await scraped(addresses.metrics)
        samples = await scraped(addresses.metrics)
    assert samples.of("mint_example_adapters", tier="disk") == 7
    assert samples.of("mint_example_adapters", tier='"host"\n') == 2
    assert samples.of("mint_example_reads_total") == 2


async def test_a_scrape_without_the_figures_fails_as_a_whole_and_the_service_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_READ_TIMEOUT_S", 0.1)
    stuck = True

    async def figures() -> Iterable[Figure]:
        if stuck:
            await asyncio.sleep(60)
        return []

    async with served(figures) as addresses, connect(addresses.public) as channel:
        with pytest.raises(urllib.error.HTTPError) as caught:
            await scraped(addresses.metrics)
        assert caught.value.code == 500
        assert "Traceback" not in caught.value.read().decode()
        caught.value.close()
        await call(rpc.BaseModelServiceStub(channel).GetBaseModel, pb.GetBaseModelRequest())
        stuck = False
        assert handled(await scraped(addresses.metrics), "GetBaseModel") == {"OK": 1}


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":9464", "unix:/tmp/m"])
async def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"telemetry\.metrics_listen is .*expected host:port"):
        async with served(listen=address):
            pass


async def test_an_address_that_is_taken_is_named() -> None:
    async with served() as addresses:
        with pytest.raises(errors.FailedPrecondition, match=f"{addresses.metrics}.*in use.*choose a free address"):
            async with served(listen=addresses.metrics):
                pass


async def test_without_the_switch_there_is_no_endpoint() -> None:
    async with served(listen="") as addresses, connect(addresses.public) as channel:
        assert addresses.metrics == ""
        await call(rpc.BaseModelServiceStub(channel).GetBaseModel, pb.GetBaseModelRequest())
