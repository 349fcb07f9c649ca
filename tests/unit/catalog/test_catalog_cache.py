"""Resolve's cache: the rules one by one, and all of Resolve against the store's own history."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import Alias, AliasHistoryEntry, Canary, Resolution
from mint_catalog.model.tables import Tables
from mint_catalog.serving.cache import AliasCache
from mint_catalog.serving.resolve import Freshness, Resolver
from mint_catalog.storage.gather import GatheredReads
from mint_catalog.storage.store import Change, Delete, DeleteRange, Put, ReadResult, Revision, prefix_end
from mint_catalog.storage.watch import Hub
from mint_core import calls
from mint_core.errors import MintError, NotFound, RevisionCompacted, Unavailable
from mint_core.names import AliasName

KEYS = Keys()
TABLES = Tables(KEYS, MessageCodecs.over(KEYS).for_store())
NAMES = [AliasName("acme", f"p{number}", "live") for number in range(3)]
LIVE = NAMES[0]
STALENESS_S = 5.0
MOSTLY = st.sampled_from([True, True, True, False])


def alias(name: AliasName, number: int) -> Alias:
    return Alias(name, resolution=Resolution(f"{name.parent}/revisions/{number}", base_model="baseModels/tiny"))


def number_of(resolution: Resolution) -> int:
    return int(resolution.revision.rpartition("/")[2])


class FakeTold:
    def __init__(self) -> None:
        self.position = 10
        self.told_until_s = 1000.0


class TestRules:
    def setup_method(self) -> None:
        self.told = FakeTold()
        self.now_s = 1000.0
        self.cache = AliasCache(KEYS, self.told, max_entries=2, staleness_s=STALENESS_S, now_s=lambda: self.now_s)

    def number(self, name: AliasName = LIVE, min_revision: int = 0) -> int | None:
        found = self.cache.get(str(name), min_revision=min_revision)
        return None if found is None else number_of(found[0].resolution or Resolution())

    def test_what_was_read_is_kept_as_of_the_position(self) -> None:
        assert self.cache.fill(alias(LIVE, 1), 12)
        found = self.cache.get(str(LIVE))
        assert found is not None
        assert found[1] == 12
        self.told.position = 15
        assert self.cache.get(str(LIVE)) == (found[0], 15)

    def test_a_fill_older_than_the_position_is_refused(self) -> None:
        assert not self.cache.fill(alias(LIVE, 1), 9)
        assert self.number() is None

    def test_what_this_process_writes_is_dropped_before_the_watch_tells(self) -> None:
        other = NAMES[1]
        for name in (LIVE, other):
            self.cache.fill(alias(name, 1), 12)
        self.cache.wrote([Put(KEYS.alias(LIVE), b""), Put(KEYS.policy(LIVE.parent), b"")], 20)
        assert self.number() is None
        assert self.number(other) == 1
        assert not self.cache.fill(alias(LIVE, 1), 19), "it was read before the write"
        assert self.cache.fill(alias(LIVE, 2), 20)
        assert self.number() == 2

    def test_what_this_process_deletes_by_range_is_dropped(self) -> None:
        self.cache.fill(alias(LIVE, 1), 12)
        self.cache.wrote([DeleteRange(KEYS.family("policies"), KEYS.family("policies") + b"z")], 20)
        assert self.number() == 1
        self.cache.wrote([DeleteRange(KEYS.aliases(LIVE.parent), prefix_end(KEYS.aliases(LIVE.parent)))], 21)
        assert self.number() is None
        assert not self.cache.fill(alias(LIVE, 1), 20)

    def test_a_store_that_went_back_in_time_takes_fills_again(self) -> None:
        self.cache.wrote([Delete(KEYS.alias(LIVE))], 500)
        assert not self.cache.fill(alias(LIVE, 1), 30)
        self.cache.lost()
        assert self.cache.fill(alias(LIVE, 1), 30)

    def test_a_fill_before_the_watch_has_a_position_is_refused(self) -> None:
        self.told.position = 0
        assert not self.cache.fill(alias(LIVE, 1), 9)

    def test_an_older_fill_does_not_undo_a_newer_one(self) -> None:
        self.cache.fill(alias(LIVE, 2), 14)
        assert not self.cache.fill(alias(LIVE, 1), 12)
        assert self.number() == 2

    def test_a_change_drops_the_alias_and_no_other(self) -> None:
        self.cache.fill(alias(LIVE, 1), 12)
        self.cache.fill(alias(NAMES[1], 1), 12)
        self.cache.hear([Change(KEYS.alias(LIVE), b"", 1, 13)])
        assert self.number() is None
        assert self.number(NAMES[1]) == 1

    def test_it_is_used_within_the_staleness_bound_only(self) -> None:
        self.cache.fill(alias(LIVE, 1), 12)
        self.now_s += STALENESS_S
        assert self.number() == 1
        self.now_s += 0.1
        assert self.number() is None
        self.told.told_until_s = self.now_s
        assert self.number() == 1

    def test_it_promises_no_revision_that_it_does_not_know(self) -> None:
        self.cache.fill(alias(LIVE, 1), 12)
        assert self.number(min_revision=12) == 1
        assert self.number(min_revision=13) is None
        self.told.position = 13
        assert self.number(min_revision=13) == 1

    def test_lost_history_empties_it(self) -> None:
        self.cache.fill(alias(LIVE, 1), 12)
        self.cache.lost()
        assert len(self.cache) == 0

    def test_it_is_bounded_and_the_least_recently_used_leaves(self) -> None:
        self.cache.fill(alias(NAMES[0], 1), 12)
        self.cache.fill(alias(NAMES[1], 1), 12)
        assert self.number(NAMES[0]) == 1
        self.cache.fill(alias(NAMES[2], 1), 12)
        assert len(self.cache) == 2
        assert [self.number(name) for name in NAMES] == [1, None, 1]

    def test_no_entries_means_no_cache(self) -> None:
        cache = AliasCache(KEYS, self.told, max_entries=0, staleness_s=STALENESS_S)
        assert not cache.fill(alias(LIVE, 1), 12)

    def test_only_what_resolving_needs_is_kept(self) -> None:
        canary, resolution = Canary(weight=0.5, salt="x"), Resolution(f"{LIVE.parent}/revisions/2")
        full = Alias(
            LIVE,
            resolution=resolution,
            canary=canary,
            canary_resolution=resolution,
            history=(AliasHistoryEntry(),) * 32,
        )
        self.cache.fill(full, 12)
        found = self.cache.get(str(LIVE))
        assert found is not None
        assert found[0] == Alias(LIVE, resolution=resolution, canary=canary, canary_resolution=resolution)


class SlowStore(MemoryStore):
    """Reads see the store when they are asked and are answered when a test says so; the watch waits for it too."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.is_slow = True
        self.num_gets = 0
        self.reads: list[asyncio.Event] = []
        self.num_told = 0
        self.is_lost = False
        self.moved = asyncio.Event()

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        self.num_gets += 1
        if self.is_away:
            raise Unavailable("etcd did not answer a read; retry")
        result = await super().get(keys, revision=revision)
        if self.is_slow and keys[0] != KEYS.tick:
            may_answer = asyncio.Event()
            self.reads.append(may_answer)
            await may_answer.wait()
        return result

    async def watch(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
        stream = super().watch(start, end, after=after)
        async with contextlib.aclosing(stream):
            async for revision in stream:
                while not self.num_told and not self.is_lost:
                    self.moved.clear()
                    await self.moved.wait()
                if self.is_lost:
                    self.is_lost = False
                    raise RevisionCompacted("gone")
                self.num_told -= 1
                yield revision


@dataclass
class _Asked:
    name: AliasName
    freshness: Freshness
    task: asyncio.Task[Resolution]
    head: int
    at_s: float


class ResolveMachine(RuleBasedStateMachine):
    """Every answer is what the alias was at the revision that the answer names, and that is as new as was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now_s = 1000.0
        self.store = SlowStore()
        self.hub = Hub(self.store, KEYS, now_s=lambda: self.now_s)
        self.cache = AliasCache(KEYS, self.hub, max_entries=2, staleness_s=STALENESS_S, now_s=lambda: self.now_s)
        self.hub.listen("aliases", self.cache)
        self.resolver = Resolver(self.store, TABLES, self.cache)
        self.asked: list[_Asked] = []
        self.heads: list[tuple[float, int]] = [(0.0, 1)]
        self.history: dict[AliasName, list[tuple[int, int | None]]] = {name: [(0, None)] for name in NAMES}
        self.number = 0
        self.hub_task = self.loop.create_task(self.hub.run())
        self.settle()
        for name in NAMES:
            self.write(name, is_put=True, is_told=True)
        self.look()
        self.tell(1000)

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        for asked in [each for each in self.asked if each.task.done()]:
            self.asked.remove(asked)
            self.check(asked)

    def value(self, name: AliasName, revision: int) -> int | None:
        return [number for written_at, number in self.history[name] if written_at <= revision][-1]

    def check(self, asked: _Asked) -> None:
        try:
            resolution = asked.task.result()
        except Unavailable:
            return
        except NotFound:
            assert any(self.value(asked.name, at) is None for at in range(asked.head, self.store.revision + 1))
            return
        revision = resolution.catalog_revision
        assert revision <= self.store.revision
        assert number_of(resolution) == self.value(asked.name, revision)
        assert revision >= asked.freshness.min_revision
        if asked.freshness.strong:
            assert revision >= asked.head
        else:
            bound = [head for at_s, head in self.heads if at_s < asked.at_s - STALENESS_S]
            assert not bound or revision >= bound[-1]

    @rule(name=st.sampled_from(NAMES[:2]), is_put=MOSTLY, is_told=st.booleans())
    def write(self, name: AliasName, is_put: bool, is_told: bool) -> None:
        self.number += 1
        key = KEYS.alias(name)
        put = Put(key, TABLES.codecs.alias.encode(alias(name, self.number)))
        result = self.loop.run_until_complete(self.store.txn([], [put if is_put else Delete(key)]))
        self.history[name].append((result.revision, self.number if is_put else None))
        self.heads.append((self.now_s, self.store.revision))
        self.tell(1000 if is_told else 0)

    @rule(count=st.integers(0, 2))
    def tell(self, count: int) -> None:
        self.store.num_told = count
        self.store.moved.set()
        self.settle()
        self.store.num_told = 0

    @rule(seconds=st.sampled_from([2.0, 6.0]), is_up_to_date=st.booleans())
    def pass_seconds(self, seconds: float, is_up_to_date: bool) -> None:
        self.now_s += seconds
        if is_up_to_date:
            self.tell(1000)
            self.look()

    @rule(fault=st.sampled_from(["away", "back", "back", "lose history"]))
    def fault(self, fault: str) -> None:
        self.store.is_away = fault == "away"
        self.store.is_lost = fault == "lose history"
        self.store.moved.set()
        self.settle()
        self.look()

    def look(self) -> None:
        self.loop.run_until_complete(self.store.txn([], [Put(KEYS.tick, b"x")]))
        self.heads.append((self.now_s, self.store.revision))
        with contextlib.suppress(Unavailable):
            self.loop.run_until_complete(self.hub.look())

    @rule(
        names=st.lists(st.sampled_from(NAMES[:2]), min_size=1, max_size=3),
        kind=st.sampled_from(["default", "default", "default", "strong", "head", "older"]),
        is_answered=st.booleans(),
    )
    def ask(self, names: list[AliasName], kind: str, is_answered: bool) -> None:
        for name in names:
            head = self.store.revision
            freshness = {
                "default": Freshness(),
                "strong": Freshness(strong=True),
                "head": Freshness(min_revision=head),
                "older": Freshness(min_revision=max(1, head - 2)),
            }[kind]
            task = self.loop.create_task(self.resolver.resolve(str(name), freshness=freshness))
            self.asked.append(_Asked(name, freshness, task, head, self.now_s))
            self.settle()
            while is_answered and self.store.reads:
                self.store.reads.pop().set()
                self.settle()

    @precondition(lambda self: self.store.reads)
    @rule(index=st.integers(0, 5))
    def answer(self, index: int) -> None:
        self.store.reads.pop(index % len(self.store.reads)).set()
        self.settle()

    def teardown(self) -> None:
        self.store.is_away = False
        while self.asked:
            while self.store.reads:
                self.store.reads.pop().set()
            self.settle()
        self.hub_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.hub_task)
        self.loop.close()


TestResolveMachine = ResolveMachine.TestCase
TestResolveMachine.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


async def _slow_store(num_keys: int) -> SlowStore:
    store = SlowStore()
    for number in range(num_keys):
        await store.txn([], [Put(f"k{number}".encode(), str(number).encode())])
    return store


async def _turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def _answer_all(store: SlowStore) -> None:
    while store.reads:
        store.reads.pop().set()
        await _turns()


async def test_reads_beyond_the_first_share_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_catalog.storage.gather._MAX_WAIT_S", 60.0)
    store = await _slow_store(300)
    reads = GatheredReads(store)
    tasks = [asyncio.create_task(reads.get([f"k{number}".encode()])) for number in range(300)]
    tasks += [asyncio.create_task(reads.get([b"k299", b"none"])) for _ in range(50)]
    await _turns()
    assert store.num_gets == 2
    await _answer_all(store)
    results = await asyncio.gather(*tasks)
    assert store.num_gets == 2 + 3
    for number, result in enumerate(results[:300]):
        (kv,) = result.values
        assert kv is not None
        assert kv.value == str(number).encode()
    assert all(result.values[0] is not None and result.values[1] is None for result in results[300:])


async def test_a_read_sees_what_was_written_before_it() -> None:
    store = await _slow_store(1)
    reads = GatheredReads(store)
    early = [asyncio.create_task(reads.get([b"k0"])) for _ in range(2)]
    await _turns()
    await store.txn([], [Put(b"k0", b"new")])
    late = [asyncio.create_task(reads.get([b"k0"])) for _ in range(3)]
    await _turns()
    await _answer_all(store)
    values = [[kv and kv.value for kv in (await task).values] for task in early + late]
    assert values == [[b"0"]] * 2 + [[b"new"]] * 3


async def test_reads_that_hang_do_not_hold_up_the_others() -> None:
    store = await _slow_store(3)
    reads = GatheredReads(store)
    hanging = [asyncio.create_task(reads.get([b"k0"])) for _ in range(2)]
    await _turns()
    store.is_slow = False
    async with asyncio.timeout(5):
        assert (await reads.get([b"k1"])).values[0] is not None
    await _answer_all(store)
    await asyncio.gather(*hanging)


async def test_one_caller_leaving_does_not_end_the_read_of_the_others() -> None:
    store = await _slow_store(3)
    reads = GatheredReads(store)
    tasks = []
    for number in range(5):
        with calls.inbound_call("ada", 0.0 if number == 2 else 60.0):
            tasks.append(asyncio.create_task(reads.get([b"k1"])))
    await _turns()
    tasks[2].cancel()
    await _answer_all(store)
    assert [task.cancelled() for task in tasks if await asyncio.wait([task])] == [False, False, True, False, False]


async def test_a_failed_read_is_told_to_all_who_share_it() -> None:
    store = await _slow_store(1)
    reads = GatheredReads(store)
    direct = [asyncio.create_task(reads.get([b"k0"])) for _ in range(2)]
    await _turns()
    store.is_away = True
    shared = [asyncio.create_task(reads.get([b"k0"])) for _ in range(3)]
    await _turns()
    await _answer_all(store)
    for result in await asyncio.gather(*shared, return_exceptions=True):
        assert isinstance(result, Unavailable)
    await asyncio.gather(*direct)
    assert all(isinstance(each, MintError) for each in await reads.get_each([[b"k0"], [b"k1"]]))


async def test_a_batch_is_read_in_few_transactions() -> None:
    store = SlowStore()
    store.is_slow = False
    names = [AliasName("acme", f"p{number}", "live") for number in range(500)]
    for name in names:
        await store.txn([], [Put(KEYS.alias(name), TABLES.codecs.alias.encode(alias(name, 7)))])
    hub = Hub(store, KEYS)
    resolver = Resolver(store, TABLES, AliasCache(KEYS, hub, max_entries=1000, staleness_s=STALENESS_S))
    wanted = [*map(str, names), str(names[0]), "tenants/acme/policies/none/aliases/live", "x"]
    answers = await resolver.resolve_batch(wanted)
    assert store.num_gets == 4
    assert all(isinstance(each, Resolution) and number_of(each) == 7 for each in answers[:501])
    assert [type(each).__name__ for each in answers[501:]] == ["NotFound", "InvalidArgument"]


async def test_the_cache_answers_without_the_store() -> None:
    store = SlowStore()
    store.is_slow = False
    await store.txn([], [Put(KEYS.alias(LIVE), TABLES.codecs.alias.encode(alias(LIVE, 1)))])
    hub = Hub(store, KEYS)
    cache = AliasCache(KEYS, hub, max_entries=10, staleness_s=STALENESS_S)
    hub.listen("aliases", cache)
    resolver = Resolver(store, TABLES, cache)
    task = asyncio.create_task(hub.run())
    await _turns()
    await hub.look()
    first = await resolver.resolve(str(LIVE))
    num_gets = store.num_gets
    assert await resolver.resolve(str(LIVE)) == first
    assert await resolver.resolve_batch([str(LIVE)]) == [first]
    assert store.num_gets == num_gets
    await resolver.resolve(str(LIVE), freshness=Freshness(strong=True))
    assert store.num_gets == num_gets + 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_the_hub_has_told_all_of_a_time_only_once_it_is_where_the_store_was_then() -> None:
    store, now_s = SlowStore(), 1000.0
    hub = Hub(store, KEYS, now_s=lambda: now_s)
    task = asyncio.create_task(hub.run())
    await _turns()
    await hub.look()
    assert hub.told_until_s == 1000.0
    await store.txn([], [Put(KEYS.alias(LIVE), b"x")])
    now_s = 1010.0
    await hub.look()
    now_s = 1020.0
    await store.txn([], [Put(KEYS.tick, b"x")])
    await hub.look()
    assert hub.told_until_s == 1000.0
    for told_until_s in (1010.0, 1020.0):
        store.num_told = 1
        store.moved.set()
        await _turns()
        await hub.look()
        assert hub.told_until_s == told_until_s
    store.is_lost = True
    await store.txn([], [Put(KEYS.tick, b"x")])
    store.moved.set()
    await _turns()
    await hub.look()
    assert hub.told_until_s == 1020.0
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_store_that_went_back_in_time_is_not_taken_for_one_that_was_told_of() -> None:
    store, now_s = SlowStore(), 1000.0
    await store.txn([], [Put(KEYS.tick, b"x")])
    hub = Hub(store, KEYS, now_s=lambda: now_s)
    task = asyncio.create_task(hub.run())
    await _turns()
    await hub.look()
    now_s, store.revision = 1010.0, 1
    await hub.look()
    assert hub.told_until_s == 1000.0
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
