"""Store → disk → engine: shared, bounded, and right about what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    DigestMismatch,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import AliasName, LoadTicketName, RevisionName
from mint_loader.cache import DiskCache
from mint_loader.loading import Limits, Loading
from mint_loader.model import AdapterRef, EngineLoad, Resident, Tier
from mint_loader.prefetch import AliasMove, Prefetcher, Target
from mint_loader.tickets import Tickets, TicketState

BASE = f"sha256:{'b' * 64}"
OTHER_BASE = f"sha256:{'c' * 64}"


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.002)


class FakeEngine:
    """Keeps what it loads; refuses a folder whose weights are not the digest."""

    def __init__(self, cache_folder: Path) -> None:
        self.cache_folder = cache_folder
        self.digests: set[str] = set()
        self.num_loads = 0
        self.order: list[str] = []
        self.error: MintError | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.base_digest = BASE

    async def load(self, digest: str, folder: str, *, into_slot: bool, timeout_s: float) -> EngineLoad:
        self.num_loads += 1
        self.order.append(digest)
        try:
            async with asyncio.timeout(timeout_s):
                await self.go.wait()
        except TimeoutError:
            raise DeadlineExceeded("engine") from None
        if self.error is not None:
            raise self.error
        weights = (self.cache_folder / folder / "adapter_model.safetensors").read_bytes()
        if f"sha256:{hashlib.sha256(weights).hexdigest()}" != digest:
            raise DigestMismatch("other bytes", field="digest")
        was_resident = digest in self.digests
        self.digests.add(digest)
        return EngineLoad(was_resident, 1.0)

    async def resident(self, *, timeout_s: float) -> Resident:
        if isinstance(self.error, Unavailable):
            raise self.error
        return Resident(self.base_digest, frozenset(self.digests))


class SlowStore(MemoryObjectStore):
    """Counts reads, and lets them wait."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.num_running = 0
        self.peak = 0
        self.order: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: MintError | None = None

    async def get_file(self, key: str, path: Path, *, digest: str, size_bytes: int | None = None) -> None:
        self.num_reads += 1
        self.order.append(digest)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            await super().get_file(key, path, digest=digest, size_bytes=size_bytes)
        finally:
            self.num_running -= 1

    def flip(self, key: str) -> None:
        stored = self._objects[key]
        self._objects[key] = type(stored)(bytes([stored.data[0] ^ 1]) + stored.data[1:], stored.info)


