"""Store → disk → engine: shared, bounded, and right about what went wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    SignatureInvalid,
    SignatureRequired,
    Unavailable,
)
from mint_core.signing import Signer, TrustedKeys
from mint_loader.loading import Limits
from mint_loader.model import AdapterRef, Tier
from support.loader_room import BASE, OTHER_BASE, RoomNode, room_node, until


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RoomNode]:
    async with room_node(tmp_path) as each:
        yield each


async def test_the_tiers_one_by_one(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    assert (await node.ensure(ref, Tier.DISK)).found_at is Tier.STORE
    assert (await node.ensure(ref, Tier.DISK)).found_at is Tier.DISK
    loaded = await node.ensure(ref)
    assert (loaded.found_at, loaded.bytes_fetched, node.engine.digests) == (Tier.DISK, 0, {ref.digest})
    assert (await node.ensure(ref)).found_at is Tier.HOST
    assert (await node.ensure(ref, Tier.SLOT)).found_at is Tier.HOST
    status = node.loading.status
    assert (status.num_misses, status.num_hits, status.bytes_fetched) == (1, 4, 3)


async def test_500_callers_one_fetch_one_load(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    loaded = await asyncio.gather(*(node.ensure(ref) for _ in range(500)))
    assert node.store.num_reads == 1
    assert node.engine.num_loads == 1
    assert {each.found_at for each in loaded} == {Tier.STORE}


async def test_cancelled_callers_leave_the_load_to_the_others(node: RoomNode) -> None:
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


async def test_a_caller_out_of_time_gets_deadline_exceeded_and_the_fetch_goes_on(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    node.store.go.clear()
    waiting = asyncio.ensure_future(node.ensure(ref, timeout_s=1.0))
    await until(lambda: node.store.num_running)
    with pytest.raises(DeadlineExceeded, match=r"did not reach tier HOST within 1\.0 s"):
        await waiting
    node.store.go.set()
    assert (await node.ensure(ref)).found_at is not Tier.HOST
    assert node.store.num_reads == 1


async def test_a_prefetch_under_way_is_joined_by_a_load(node: RoomNode) -> None:
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
    async with room_node(tmp_path, limits=Limits(max_fetches=2)) as node:
        refs = [await node.adapter(f"adapter {number}".encode()) for number in range(8)]
        node.store.go.clear()
        tasks = [asyncio.ensure_future(node.ensure(ref, Tier.DISK)) for ref in refs[:7]]
        await until(lambda: node.loading.fetch_gate.num_queued == 5)
        await until(lambda: node.store.num_running == 2)
        tasks.append(asyncio.ensure_future(node.ensure(refs[7], priority=10)))
        await until(lambda: node.loading.fetch_gate.num_queued == 6)
        node.store.go.set()
        await asyncio.gather(*tasks)
        assert node.store.peak == 2
        assert node.store.order.index(refs[7].digest) in (2, 3)  # two places came free at once


async def test_corrupt_bytes_are_told_and_nothing_is_left(node: RoomNode, tmp_path: Path) -> None:
    ref = await node.adapter(b"one")
    node.store.flip(ref.object_key)
    with pytest.raises(BlobCorrupt):
        await node.ensure(ref)
    assert [each for each in tmp_path.iterdir() if not each.name.startswith(".")] == []
    node.store.flip(ref.object_key)
    assert (await node.ensure(ref)).found_at is Tier.STORE  # the failure was not kept


@pytest.mark.parametrize("error", [NotFound("gone"), Unavailable("away")])
async def test_store_failures_are_told_to_everybody_and_not_kept(node: RoomNode, error: MintError) -> None:
    ref = await node.adapter(b"one")
    node.store.error = error
    failures = await asyncio.gather(*(node.ensure(ref) for _ in range(5)), return_exceptions=True)
    assert {type(each) for each in failures} == {type(error)}
    node.store.error = None
    await node.ensure(ref)


async def test_another_tenants_damaged_copy_does_not_fail_mine(node: RoomNode) -> None:
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


async def test_a_foreign_base_is_refused_before_a_byte_moves(node: RoomNode) -> None:
    ref = await node.adapter(b"one", base_digest=OTHER_BASE)
    with pytest.raises(BaseModelMismatch, match=f"the engine here holds {BASE}"):
        await node.ensure(ref)
    assert node.store.num_reads == 0


async def test_a_resident_adapter_that_left_the_disk_is_not_fetched_again(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    node.engine.digests.add(ref.digest)
    assert (await node.ensure(ref)).found_at is Tier.HOST
    assert node.store.num_reads == 0


async def test_what_the_engine_held_a_moment_ago_says_that_it_lacks_an_adapter_and_never_that_it_holds_one(
    node: RoomNode,
) -> None:
    one, two, other = [await node.adapter(each) for each in (b"one", b"two", b"other")]
    node.engine.digests.add(one.digest)
    assert (await node.ensure(one)).found_at is Tier.HOST
    assert node.engine.num_looks == 1
    assert (await node.ensure(two)).found_at is Tier.STORE
    assert node.engine.num_looks == 1
    node.engine.digests.clear()
    assert (await node.ensure(one)).found_at is Tier.STORE
    assert node.engine.num_looks == 2
    node.engine.base_digest = OTHER_BASE  # it began anew
    await node.loading.view.resident()
    with pytest.raises(BaseModelMismatch):
        await node.ensure(other)
    assert node.store.num_reads == 2


async def test_an_absent_engine_is_unavailable_and_costs_no_fetch(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    node.engine.error = Unavailable("engine away")
    with pytest.raises(Unavailable, match="engine away"):
        await node.ensure(ref)
    assert node.store.num_reads == 0


async def test_an_engine_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(load_timeout_s=0.05)) as node:
        ref = await node.adapter(b"one")
        node.engine.go.clear()
        with pytest.raises(Unavailable, match=r"the engine did not load adapter .* within 0 s"):
            await node.ensure(ref)
        node.engine.go.set()
        assert (await node.ensure(ref)).found_at is Tier.DISK


async def test_a_slow_store_is_unavailable_and_its_place_comes_back(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(max_fetches=1, fetch_timeout_s=0.5)) as node:
        ref, other = await node.adapter(b"one"), await node.adapter(b"two")
        node.store.go.clear()
        with pytest.raises(Unavailable, match="the object store is slow"):
            await node.ensure(ref)
        node.store.go.set()
        await node.ensure(other)


async def test_a_flipped_bit_on_disk_under_a_running_loader_is_fetched_again_once(
    node: RoomNode, tmp_path: Path
) -> None:
    ref = await node.adapter(b"one")
    await node.ensure(ref, Tier.DISK)
    path = tmp_path / ref.digest.removeprefix("sha256:") / "adapter_model.safetensors"
    path.write_bytes(b"onf")
    assert (await node.ensure(ref)).found_at is Tier.STORE
    assert node.store.num_reads == 2
    assert node.cache.status.num_quarantined == 1
    assert node.engine.digests == {ref.digest}


async def test_what_the_engine_refuses_for_good_reason_is_refused(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    node.engine.error = InvalidArgument("no such module", field="folder")
    with pytest.raises(InvalidArgument, match="no such module"):
        await node.ensure(ref)
    assert node.store.num_reads == 1


async def test_no_adapter_in_the_blob_is_invalid_and_leaves_nothing(node: RoomNode) -> None:
    ref = await node.adapter(b"pickle!")
    with pytest.raises(InvalidArgument, match="not an adapter"):
        await node.ensure(ref)
    assert ref.digest not in node.cache
    assert node.cache.status.used_bytes == 0


async def test_a_tiny_cache_serves_many_loads_without_fetching_twice(tmp_path: Path) -> None:
    async with room_node(tmp_path, max_bytes=90) as node:
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


async def test_a_wait_that_would_outlive_the_deadline_is_refused_at_once(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(max_fetches=1, max_loads=1)) as node:
        for number in range(4):
            ref = await node.adapter(f"before {number}".encode())
            node.engine.go.clear()
            loading = asyncio.ensure_future(node.ensure(ref))
            await until(lambda: node.engine.num_loads == number + 1)  # noqa: B023 - awaited here
            await asyncio.sleep(0.1)
            node.engine.go.set()
            await loading
        node.engine.go.clear()
        queued = [
            asyncio.ensure_future(node.ensure(await node.adapter(f"a {n}".encode()), timeout_s=60.0)) for n in range(15)
        ]
        gate = node.loading.way_gate
        await until(lambda: gate.num_queued == 12)
        assert gate.expected_wait_s("modest", 0) < gate.expected_wait_s("acme", 0) / 10
        with pytest.raises(
            Unavailable, match=r"would wait about .* s for its turn, the caller gives it 0\.2 s"
        ) as caught:
            await node.ensure(await node.adapter(b"late"), timeout_s=0.2)
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1.0
        # Another tenant's turn comes next: it is let in, and so is one that joins a load under way.
        joined = asyncio.ensure_future(node.ensure(await node.adapter(b"a 0"), timeout_s=60.0))
        theirs = asyncio.ensure_future(node.ensure(await node.adapter(b"b", tenant="modest"), timeout_s=60.0))
        await asyncio.sleep(0.1)
        assert not joined.done()
        assert not theirs.done()
        node.engine.go.set()
        await asyncio.gather(*queued, joined, theirs)
        by_tenant = {each.tenant: each for each in node.loading.waits.tenants()}
        assert (by_tenant["acme"].num_refused, by_tenant["modest"].num_done) == (1, 1)
        assert by_tenant["acme"].wait_p99_s >= by_tenant["acme"].wait_p50_s > 0.05


async def test_full_queues_refuse_with_a_time_to_come_back(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(max_fetches=1, max_queued_per_tenant=2, max_waiting=5)) as node:
        node.store.go.clear()
        waiting = [
            asyncio.ensure_future(node.ensure(await node.adapter(f"a {n}".encode()), Tier.DISK)) for n in range(3)
        ]
        await until(lambda: node.loading.fetch_gate.num_queued == 2)
        with pytest.raises(ResourceExhausted, match="2 fetches of tenant 'acme' wait already") as caught:
            await node.ensure(await node.adapter(b"more"), Tier.DISK)
        assert caught.value.retry_after_s is not None
        theirs = await node.adapter(b"theirs", tenant="evil")
        waiting += [asyncio.ensure_future(node.ensure(theirs, Tier.DISK)) for _ in range(2)]
        await until(lambda: node.loading.fetch_gate.num_queued == 3)
        with pytest.raises(ResourceExhausted, match="5 callers wait for this loader"):
            await node.ensure(theirs, Tier.DISK)
        node.store.go.set()
        await asyncio.gather(*waiting)
        assert node.store.num_reads == 4


async def test_a_hanging_blob_blocks_neither_its_own_tenant_nor_another(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(max_fetches=1, slow_fetch_s=0.05)) as node:
        node.store.go.clear()
        hanging = asyncio.ensure_future(node.ensure(await node.adapter(b"hanging"), Tier.DISK))
        await until(lambda: node.store.num_running)
        good = await node.adapter(b"good", tenant="other")
        waiting = asyncio.ensure_future(node.ensure(good, Tier.DISK))
        await until(lambda: node.store.num_running == 2)
        assert node.loading.fetch_gate.num_queued == 0
        node.store.go.set()
        await asyncio.gather(hanging, waiting)


async def test_signatures_are_demanded_before_anything_moves(tmp_path: Path) -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    trusted = TrustedKeys({"acme": [key.public_key()]})
    async with room_node(tmp_path, check_signature=trusted.check) as node:
        ref = await node.adapter(b"one")
        signature = Signer(key).sign("acme", ref.digest, ref.base_digest)
        foreign = Signer(key).sign("evil", ref.digest, ref.base_digest)
        with pytest.raises(SignatureRequired, match="is not signed"):
            await node.ensure(ref)
        for bad in (foreign, Signer(other).sign("acme", ref.digest, ref.base_digest)):
            with pytest.raises(SignatureInvalid):
                await node.ensure(dataclasses.replace(ref, signature=bad))
        assert (node.store.num_reads, node.engine.num_loads) == (0, 0)
        assert (await node.ensure(dataclasses.replace(ref, signature=signature))).found_at is Tier.STORE
        with pytest.raises(SignatureRequired):  # also when it is there
            await node.ensure(ref)
        free = await node.adapter(b"two", tenant="evil")
        assert (await node.ensure(free)).found_at is Tier.STORE


async def test_pinned_means_the_engine_keeps_it(node: RoomNode) -> None:
    ref = await node.adapter(b"one")
    await node.ensure(ref)
    assert node.engine.pinned == set()
    loaded = await node.loading.ensure(ref, Tier.HOST, timeout_s=5.0, pinned=True)
    assert (loaded.found_at, node.engine.pinned) == (Tier.HOST, {ref.digest})
