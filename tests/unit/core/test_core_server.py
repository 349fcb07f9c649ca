"""The server's manners: statuses, details, deadlines, health and drain, over a real loopback connection."""

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from mint_api.v1 import base_model_service_pb2 as pb
from mint_api.v1 import base_model_service_pb2_grpc as rpc
from mint_core import calls, errors
from mint_core.channel import call, connect
from mint_core.config import ServiceSettings, load
from mint_core.server import Addresses, Binding, Services, running


class Settings(ServiceSettings):
    """Settings of the service under test."""

    section = "example"


class Servicer(rpc.BaseModelServiceServicer):
    raised: BaseException | None = None
    remaining_s: float | None = None

    async def GetBaseModel(
        self, request: pb.GetBaseModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetBaseModelResponse:
        self.remaining_s = calls.remaining_s()
        if self.raised:
            raise self.raised
        return pb.GetBaseModelResponse(base_model=pb.BaseModel(name=f"{request.name} for {calls.principal()}"))


@contextlib.asynccontextmanager
async def served(servicer: Servicer, listen: str = "127.0.0.1:0") -> AsyncIterator[Addresses]:
    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(
            public=[Binding(rpc.add_BaseModelServiceServicer_to_server, servicer, "mint.v1.BaseModelService")]
        )

    async with running("example", load(Settings, ["--listen", listen], {}), build) as addresses:
        yield addresses


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (errors.InvalidArgument("name is 'x'", field="name"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (errors.EtagMismatch("changed"), grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
        (errors.LeaseLost("lost"), grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST"),
        (errors.BlobCorrupt("bad"), grpc.StatusCode.DATA_LOSS, "BLOB_CORRUPT"),
        (errors.ResourceExhausted("full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED"),
    ],
)
async def test_an_error_arrives_as_it_was_raised(raised: errors.MintError, code: grpc.StatusCode, reason: str) -> None:
    servicer = Servicer()
    servicer.raised = raised
    async with served(servicer) as addresses, connect(addresses.public) as channel:
        stub = rpc.BaseModelServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetBaseModel(pb.GetBaseModelRequest())
        assert caught.value.code() is code
        details = [MessageToDict(d) for d in rpc_status.from_call(caught.value).details]
        assert details[0]["reason"] == reason
        assert details[0]["domain"] == "mint"
        with pytest.raises(type(raised)) as decoded:
            await call(stub.GetBaseModel, pb.GetBaseModelRequest())
        assert (decoded.value.message, decoded.value.retry_after_s) == (raised.message, raised.retry_after_s)


async def test_a_bug_shows_the_client_an_error_id_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    servicer = Servicer()
    servicer.raised = RuntimeError("secret inside")
    async with served(servicer) as addresses, connect(addresses.public) as channel:
        with pytest.raises(errors.Internal) as caught:
            await call(rpc.BaseModelServiceStub(channel).GetBaseModel, pb.GetBaseModelRequest())
    assert "secret" not in caught.value.message
    assert caught.value.metadata["error_id"] in caught.value.message


async def test_a_method_that_is_not_overridden_is_unimplemented() -> None:
    async with served(Servicer()) as addresses, connect(addresses.public) as channel:
        with pytest.raises(errors.Unimplemented, match="ListBaseModels"):
            await call(rpc.BaseModelServiceStub(channel).ListBaseModels, pb.ListBaseModelsRequest())


async def test_deadline_and_principal_reach_the_domain() -> None:
    servicer = Servicer()
    async with served(servicer) as addresses, connect(addresses.public) as channel:
        stub = rpc.BaseModelServiceStub(channel)
        with calls.inbound_call("alice", 3.0):
            answer = await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="m"), timeout_s=60)
        assert answer.base_model.name == "m for alice"
        assert servicer.remaining_s is not None
        assert 0 < servicer.remaining_s < 4.0  # clocks of both ends are converted on the way; 60 was asked for
        with calls.inbound_call("alice", 0.0), pytest.raises(errors.DeadlineExceeded):
            await call(stub.GetBaseModel, pb.GetBaseModelRequest())


async def test_health_says_serving() -> None:
    async with served(Servicer()) as addresses, connect(addresses.public) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "mint.v1.BaseModelService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_oversize_message_is_refused_and_a_good_one_still_works() -> None:
    async with (
        served(Servicer()) as addresses,
        connect(addresses.public, max_message_bytes=64 * 1024 * 1024) as channel,
    ):
        stub = rpc.BaseModelServiceStub(channel)
        with pytest.raises(errors.ResourceExhausted):
            await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="x" * 9 * 1024 * 1024))
        assert (await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="m"))).base_model.name == "m for anonymous"


async def test_a_server_that_is_back_is_reached_by_the_first_call() -> None:
    async with served(Servicer()) as addresses:
        address = addresses.public
    async with connect(address) as channel:
        stub = rpc.BaseModelServiceStub(channel)
        for _ in range(4):  # gRPC waits longer before each attempt to connect: here to the longest wait
            with pytest.raises(errors.Unavailable):
                await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="m"))
        async with served(Servicer(), address):
            assert (await call(stub.GetBaseModel, pb.GetBaseModelRequest(name="m"))).base_model.name
