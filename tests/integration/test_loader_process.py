"""The loader's process between a real object store and the engine's servicer: killed at every step, fed bad bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from mint_api.runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as pb_grpc
from mint_api.v1 import common_pb2
from mint_blobs import blob_key
from mint_blobs.s3 import S3ObjectStore
from mint_core.base_model import digest_of_folder
from mint_core.channel import call, connect
from mint_core.config import ServiceSettings
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.server import Binding, Services, running
from mint_engine.adapter_folder import AdapterRules
from mint_engine.base_geometry import BaseGeometry
from mint_engine.host import EngineHost, adapter_checker
from mint_engine.replica import Replica
from mint_engine.service import EngineServicer
from support.fake_engine import FakeEngine, FakePrompts
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.tiny_models import make_tiny_llama
from support.weed import WeedServer, running_weed

SERVICE = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]


class EngineEndpointSettings(ServiceSettings):
    section = "engine"


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@dataclass(frozen=True)
class Materials:
    base: Path
    base_digest: str
    adapters: list[ServingAdapter]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    base = make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama")
    work = tmp_path_factory.mktemp("adapters")
    adapters = [make_serving_adapter(base, work / "folders", work / "blobs", seed=seed) for seed in range(4)]
    return Materials(base, digest_of_folder(base, use_cache=False).digest, adapters)


@dataclass
class Node:
    """One node: a loader in its own process beside an engine endpoint in this one."""

    folder: Path
    weed: WeedServer
    store: S3ObjectStore
    engine: FakeEngine
    engine_address: str
    materials: Materials
    replica: Replica
    process: asyncio.subprocess.Process | None = None
    stub: pb_grpc.LoaderServiceStub | None = None
    channel: grpc.aio.Channel | None = None

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def socket(self) -> str:
        return f"unix:{self.folder / 'loader.sock'}"

    async def start(self, *, failpoints: str = "", **changes: object) -> None:
        store = self.weed.settings()
        environ = {
            "MINT_LOADER_OBJECT_STORE__ENDPOINT_URL": store.endpoint_url,
            "MINT_LOADER_OBJECT_STORE__ACCESS_KEY_ID": store.access_key_id,
            "MINT_LOADER_OBJECT_STORE__SECRET_ACCESS_KEY": store.secret_access_key.get_secret_value(),
            "MINT_LOADER_OBJECT_STORE__READ_TIMEOUT_S": "2",
            "MINT_LOADER_OBJECT_STORE__MAX_ATTEMPTS": "2",
            "MINT_LOADER_OBJECT_STORE__TRANSFER_TIMEOUT_S": "5",
            "MINT_LOADER_ENGINE_ADDRESS": self.engine_address,
            "MINT_LOADER_CACHE_DIR": str(self.cache),
            "MINT_LOADER_RUNTIME_LISTEN": self.socket,
            "MINT_FAILPOINTS": failpoints,
        } | {f"MINT_LOADER_{key.upper()}": str(value) for key, value in changes.items()}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mint_loader", env=os.environ | environ, stderr=asyncio.subprocess.PIPE
        )
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if json.loads(line).get("message") == "serving":
                break
        else:
            raise AssertionError("the loader did not start")
        self.channel = connect(self.socket, retry=False)
        self.stub = pb_grpc.LoaderServiceStub(self.channel)

    async def died(self) -> int:
        assert self.process is not None
        assert self.channel is not None
        await self.channel.close()
        await asyncio.wait_for(self.process.communicate(), 20)
        code = self.process.returncode
        self.process = None
        assert code is not None
        return code

    async def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await self.died()

    async def adapter(self, number: int, *, tenant: str = "acme") -> pb.AdapterRef:
        """Put one adapter into the store; what a loader is told of it."""
        made = self.materials.adapters[number]
        key = blob_key(tenant, made.digest, "stage-1")
        await self.store.put_file(key, made.blob, digest=made.digest)
        return self.ref(made.digest, made.blob.stat().st_size, key, tenant)

    def ref(self, digest: str, size_bytes: int, key: str, tenant: str = "acme") -> pb.AdapterRef:
        return pb.AdapterRef(
            tenant=f"tenants/{tenant}",
            blob=common_pb2.BlobRef(digest=digest, size_bytes=size_bytes),
            object_key=key,
            base_digest=self.materials.base_digest,
        )

    async def ensure(
        self, ref: pb.AdapterRef, tier: pb.Tier.ValueType = pb.TIER_HOST, timeout_s: float = 20
    ) -> pb.EnsureLoadedResponse:
        assert self.stub is not None
        request = pb.EnsureLoadedRequest(adapter=ref, tier=tier)
        response: pb.EnsureLoadedResponse = await call(self.stub.EnsureLoaded, request, timeout_s=timeout_s)
        return response

    async def status(self) -> pb.GetLoaderStatusResponse:
        assert self.stub is not None
        response: pb.GetLoaderStatusResponse = await call(self.stub.GetLoaderStatus, pb.GetLoaderStatusRequest())
        return response

    def names(self) -> list[str]:
        """Entries and leftovers in the cache folder."""
        hidden = [*self.cache.glob(".incoming/*"), *self.cache.glob(".trash/*")]
        return sorted(path.name for path in [*self.cache.glob("[0-9a-f]*"), *hidden])


@pytest.fixture
async def node(tmp_path: Path, weed: WeedServer, materials: Materials) -> AsyncIterator[Node]:
    engine = FakeEngine()
    rules = AdapterRules(
        base_digest=materials.base_digest,
        geometry=BaseGeometry.from_folder(materials.base),
        max_lora_rank=8,
        target_modules=engine.limits.target_modules,
    )
    host = EngineHost(engine, FakePrompts(), adapter_checker(tmp_path / "cache", rules), call_timeout_s=10)
    replica = Replica(host, "engineReplicas/one", "unix:engine", "baseModels/tiny", materials.base_digest, "")
    binding = Binding(
        engine_service_pb2_grpc.add_EngineServiceServicer_to_server,
        EngineServicer(host, replica, max_generate_s=60),
        SERVICE.full_name,
    )

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(runtime=[binding])

    endpoint = EngineEndpointSettings(runtime_listen=f"unix:{tmp_path / 'engine.sock'}", grace_s=0.1)
    async with running("engine", endpoint, build) as addresses, S3ObjectStore(weed.settings()) as store:
        await store.ensure_bucket()
        node = Node(tmp_path, weed, store, engine, addresses.runtime, materials, replica)
        try:
            yield node
        finally:
            if node.process is not None:
                await node.stop(signal.SIGKILL)
            await host.close()


async def test_store_to_disk_to_engine_and_once_for_500(node: Node) -> None:
    await node.start()
    ref = await node.adapter(0)
    answers = await asyncio.gather(*(node.ensure(ref) for _ in range(500)))
    # Those who arrived after the load was done found it in the engine; which of the 500 arrives
    # first is the scheduler's choice, so the one that came before the load may be any of them.
    found = {answer.found_at for answer in answers}
    assert pb.TIER_STORE in found
    assert found <= {pb.TIER_STORE, pb.TIER_HOST}
    assert node.engine.calls == [f"load {ref.blob.digest}"]
    status = await node.status()
    assert (status.num_misses, status.num_cached, status.bytes_fetched) == (1, 1, ref.blob.size_bytes)
    assert (await node.ensure(ref)).found_at == pb.TIER_HOST
    assert await node.stop() == 0


async def test_what_a_promotion_waits_for_is_loaded_unasked(node: Node) -> None:
    await node.start(wish_poll_s=0.1)
    ref = await node.adapter(0)
    nonsense = pb.AdapterRef(tenant="tenants/acme", object_key="elsewhere")
    node.replica.to_load[:] = [nonsense, ref]  # as the registration does when the catalog says so
    async with asyncio.timeout(20):
        while not node.replica.host.residents():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert [each.digest for each in node.replica.host.residents()] == [ref.blob.digest]
    assert node.engine.calls == [f"load {ref.blob.digest}"]


async def test_what_is_on_disk_survives_a_restart_and_needs_no_store(node: Node) -> None:
    await node.start()
    ref = await node.adapter(0)
    await node.ensure(ref, pb.TIER_DISK)
    await node.stop(signal.SIGKILL)
    await node.store.delete(ref.object_key)
    await node.start()
    assert (await node.ensure(ref)).found_at == pb.TIER_DISK


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
async def test_one_flipped_bit_on_disk_is_found_after_a_restart_and_fetched_again(node: Node, file: str) -> None:
    await node.start()
    ref = await node.adapter(0)
    await node.ensure(ref, pb.TIER_DISK)
    await node.stop()
    path = node.cache / ref.blob.digest.removeprefix("sha256:") / file
    data = bytearray(path.read_bytes())
    at = data.index(b'"r": 4') + 5 if file.endswith(".json") else len(data) - 7
    data[at] ^= 1
    path.write_bytes(data)
    await node.start()
    assert (await node.ensure(ref)).found_at == pb.TIER_STORE
    assert (await node.status()).num_misses == 1


@pytest.mark.parametrize(
    "point", ["loader.fetched", "loader.sealed", "loader.published", "loader.loading", "loader.loaded"]
)
async def test_killed_at_every_step_it_leaves_all_or_nothing(node: Node, point: str) -> None:
    await node.start(failpoints=f"{point}=kill")
    ref = await node.adapter(1)
    with pytest.raises(Unavailable):
        await node.ensure(ref)
    assert await node.died() == -signal.SIGKILL
    await node.start()
    name = ref.blob.digest.removeprefix("sha256:")
    is_published = point not in ("loader.fetched", "loader.sealed")
    assert node.names() == ([name] if is_published else [])
    await node.ensure(ref)
    assert node.names() == [name]
    assert set(node.engine.loaded) == {ref.blob.digest}


async def test_a_cache_for_two_holds_two(node: Node) -> None:
    refs = [await node.adapter(number) for number in range(4)]
    await node.start(max_cache_bytes=int(2.9 * refs[0].blob.size_bytes))
    for ref in (*refs, *reversed(refs)):
        await node.ensure(ref, pb.TIER_DISK)
    status = await node.status()
    assert status.cache_bytes <= status.max_cache_bytes
    assert (status.num_cached, status.num_evictions) == (2, 4)
    await node.stop(signal.SIGKILL)
    await node.start(max_cache_bytes=int(1.9 * refs[0].blob.size_bytes))
    assert (await node.status()).num_cached == 1


async def test_killed_while_it_evicts_it_sweeps_at_the_next_start(node: Node) -> None:
    refs = [await node.adapter(number) for number in range(2)]
    await node.start(max_cache_bytes=int(1.9 * refs[0].blob.size_bytes), failpoints="loader.evicting=kill")
    await node.ensure(refs[0], pb.TIER_DISK)
    with pytest.raises(Unavailable):
        await node.ensure(refs[1], pb.TIER_DISK)
    await node.died()
    assert len(node.names()) >= 1
    await node.start()
    assert node.names() == []


async def test_bad_references_and_bad_blobs_have_their_own_errors(node: Node, materials: Materials) -> None:
    await node.start(max_cache_bytes=10_000_000)
    good = await node.adapter(0)
    pickle = b"\x80\x04\x95" + b"x" * 100
    pickled = node.folder / "pickle"
    pickled.write_bytes(pickle)
    from mint_blobs import digest_file

    pickle_digest = await digest_file(pickled)
    pickle_key = blob_key("acme", pickle_digest, "stage-1")
    await node.store.put_file(pickle_key, pickled, digest=pickle_digest)
    torn = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "torn"))
    await node.store.put_bytes(torn.object_key, materials.adapters[0].blob.read_bytes()[:-100])
    flipped = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "flipped"))
    data = bytearray(materials.adapters[0].blob.read_bytes())
    data[-1] ^= 1
    await node.store.put_bytes(flipped.object_key, bytes(data))
    foreign = node.ref(good.blob.digest, good.blob.size_bytes, good.object_key)
    foreign.base_digest = f"sha256:{'0' * 64}"
    absent = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "absent"))
    theirs = node.ref(good.blob.digest, good.blob.size_bytes, good.object_key, tenant="evil")
    huge = node.ref(good.blob.digest, 10**12, good.object_key)
    cases: list[tuple[pb.AdapterRef, type[MintError]]] = [
        (pb.AdapterRef(), InvalidArgument),
        (theirs, InvalidArgument),
        (absent, NotFound),
        (torn, BlobCorrupt),
        (flipped, BlobCorrupt),
        (node.ref(pickle_digest, len(pickle), pickle_key), InvalidArgument),
        (foreign, BaseModelMismatch),
        (huge, ResourceExhausted),
    ]
    for ref, expected in cases:
        with pytest.raises(MintError) as caught:
            await node.ensure(ref)
        assert type(caught.value) is expected, caught.value
        assert node.names() == []
    assert (await node.ensure(good)).found_at == pb.TIER_STORE


async def test_a_store_that_is_away_or_stands_still_is_unavailable_in_time_and_heals(node: Node) -> None:
    await node.start()
    refs = [await node.adapter(number) for number in range(2)]
    node.weed.pause()
    try:
        async with asyncio.timeout(15):
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await node.ensure(refs[0], timeout_s=10)
    finally:
        node.weed.resume()
    assert (await node.ensure(refs[1])).found_at == pb.TIER_STORE
    assert (await node.ensure(refs[0])).found_at == pb.TIER_STORE
    assert len(node.names()) == 2


async def test_an_engine_that_is_away_is_unavailable(node: Node) -> None:
    ref = await node.adapter(0)
    await node.start(engine_address=f"unix:{node.folder / 'nobody.sock'}")
    with pytest.raises(Unavailable):
        await node.ensure(ref)
    assert (await node.ensure(ref, pb.TIER_DISK)).found_at == pb.TIER_STORE


async def test_tickets_over_the_wire(node: Node) -> None:
    await node.start()
    assert node.stub is not None
    refs = [await node.adapter(number) for number in range(3)]
    response = await call(node.stub.Prefetch, pb.PrefetchRequest(adapters=refs))
    assert [ticket.adapter.blob.digest for ticket in response.load_tickets] == [ref.blob.digest for ref in refs]
    for ticket in response.load_tickets:
        async with asyncio.timeout(20):
            while ticket.state not in (pb.LOAD_TICKET_STATE_DONE, pb.LOAD_TICKET_STATE_FAILED):
                got = await call(node.stub.GetLoadTicket, pb.GetLoadTicketRequest(name=ticket.name))
                ticket = got.load_ticket
                await asyncio.sleep(0.02)
        assert (ticket.state, ticket.error) == (pb.LOAD_TICKET_STATE_DONE, "")
        cancelled = await call(node.stub.CancelLoadTicket, pb.CancelLoadTicketRequest(name=ticket.name))
        assert cancelled.load_ticket.state == pb.LOAD_TICKET_STATE_DONE
    assert len(node.names()) == 3
    assert node.engine.loaded == {}
    with pytest.raises(NotFound):
        await call(node.stub.GetLoadTicket, pb.GetLoadTicketRequest(name="loadTickets/nobody"))


async def test_a_second_loader_on_one_folder_is_refused_with_one_sentence(node: Node) -> None:
    await node.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mint_loader",
        f"--engine-address={node.engine_address}",
        f"--cache-dir={node.cache}",
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert b"in use by another loader" in said.splitlines()[-1]


async def test_a_full_disk_is_told_and_costs_nothing_later(node: Node) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    node.cache.mkdir()
    mounting = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", node.cache)
    if await mounting.wait() != 0:
        pytest.skip("this machine may not mount a tmpfs")
    try:
        await node.start()
        ref = await node.adapter(0)
        assert ref.blob.size_bytes > 20 * 1024
        with pytest.raises(ResourceExhausted, match="make room on that disk"):
            await node.ensure(ref)
        assert node.names() == []
        remounting = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=16m", node.cache)
        assert await remounting.wait() == 0
        assert (await node.ensure(ref)).found_at == pb.TIER_STORE
        await node.stop()
    finally:
        unmounting = await asyncio.create_subprocess_exec("umount", "-l", node.cache)
        await unmounting.wait()
        shutil.rmtree(node.cache, ignore_errors=True)
