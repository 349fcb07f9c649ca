"""What the catalog's key-value contract promises, asked of a real etcd and of its in-memory twin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from unit.catalog.memory_store import MemoryStore

from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Compare, Delete, DeleteRange, Field, LeaseGone, Put, Revision, Store, prefix_end
from mint_core.errors import OutOfRange, RevisionCompacted
from support.etcd import EtcdServer, running_etcd

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(params=["memory", "etcd"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    else:
        server: EtcdServer = request.getfixturevalue("etcd")
        async with EtcdStore(server.settings()) as real:
            yield real


@pytest.fixture
def pass_time(store: Store) -> Callable[[float], Awaitable[None]]:
    return store.pass_time if isinstance(store, MemoryStore) else asyncio.sleep


@pytest.fixture
def prefix() -> bytes:
    """Tests share one etcd, so each has keys of its own."""
    return f"/t{next(_prefixes):04d}/".encode()


async def _take(stream: AsyncIterator[Revision], count: int) -> list[Revision]:
    taken: list[Revision] = []
    async with asyncio.timeout(10), contextlib.aclosing(stream):  # type: ignore[type-var]
        async for revision in stream:
            taken.append(revision)
            if len(taken) == count:
                break
    return taken


async def test_a_key_remembers_when_it_was_created_and_changed(store: Store, prefix: bytes) -> None:
    key = prefix + b"a"
    first = await store.txn([], [Put(key, b"1")])
    second = await store.txn([], [Put(key, b"2")])
    assert second.revision == first.revision + 1
    kv = (await store.get([key])).values[0]
    assert kv is not None
    assert (kv.value, kv.create_revision, kv.mod_revision) == (b"2", first.revision, second.revision)


async def test_deleting_and_making_again_is_another_creation(store: Store, prefix: bytes) -> None:
    key = prefix + b"a"
    first = await store.txn([], [Put(key, b"1")])
    await store.txn([], [Delete(key)])
    assert (await store.get([key])).values == (None,)
    again = await store.txn([], [Put(key, b"1")])
    kv = (await store.get([key])).values[0]
    assert kv is not None
    assert kv.create_revision == again.revision > first.revision


async def test_a_transaction_applies_all_or_nothing(store: Store, prefix: bytes) -> None:
    a, b = prefix + b"a", prefix + b"b"
    made = await store.txn([Compare(a, Field.MOD, 0)], [Put(a, b"1"), Put(b, b"1")])
    assert made.succeeded
    lost = await store.txn([Compare(b, Field.MOD, made.revision), Compare(a, Field.MOD, 0)], [Put(b, b"2"), Delete(a)])
    assert not lost.succeeded
    assert lost.revision == made.revision
    values = (await store.get([a, b])).values
    assert [kv and kv.value for kv in values] == [b"1", b"1"]
    won = await store.txn([Compare(b, Field.CREATE, made.revision)], [Put(b, b"2"), Delete(a)])
    assert won.succeeded
    values = (await store.get([a, b])).values
    assert [kv and kv.value for kv in values] == [None, b"2"]
    assert values[1] is not None
    assert values[1].mod_revision == won.revision


async def test_of_rivals_that_compare_the_same_one_wins(store: Store, prefix: bytes) -> None:
    key = prefix + b"a"
    made = await store.txn([], [Put(key, b"0")])
    compare = Compare(key, Field.MOD, made.revision)
    results = await asyncio.gather(*(store.txn([compare], [Put(key, b"%d" % rival)]) for rival in range(20)))
    assert sum(result.succeeded for result in results) == 1


async def test_keys_are_read_at_one_revision_also_an_old_one(store: Store, prefix: bytes) -> None:
    a, b = prefix + b"a", prefix + b"b"
    old = await store.txn([], [Put(a, b"1"), Put(b, b"1")])
    new = await store.txn([], [Put(a, b"2"), Delete(b)])
    before = await store.get([a, b], revision=old.revision)
    assert [kv and kv.value for kv in before.values] == [b"1", b"1"]
    head = await store.get([a, b])
    assert [kv and kv.value for kv in head.values] == [b"2", None]
    assert head.revision >= new.revision


async def test_a_scan_is_in_order_limited_and_at_one_revision(store: Store, prefix: bytes) -> None:
    for number in (3, 1, 2, 0):
        last = await store.txn([], [Put(prefix + b"%d" % number, b"x")])
    await store.txn([], [Put(prefix + b"15", b"x"), Delete(prefix + b"0")])
    page = await store.scan(prefix, prefix_end(prefix), limit=2, revision=last.revision)
    assert [kv.key for kv in page.values] == [prefix + b"0", prefix + b"1"]
    assert page.more
    rest = await store.scan(page.values[-1].key + b"\0", prefix_end(prefix), limit=9, revision=last.revision)
    assert [kv.key for kv in rest.values] == [prefix + b"2", prefix + b"3"]
    assert not rest.more
    head = await store.scan(prefix, prefix_end(prefix), limit=9)
    assert [kv.key for kv in head.values] == [prefix + each for each in (b"1", b"15", b"2", b"3")]


async def test_the_future_cannot_be_read(store: Store, prefix: bytes) -> None:
    head = (await store.get([prefix])).revision
    with pytest.raises(OutOfRange) as caught:
        await store.get([prefix], revision=head + 1000)
    assert caught.value.reason == "OUT_OF_RANGE"


async def test_compacted_history_cannot_be_read_or_watched(store: Store, prefix: bytes) -> None:
    key = prefix + b"a"
    first = await store.txn([], [Put(key, b"1")])
    second = await store.txn([], [Put(key, b"2")])
    await store.txn([], [Put(key, b"3")])
    await store.compact(second.revision)
    kept = (await store.get([key], revision=second.revision)).values[0]
    assert kept is not None
    assert kept.value == b"2"
    with pytest.raises(RevisionCompacted):
        await store.get([key], revision=first.revision)
    with pytest.raises(RevisionCompacted):
        await store.scan(prefix, prefix_end(prefix), limit=1, revision=first.revision)
    with pytest.raises(RevisionCompacted):
        await _take(store.watch(key, key + b"\0", after=first.revision - 1), 1)
    still = await _take(store.watch(key, key + b"\0", after=second.revision), 1)
    assert [change.value for change in still[0].changes] == [b"3"]


async def test_a_watch_delivers_whole_revisions_in_order_and_goes_on(store: Store, prefix: bytes) -> None:
    start = (await store.get([prefix])).revision
    made = await store.txn([], [Put(prefix + b"a", b"1"), Put(prefix + b"b", b"1")])
    await store.txn([], [Put(prefix[:-1] + b"0other", b"not in range")])
    changed = await store.txn([], [Put(prefix + b"a", b"2"), Delete(prefix + b"b")])
    stream = store.watch(prefix, prefix_end(prefix), after=start)
    taking = asyncio.create_task(_take(stream, 3))
    await asyncio.sleep(0.05)
    last = await store.txn([], [Put(prefix + b"c", b"3")])
    seen = await taking
    assert [revision.revision for revision in seen] == [made.revision, changed.revision, last.revision]
    assert {(change.key, change.value, change.deleted) for change in seen[1].changes} == {
        (prefix + b"a", b"2", False),
        (prefix + b"b", b"", True),
    }
    assert {change.create_revision for change in seen[0].changes} == {made.revision}


async def test_a_watch_from_the_middle_starts_after_its_revision(store: Store, prefix: bytes) -> None:
    revisions = [(await store.txn([], [Put(prefix + b"a", b"%d" % number)])).revision for number in range(5)]
    seen = await _take(store.watch(prefix, prefix_end(prefix), after=revisions[2]), 2)
    assert [revision.revision for revision in seen] == revisions[3:]


async def test_a_lease_takes_its_keys_along(
    store: Store, prefix: bytes, pass_time: Callable[[float], Awaitable[None]]
) -> None:
    lease = await store.grant(2)
    await store.txn([], [Put(prefix + b"a", b"1", lease), Put(prefix + b"b", b"1")])
    kv = (await store.get([prefix + b"a"])).values[0]
    assert kv is not None
    assert kv.lease == lease
    for _ in range(3):
        await pass_time(1.2)
        assert await store.keep_alive(lease)
    assert (await store.get([prefix + b"a"])).values[0] is not None
    await pass_time(4.0)
    values = (await store.get([prefix + b"a", prefix + b"b"])).values
    assert values[0] is None
    assert values[1] is not None
    assert not await store.keep_alive(lease)


async def test_a_revoked_lease_is_gone(store: Store, prefix: bytes) -> None:
    lease = await store.grant(60)
    await store.txn([], [Put(prefix + b"a", b"1", lease)])
    await store.revoke(lease)
    await store.revoke(lease)
    assert (await store.get([prefix + b"a"])).values == (None,)
    assert not await store.keep_alive(lease)
    with pytest.raises(LeaseGone):
        await store.txn([], [Put(prefix + b"a", b"1", lease)])


async def test_deleting_nothing_moves_no_revision(store: Store, prefix: bytes) -> None:
    head = (await store.get([prefix])).revision
    result = await store.txn([], [Delete(prefix + b"never")])
    assert result.succeeded
    assert result.revision == head


async def test_a_compare_of_the_value_ignores_who_wrote_it_again(store: Store, prefix: bytes) -> None:
    key, other = prefix + b"a", prefix + b"b"
    await store.txn([], [Put(key, b"verified")])
    for _ in range(2):
        touched = await store.txn([Compare(key, Field.VALUE, value=b"verified")], [Put(key, b"verified")])
        assert touched.succeeded
    assert not (await store.txn([Compare(key, Field.VALUE, value=b"condemned")], [Put(other, b"1")])).succeeded
    assert not (await store.txn([Compare(other, Field.VALUE, value=b"")], [Put(other, b"1")])).succeeded


async def test_counts_and_scans_of_several_ranges_are_of_one_revision(store: Store, prefix: bytes) -> None:
    for name in (b"a/1", b"a/2", b"a/3", b"b/1"):
        written = await store.txn([], [Put(prefix + name, name)])
    await store.txn([], [Delete(prefix + b"b/1")])
    ranges = [(prefix + b"a/", prefix + b"a0"), (prefix + b"b/", prefix + b"b0")]
    first, second = await store.scan_each(ranges, limit=2, revision=written.revision)
    assert [kv.value for kv in first.values] == [b"a/1", b"a/2"]
    assert first.more
    assert [kv.value for kv in second.values] == [b"b/1"]
    assert not second.more
    assert await store.count(*ranges[0]) == 3
    assert await store.count(*ranges[1]) == 0
    assert await store.count(*ranges[1], revision=written.revision) == 1
    keys = await store.scan(*ranges[0], limit=9, keys_only=True)
    assert [(kv.key, kv.value) for kv in keys.values] == [(prefix + name, b"") for name in (b"a/1", b"a/2", b"a/3")]


async def test_a_range_is_deleted_in_one_revision(store: Store, prefix: bytes) -> None:
    await store.txn([], [Put(prefix + name, b"1") for name in (b"a/1", b"a/2", b"b/1")])
    result = await store.txn([], [DeleteRange(prefix + b"a/", prefix + b"a0"), Put(prefix + b"c", b"1")])
    left = await store.scan(prefix, prefix_end(prefix), limit=9)
    assert [kv.key for kv in left.values] == [prefix + b"b/1", prefix + b"c"]
    changes = (await _take(store.watch(prefix, prefix_end(prefix), after=result.revision - 1), 1))[0].changes
    assert sorted((change.key, change.deleted) for change in changes) == [
        (prefix + b"a/1", True),
        (prefix + b"a/2", True),
        (prefix + b"c", False),
    ]
