"""EngineService over its own wire, with a fake engine behind it: encoding, statuses, cancellation, registration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from mint_api.runtime.v1 import engine_service_pb2 as pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as pb_grpc
from mint_api.runtime.v1 import registry_service_pb2 as registry_pb
from mint_api.runtime.v1 import registry_service_pb2_grpc as registry_grpc
from mint_api.v1 import engine_replica_service_pb2 as replica_pb
from mint_api.v1 import inference_service_pb2 as inference_pb
from mint_core import channel
from mint_core.config import ServiceSettings
from mint_core.errors import (
    AdapterNotResident,
    DeadlineExceeded,
    InvalidArgument,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WrongState,
)
from mint_core.server import Binding, Services, running
from mint_engine.adapter_folder import AdapterFolder
from mint_engine.host import EngineHost
from mint_engine.registration import Registration
from mint_engine.replica import Replica
from mint_engine.service import EngineServicer
from support.engine_contract import until
from support.fake_engine import FakeEngine, FakePrompts

DIGESTS = ["sha256:" + f"{number:064x}" for number in range(5)]
BASE_DIGEST = "sha256:" + "b" * 64
SETTINGS = ServiceSettings(grace_s=0.2)
TOKENS = inference_pb.Prompt(tokens=inference_pb.TokenIds(ids=[5, 6, 7]))


@dataclass
class Wire:
    """A served fake engine and a stub for it."""

    engine: FakeEngine
    host: EngineHost
    stub: pb_grpc.EngineServiceStub
    address: str

    async def generate(self, timeout_s: float = 5, **fields: object) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(**({"tenant": "tenants/a", "prompt": TOKENS} | fields))
        return [item async for item in channel.stream(self.stub.Generate, request, timeout_s=timeout_s)]


@contextlib.asynccontextmanager
async def serve(engine: FakeEngine) -> AsyncIterator[Wire]:
    def check(folder: str, digest: str) -> AdapterFolder:
        if folder == "absent":
            raise NotFound("there is no such folder")
        return AdapterFolder(Path(folder), rank=4, num_tensors=2, size_bytes=10)

    host = EngineHost(engine, FakePrompts(), check, call_timeout_s=5)
    replica = Replica(host, "engineReplicas/e1", "127.0.0.1:1", "baseModels/tiny", BASE_DIGEST, "127.0.0.1:2")
    servicer = EngineServicer(host, replica, max_generate_s=30)
    add = pb_grpc.add_EngineServiceServicer_to_server

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(runtime=[Binding(add, servicer, "mint.runtime.v1.EngineService")])
        await host.close()

    async with (
        running("engine", SETTINGS, build) as addresses,
        channel.connect(addresses.runtime) as connection,
    ):
        yield Wire(engine, host, pb_grpc.EngineServiceStub(connection), addresses.runtime)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with serve(FakeEngine()) as wire:
        yield wire


async def load(wire: Wire, digest: str, folder: str = "x", **options: bool) -> pb.LoadAdapterResponse:
    return await channel.call(
        wire.stub.LoadAdapter, pb.LoadAdapterRequest(digest=digest, folder=folder, **options), timeout_s=5
    )


async def test_stream_begins_with_the_prompt_and_ends_with_the_counts(wire: Wire) -> None:
    sampling = inference_pb.SamplingParams(max_new_tokens=4)
    first, *chunks = await wire.generate(base=True, sampling=sampling, return_logprobs=True)
    assert list(first.started.prompt_token_ids) == [5, 6, 7]
    assert all(item.WhichOneof("content") == "chunk" for item in chunks)
    assert sum(len(item.chunk.token_ids) for item in chunks) == 4
    assert sum(len(item.chunk.logprobs) for item in chunks) == 4
    assert "".join(item.chunk.text for item in chunks)
    last = chunks[-1].chunk
    assert last.finish_reason == inference_pb.FINISH_REASON_LENGTH
    assert (last.num_prompt_tokens, last.num_completion_tokens) == (3, 4)
    assert not any(item.chunk.finish_reason for item in chunks[:-1])


async def test_defaults_of_the_contract(wire: Wire) -> None:
    items = await wire.generate(base=True)
    assert sum(len(item.chunk.token_ids) for item in items[1:]) == 128
    assert not any(item.chunk.logprobs for item in items[1:])


async def test_load_use_tell_and_unload(wire: Wire) -> None:
    response = await load(wire, DIGESTS[0], into_slot=True, pinned=True)
    assert not response.already_resident
    assert response.load_ms > 0
    assert (await load(wire, DIGESTS[0])).already_resident
    await load(wire, DIGESTS[1])
    assert len(await wire.generate(digest=DIGESTS[0])) > 1
    residency = await channel.call(wire.stub.GetResidency, pb.GetResidencyRequest(), timeout_s=5)
    assert [(adapter.digest, adapter.pinned, adapter.rank) for adapter in residency.adapters] == [
        (DIGESTS[0], True, 4),
        (DIGESTS[1], False, 4),
    ]
    assert residency.num_running == 0
    assert residency.engine_replica == replica_pb.EngineReplica(
        name="engineReplicas/e1",
        address="127.0.0.1:1",
        base_model="baseModels/tiny",
        numerics={"base_digest": BASE_DIGEST, "dtype": "float32", "engine_version": "fake 0"},
        max_loaded_adapters=3,
        num_slots=2,
        max_lora_rank=8,
        context_length=510,
        state=replica_pb.ENGINE_REPLICA_STATE_READY,
        loader_address="127.0.0.1:2",
    )
    for _ in range(2):
        await channel.call(wire.stub.UnloadAdapter, pb.UnloadAdapterRequest(digest=DIGESTS[1]), timeout_s=5)
    assert [resident.digest for resident in wire.host.residents()] == [DIGESTS[0]]


async def test_score(wire: Wire) -> None:
    request = pb.ScoreRequest(base=True, tenant="tenants/a", prompt=TOKENS)
    response = await channel.call(wire.stub.Score, request, timeout_s=5)
    assert list(response.token_ids) == [5, 6, 7]
    assert len(response.logprobs) == 2


async def test_flush(wire: Wire) -> None:
    await channel.call(wire.stub.FlushPrefixCache, pb.FlushPrefixCacheRequest(), timeout_s=5)


async def test_errors_arrive_as_documented(wire: Wire) -> None:
    with pytest.raises(AdapterNotResident) as raised:
        await wire.generate(digest=DIGESTS[0])
    assert raised.value.metadata["digest"] == DIGESTS[0]
    for fields, name in (
        ({}, "digest"),
        ({"digest": DIGESTS[0], "base": True}, "base"),
        ({"base": True, "tenant": ""}, "tenant"),
        ({"base": True, "tenant": "a"}, "tenant"),
        ({"base": True, "prompt": inference_pb.Prompt()}, "prompt"),
        ({"base": True, "sampling": inference_pb.SamplingParams(max_new_tokens=-1)}, "sampling.max_new_tokens"),
        ({"base": True, "return_routed_experts": True}, "return_routed_experts"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await wire.generate(**fields)
        assert refused.value.field == name
    with pytest.raises(NotFound):
        await load(wire, DIGESTS[0], "absent")
    for digest in DIGESTS[:3]:
        await load(wire, digest, pinned=True)
    with pytest.raises(ResourceExhausted) as full:
        await load(wire, DIGESTS[3])
    assert full.value.retry_after_s
    assert len(await wire.generate(base=True)) > 1


async def test_cancelled_call_aborts_in_the_engine(wire: Wire) -> None:
    await load(wire, DIGESTS[0])
    request = pb.GenerateRequest(
        digest=DIGESTS[0],
        tenant="tenants/a",
        prompt=TOKENS,
        sampling=inference_pb.SamplingParams(max_new_tokens=500),
    )
    call = wire.stub.Generate(request, timeout=30)
    async for _ in call:
        break
    call.cancel()
    await until(lambda: not (wire.engine.num_running or wire.host.num_running))
    assert wire.engine.num_aborted == 1
    assert wire.host.residents()[0].num_references == 0


async def test_drain_finishes_what_runs_and_takes_nothing_new_until_it_is_undone(wire: Wire) -> None:
    sampling = inference_pb.SamplingParams(max_new_tokens=6)
    wire.engine.token_gate.clear()
    running_stream = asyncio.create_task(wire.generate(base=True, sampling=sampling))
    await until(lambda: wire.engine.num_running == 1)
    for _ in range(2):
        drained = await channel.call(wire.stub.Drain, pb.DrainRequest(), timeout_s=5)
        assert drained.engine_replica.state == replica_pb.ENGINE_REPLICA_STATE_DRAINING
        assert drained.num_running == 1
    for refused in (wire.generate(base=True), load(wire, DIGESTS[0])):
        with pytest.raises(Unavailable, match="is draining and takes nothing new"):
            await refused
    wire.engine.token_gate.set()
    first, *chunks = await running_stream
    assert first.started.num_running == 1
    assert sum(len(item.chunk.token_ids) for item in chunks) == 6
    undrained = await channel.call(wire.stub.Undrain, pb.UndrainRequest(), timeout_s=5)
    assert undrained.engine_replica.state == replica_pb.ENGINE_REPLICA_STATE_READY
    await wire.generate(base=True, sampling=sampling)


async def test_a_process_that_stops_is_not_taken_back(wire: Wire) -> None:
    wire.host.begin_stop()
    with pytest.raises(WrongState, match="is stopping"):
        await channel.call(wire.stub.Undrain, pb.UndrainRequest(), timeout_s=5)
    with pytest.raises(Unavailable, match="is draining"):
        await wire.generate(base=True)


async def test_deadline_of_the_call_ends_the_stream(wire: Wire) -> None:
    wire.engine.token_gate.clear()
    with pytest.raises(DeadlineExceeded):
        await wire.generate(timeout_s=0.2, base=True)
    await until(lambda: not (wire.host.num_running))


@dataclass
class Registry(registry_grpc.RegistryServiceServicer):
    """A catalog's registry that remembers what it was told."""

    registered: list[registry_pb.RegisterEngineReplicaRequest] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    deregistered: list[int] = field(default_factory=list)
    away: bool = False
    forgetful: bool = False

    async def RegisterEngineReplica(
        self, request: registry_pb.RegisterEngineReplicaRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb.RegisterEngineReplicaResponse:
        if self.away:
            raise Unavailable("etcd is away")
        self.registered.append(request)
        return registry_pb.RegisterEngineReplicaResponse(registration_token=len(self.registered))

    async def RenewEngineReplica(
        self, request: registry_pb.RenewEngineReplicaRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb.RenewEngineReplicaResponse:
        if self.forgetful:
            self.forgetful = False
            raise LeaseLost("the lease ended")
        assert request.registration_token == len(self.registered)
        self.states.append(request.state)
        return registry_pb.RenewEngineReplicaResponse()

    async def DeregisterEngineReplica(
        self, request: registry_pb.DeregisterEngineReplicaRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb.DeregisterEngineReplicaResponse:
        self.deregistered.append(request.registration_token)
        return registry_pb.DeregisterEngineReplicaResponse()


async def test_replica_stays_registered_and_says_goodbye(wire: Wire) -> None:
    registry = Registry(away=True)
    add = registry_grpc.add_RegistryServiceServicer_to_server

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(runtime=[Binding(add, registry, "mint.runtime.v1.RegistryService")])

    async with (
        running("catalog", SETTINGS, build) as addresses,
        channel.connect(addresses.runtime, retry=False) as catalog,
    ):
        replica = Replica(wire.host, "engineReplicas/e1", wire.address, "baseModels/tiny", BASE_DIGEST, "")
        registration = Registration(catalog, replica, ttl_s=1.0)
        task = asyncio.create_task(registration.run())
        await asyncio.sleep(0.7)
        assert not registration.is_registered
        registry.away = False
        await until(lambda: registration.is_registered and registry.states)
        first = registry.registered[0]
        assert (first.engine_replica.address, first.ttl.ToMilliseconds()) == (wire.address, 1000)
        registry.forgetful = True
        await until(lambda: len(registry.registered) == 2)
        assert registry.registered[1].holder == first.holder
        wire.host.begin_drain()
        await until(lambda: replica_pb.ENGINE_REPLICA_STATE_DRAINING in registry.states)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert registry.deregistered == [2]
        assert not registration.is_registered