def write_folder(blob: Path, folder: Path, *, base_digest: str) -> None:
    if blob.read_bytes().startswith(b"pickle"):
        raise InvalidArgument("not an adapter", field="weights")
    if base_digest != BASE:
        raise BaseModelMismatch("another base")
    folder.mkdir()
    shutil.copy(blob, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(b"{}")


def verify(folder: Path, digest: str) -> bool:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return f"sha256:{hashlib.sha256(weights).hexdigest()}" == digest


@dataclass
class Node:
    """One node's loader with its surroundings."""

    cache: DiskCache
    store: SlowStore
    engine: FakeEngine
    loading: Loading
    refs: list[AdapterRef] = field(default_factory=list)

    async def adapter(self, data: bytes, *, tenant: str = "acme", base_digest: str = BASE) -> AdapterRef:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        key = f"tenants/{tenant}/blobs/{digest.removeprefix('sha256:')}/stage-1"
        await self.store.put_bytes(key, data)
        return AdapterRef.checked(
            tenant=f"tenants/{tenant}", digest=digest, size_bytes=len(data), object_key=key, base_digest=base_digest
        )

    def ensure(self, ref: AdapterRef, tier: Tier = Tier.HOST, priority: int = 0, timeout_s: float = 5.0):  # type: ignore[no-untyped-def]
        return self.loading.ensure(ref, tier, priority=priority, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def a_node(folder: Path, *, max_bytes: int = 10_000, limits: Limits | None = None) -> AsyncIterator[Node]:
    cache = DiskCache(folder, max_bytes, verify=verify, overhead_bytes=10)
    await cache.open()
    store, engine = SlowStore(), FakeEngine(folder)
    loading = Loading(cache, store, engine, write_folder, limits or Limits())
    try:
        yield Node(cache, store, engine, loading)
    finally:
        await loading.close()
        await cache.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with a_node(tmp_path) as each:
        yield each


async def test_the_tiers_one_by_one(node: Node) -> None:
    ref = await node.adapter(b"one")
    assert (await node.ensure(ref, Tier.DISK)).found_at is Tier.STORE
    assert (await node.ensure(ref, Tier.DISK)).found_at is Tier.DISK
    loaded = await node.ensure(ref)
    assert (loaded.found_at, loaded.bytes_fetched, node.engine.digests) == (Tier.DISK, 0, {ref.digest})
    assert (await node.ensure(ref)).found_at is Tier.HOST
    assert (await node.ensure(ref, Tier.SLOT)).found_at is Tier.HOST
    status = node.loading.status
    assert (status.num_misses, status.num_hits, status.bytes_fetched) == (1, 4, 3)


async def test_500_callers_one_fetch_one_load(node: Node) -> None:
    ref = await node.adapter(b"one")
    loaded = await asyncio.gather(*(node.ensure(ref) for _ in range(500)))
    assert node.store.num_reads == 1
    assert node.engine.num_loads == 1
    assert {each.found_at for each in loaded} == {Tier.STORE}


async def test_cancelled_callers_leave_the_load_to_the_others(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.store.go.clear()
    callers = [asyncio.ensure_future(node.ensure(ref)) for _ in range(10)]
    await until(lambda: node.store.num_running)
    for caller in callers[:9]:
        caller.cancel()
    await asyncio.sleep(0.01)
    node.store.go.set()
    assert (await callers[9]).found_at is Tier.STORE
    assert node.store.num_reads == 1


async def test_a_caller_out_of_time_gets_deadline_exceeded_and_the_fetch_goes_on(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.store.go.clear()
    waiting = asyncio.ensure_future(node.ensure(ref, timeout_s=1.0))
    await until(lambda: node.store.num_running)
    with pytest.raises(DeadlineExceeded, match=r"did not reach tier HOST within 1\.0 s"):
        await waiting
    node.store.go.set()
    assert (await node.ensure(ref)).found_at is not Tier.HOST
    assert node.store.num_reads == 1


async def test_a_prefetch_under_way_is_joined_by_a_load(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.store.go.clear()
    prefetch = asyncio.ensure_future(node.ensure(ref, Tier.DISK))
    await until(lambda: node.store.num_running)
    load = asyncio.ensure_future(node.ensure(ref, priority=10))
    await asyncio.sleep(0.01)
    node.store.go.set()
    await asyncio.gather(prefetch, load)
    assert node.store.num_reads == 1


async def test_fetches_are_bounded_and_urgent_ones_come_first(tmp_path: Path) -> None:
    async with a_node(tmp_path, limits=Limits(max_fetches=2)) as node:
        refs = [await node.adapter(f"adapter {number}".encode()) for number in range(8)]
        node.store.go.clear()
        tasks = [asyncio.ensure_future(node.ensure(ref, Tier.DISK)) for ref in refs[:7]]
        await until(lambda: node.loading.status.num_queued == 5)
        await until(lambda: node.store.num_running == 2)
        tasks.append(asyncio.ensure_future(node.ensure(refs[7], priority=10)))
        await until(lambda: node.loading.status.num_queued == 6)
        node.store.go.set()
        await asyncio.gather(*tasks)
        assert node.store.peak == 2
        assert node.store.order.index(refs[7].digest) in (2, 3)  # two places came free at once


async def test_corrupt_bytes_are_told_and_nothing_is_left(node: Node, tmp_path: Path) -> None:
    ref = await node.adapter(b"one")
    node.store.flip(ref.object_key)
    with pytest.raises(BlobCorrupt):
        await node.ensure(ref)
    assert [each for each in tmp_path.iterdir() if not each.name.startswith(".")] == []
    node.store.flip(ref.object_key)
    assert (await node.ensure(ref)).found_at is Tier.STORE  # the failure was not kept


@pytest.mark.parametrize("error", [NotFound("gone"), Unavailable("away")])
async def test_store_failures_are_told_to_everybody_and_not_kept(node: Node, error: MintError) -> None:
    ref = await node.adapter(b"one")
    node.store.error = error
    failures = await asyncio.gather(*(node.ensure(ref) for _ in range(5)), return_exceptions=True)
    assert {type(each) for each in failures} == {type(error)}
    node.store.error = None
    await node.ensure(ref)


async def test_another_tenants_damaged_copy_does_not_fail_mine(node: Node) -> None:
    mine = await node.adapter(b"one", tenant="acme")
    theirs = await node.adapter(b"one", tenant="evil")
    await node.store.delete(theirs.object_key)
    node.store.go.clear()
    first = asyncio.ensure_future(node.ensure(theirs, Tier.DISK))
    await until(lambda: node.store.num_running)
    second = asyncio.ensure_future(node.ensure(mine, Tier.DISK))
    await asyncio.sleep(0.01)
    node.store.go.set()
    with pytest.raises(NotFound):
        await first
    assert (await second).found_at is Tier.STORE


async def test_a_foreign_base_is_refused_before_a_byte_moves(node: Node) -> None:
    ref = await node.adapter(b"one", base_digest=OTHER_BASE)
    with pytest.raises(BaseModelMismatch, match=f"the engine here holds {BASE}"):
        await node.ensure(ref)
    assert node.store.num_reads == 0


async def test_a_resident_adapter_that_left_the_disk_is_not_fetched_again(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.engine.digests.add(ref.digest)
    assert (await node.ensure(ref)).found_at is Tier.HOST
    assert node.store.num_reads == 0


async def test_an_absent_engine_is_unavailable_and_costs_no_fetch(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.engine.error = Unavailable("engine away")
    with pytest.raises(Unavailable, match="engine away"):
        await node.ensure(ref)
    assert node.store.num_reads == 0


async def test_an_engine_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    async with a_node(tmp_path, limits=Limits(load_timeout_s=0.05)) as node:
        ref = await node.adapter(b"one")
        node.engine.go.clear()
        with pytest.raises(Unavailable, match=r"the engine did not load adapter .* within 0 s"):
            await node.ensure(ref)
        node.engine.go.set()
        assert (await node.ensure(ref)).found_at is Tier.DISK


async def test_a_slow_store_is_unavailable_and_its_place_comes_back(tmp_path: Path) -> None:
    async with a_node(tmp_path, limits=Limits(max_fetches=1, fetch_timeout_s=0.05)) as node:
        ref, other = await node.adapter(b"one"), await node.adapter(b"two")
        node.store.go.clear()
        with pytest.raises(Unavailable, match="the object store is slow"):
            await node.ensure(ref)
        node.store.go.set()
        await node.ensure(other)


async def test_a_flipped_bit_on_disk_under_a_running_loader_is_fetched_again_once(node: Node, tmp_path: Path) -> None:
    ref = await node.adapter(b"one")
    await node.ensure(ref, Tier.DISK)
    path = tmp_path / ref.digest.removeprefix("sha256:") / "adapter_model.safetensors"
    path.write_bytes(b"onf")
    assert (await node.ensure(ref)).found_at is Tier.STORE
    assert node.store.num_reads == 2
    assert node.cache.status.num_quarantined == 1
    assert node.engine.digests == {ref.digest}


async def test_what_the_engine_refuses_for_good_reason_is_refused(node: Node) -> None:
    ref = await node.adapter(b"one")
    node.engine.error = InvalidArgument("no such module", field="folder")
    with pytest.raises(InvalidArgument, match="no such module"):
        await node.ensure(ref)
    assert node.store.num_reads == 1


async def test_no_adapter_in_the_blob_is_invalid_and_leaves_nothing(node: Node) -> None:
    ref = await node.adapter(b"pickle!")
    with pytest.raises(InvalidArgument, match="not an adapter"):
        await node.ensure(ref)
    assert ref.digest not in node.cache
    assert node.cache.status.used_bytes == 0


async def test_a_tiny_cache_serves_many_loads_without_fetching_twice(tmp_path: Path) -> None:
    async with a_node(tmp_path, max_bytes=90) as node:
        refs = [await node.adapter(f"adapter number {number:03}".encode()) for number in range(40)]
        await asyncio.gather(*(node.ensure(ref, timeout_s=20) for ref in refs))
        assert node.engine.digests == {ref.digest for ref in refs}
        assert node.store.num_reads == 40


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tenant": "acme"}, "adapter.tenant"),
        ({"digest": "sha256:00"}, "adapter.blob.digest"),
        ({"base_digest": ""}, "adapter.base_digest"),
        ({"size_bytes": 0}, "adapter.blob.size_bytes"),
        ({"object_key": f"tenants/evil/blobs/{'a' * 64}/1"}, "adapter.object_key"),
        ({"object_key": f"tenants/acme/blobs/{'a' * 64}/"}, "adapter.object_key"),
        ({"object_key": "../etc/passwd"}, "adapter.object_key"),
    ],
)
def test_a_bad_reference_names_its_field(change: dict[str, object], field: str) -> None:
    good: dict[str, object] = {
        "tenant": "tenants/acme",
        "digest": f"sha256:{'a' * 64}",
        "size_bytes": 3,
        "object_key": f"tenants/acme/blobs/{'a' * 64}/1",
        "base_digest": BASE,
    }
    assert AdapterRef.checked(**good).tenant == "acme"  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        AdapterRef.checked(**(good | change))  # type: ignore[arg-type]
    assert caught.value.field == field


async def test_a_tickets_life(node: Node) -> None:
    tickets = Tickets(node.loading)
    ref = await node.adapter(b"one")
    node.store.go.clear()
    (ticket,) = tickets.submit([ref], Tier.DISK, priority=0)
    assert ticket.state is TicketState.QUEUED
    await until(lambda: tickets.get(ticket.name).state is TicketState.LOADING)
    node.store.go.set()
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.DONE
    assert (await tickets.cancel(ticket.name)).state is TicketState.DONE
    assert ref.digest in node.cache


async def test_a_cancelled_ticket_in_the_queue_is_never_fetched(tmp_path: Path) -> None:
    async with a_node(tmp_path, limits=Limits(max_fetches=1)) as node:
        tickets = Tickets(node.loading)
        refs = [await node.adapter(data) for data in (b"one", b"two")]
        node.store.go.clear()
        first, second = tickets.submit(refs, Tier.DISK, priority=0)
        await until(lambda: node.loading.status.num_queued == 1)
        assert (await tickets.cancel(second.name)).state is TicketState.CANCELLED
        node.store.go.set()
        await until(lambda: first.state.is_final)
        assert first.state is TicketState.DONE
        assert node.store.order == [refs[0].digest]
        assert node.loading.status.num_queued == 0


async def test_a_failed_ticket_says_why_and_unknown_ones_are_not_found(node: Node) -> None:
    tickets = Tickets(node.loading, max_open=2)
    ref = await node.adapter(b"pickle")
    (ticket,) = tickets.submit([ref], Tier.DISK, priority=0)
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.FAILED
    assert ticket.error == "INVALID_FIELD: not an adapter"
    with pytest.raises(NotFound):
        tickets.get(LoadTicketName("nobody"))
    with pytest.raises(ResourceExhausted, match="2 may be open"):
        tickets.submit([ref] * 3, Tier.DISK, priority=0)
    await tickets.close()


async def test_a_tickets_deadline_cancels_it(node: Node) -> None:
    tickets = Tickets(node.loading, timeout_s=0.05)
    node.store.go.clear()
    (ticket,) = tickets.submit([await node.adapter(b"one")], Tier.DISK, priority=0)
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.CANCELLED
    assert ticket.error.startswith("DEADLINE_EXCEEDED: ")
    node.store.go.set()


class FakeCatalog:
    """Moves come out of a queue; an error ends the watch."""

    def __init__(self) -> None:
        self.moves: asyncio.Queue[AliasMove | MintError] = asyncio.Queue()
        self.refs: dict[RevisionName, AdapterRef] = {}
        self.starts: list[int] = []

    async def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        self.starts.append(after)
        while True:
            move = await self.moves.get()
            if isinstance(move, MintError):
                raise move
            yield move

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        return self.refs[revision]


async def test_an_alias_that_moves_is_followed_where_its_policy_was_served_and_nowhere_else(node: Node) -> None:
    catalog, tickets = FakeCatalog(), Tickets(node.loading)
    olds = [await node.adapter(data) for data in (b"hot on disk", b"resident only", b"never here")]
    news = [await node.adapter(data) for data in (b"new 1", b"new 2", b"new 3")]
    await node.ensure(olds[0], Tier.DISK)
    node.engine.digests.add(olds[1].digest)
    prefetcher = Prefetcher(catalog, node.engine, node.cache, tickets)
    running = asyncio.ensure_future(prefetcher.run())
    catalog.moves.put_nowait(Unavailable("catalog restarts"))
    for number, (old, new) in enumerate(zip(olds, news, strict=True)):
        name = AliasName("acme", f"policy-{number}", "live")
        catalog.refs[RevisionName("acme", f"policy-{number}", 2)] = new
        target, before = Target(2, new.digest), Target(1, old.digest)
        catalog.moves.put_nowait(AliasMove(10 + number, name, (target,), (target, before)))
    await until(lambda: news[1].digest in node.cache and news[0].digest in node.cache)
    await asyncio.sleep(0.05)
    assert news[2].digest not in node.cache
    assert prefetcher.num_prefetched == 2
    assert catalog.starts == [0, 0]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await tickets.close()
