from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from unit.catalog.catalog_lab import POLICY, TENANT, Lab

from mint_catalog.storage.changes import Changes, Event, EventType
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.store import Put, Revision, prefix_end
from mint_catalog.storage.watch import Hub
from mint_catalog.upkeep.loops import compact_history, follow, keep_ticking
from mint_core.errors import InvalidArgument, NotFound, RevisionCompacted
from mint_core.names import PolicyName, RunName


@contextlib.asynccontextmanager
async def _hub(lab: Lab, **options: int) -> AsyncIterator[Hub]:
    hub = Hub(lab.store, lab.keys, **options)
    task = asyncio.create_task(hub.run())
    while hub.position == 0:  # noqa: ASYNC110 - every turn of the loop matters here
        await asyncio.sleep(0)
    try:
        yield hub
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _put(lab: Lab, name: str) -> int:
    return (await lab.store.txn([], [Put(lab.keys.prefix + name.encode(), b"x")])).revision


async def _tick(lab: Lab) -> int:
    return await _put(lab, "tick")


async def _settled(lab: Lab, hub: Hub) -> None:
    while hub.position < lab.store.revision:  # noqa: ASYNC110 - every turn of the loop matters here
        await asyncio.sleep(0)


async def _take(stream: AsyncIterator[Revision], count: int, timeout_s: float = 5) -> list[Revision]:
    taken = []
    async with asyncio.timeout(timeout_s), contextlib.aclosing(stream):  # type: ignore[type-var]
        async for each in stream:
            taken.append(each)
            if len(taken) == count:
                break
    return taken


def _range(lab: Lab, family: str) -> tuple[bytes, bytes]:
    prefix = lab.keys.family(family)
    return prefix, prefix_end(prefix)


async def test_a_subscriber_gets_its_range_and_bookmarks() -> None:
    lab = Lab()
    async with _hub(lab) as hub:
        stream = hub.subscribe(*_range(lab, "aliases"), after=hub.position)
        taking = asyncio.create_task(_take(stream, 3))
        await asyncio.sleep(0.01)
        first = await _put(lab, "aliases/a")
        await _put(lab, "runs/r")
        tick = await _tick(lab)
        last = await _put(lab, "aliases/b")
        seen = await taking
    assert [(each.revision, len(each.changes)) for each in seen] == [(first, 1), (tick, 0), (last, 1)]


async def test_a_start_in_the_recent_past_is_answered_from_memory() -> None:
    lab = Lab()
    async with _hub(lab) as hub:
        revisions = [await _put(lab, f"aliases/{number}") for number in range(10)]
        await _settled(lab, hub)
        seen = await _take(hub.subscribe(*_range(lab, "aliases"), after=revisions[3]), 7)
        assert [each.revision for each in seen[:6]] == revisions[4:]
        assert seen[6] == Revision(hub.position, ())


async def test_a_start_long_ago_is_answered_from_history() -> None:
    lab = Lab()
    await lab.store.txn([], [Put(b"/mint/v1/aliases/first", b"x")])
    old = [await _put(lab, f"aliases/{number}") for number in range(300)]
    async with _hub(lab, queue_events=100) as hub:
        new = [await _put(lab, f"aliases/new{number}") for number in range(5)]
        await _settled(lab, hub)
        seen = await _take(hub.subscribe(*_range(lab, "aliases"), after=old[0] - 1), 305)
    assert [each.revision for each in seen if each.changes] == old + new


async def test_a_subscriber_that_falls_behind_misses_nothing() -> None:
    lab = Lab()
    async with _hub(lab, queue_events=100) as hub:
        stream = hub.subscribe(*_range(lab, "aliases"), after=hub.position)
        first = await _put(lab, "aliases/first")
        got = [await anext(stream)]
        rest = [await _put(lab, f"aliases/{number}") for number in range(1000)]
        await _settled(lab, hub)
        got += await _take(stream, 1000)
        while len([each for each in got if each.changes]) < 1001:
            got += await _take(stream, 1)
    assert [each.revision for each in got if each.changes] == [first, *rest]


async def test_a_compacted_start_says_list_again() -> None:
    lab = Lab()
    revisions = [await _put(lab, f"aliases/{number}") for number in range(10)]
    await lab.store.compact(revisions[5])
    async with _hub(lab) as hub:
        with pytest.raises(RevisionCompacted):
            await _take(hub.subscribe(*_range(lab, "aliases"), after=revisions[2]), 1)


async def test_a_hub_that_lost_history_tells_its_subscribers() -> None:
    lab = Lab()
    watch = lab.store.watch
    broken = asyncio.Event()

    async def failing(start: bytes, end: bytes, *, after: int) -> AsyncIterator[Revision]:
        stream = watch(start, end, after=after)
        if not broken.is_set():
            async for revision in stream:
                if revision.changes[0].key.endswith(b"lost"):
                    broken.set()
                    raise RevisionCompacted("gone")
                yield revision
        async for revision in stream:
            yield revision

    lab.store.watch = failing  # type: ignore[method-assign, assignment]
    async with _hub(lab) as hub:
        stream = hub.subscribe(*_range(lab, "aliases"), after=hub.position)
        await _put(lab, "aliases/a")
        assert (await anext(stream)).changes
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        await _put(lab, "aliases/lost")
        with pytest.raises(RevisionCompacted):
            await waiting
        seen = await _take(hub.subscribe(*_range(lab, "aliases"), after=lab.store.revision - 1), 1)
        assert seen


async def _events(stream: AsyncIterator[Event[object]], count: int) -> list[Event[object]]:
    return await _take(stream, count)  # type: ignore[arg-type, return-value]


async def test_policies_revisions_and_aliases_as_events() -> None:
    lab = Lab()
    async with _hub(lab) as hub:
        changes = Changes(lab.store, lab.tables, hub, lab.runs)
        start = lab.store.revision
        created = await lab.policy()
        await lab.policy(PolicyName("other", "tone"))
        await lab.publish("one")
        await lab.promote(1)
        alias = lab.move(1).name
        await lab.policies.delete(POLICY)
        await _settled(lab, hub)

        policies = await _events(changes.policies(TENANT, after=start), 4)
        assert [each.type for each in policies] == [EventType.PUT] * 3 + [EventType.DELETE]
        assert policies[0].record == created.record
        assert policies[0].catalog_revision == created.catalog_revision
        assert (policies[3].record, policies[3].name) == (None, POLICY)

        for parent in ("tenants/-", "tenants/acme", str(POLICY)):
            (revision,) = await _events(changes.revisions(parent, after=start), 1)
            assert (revision.type, str(revision.name)) == (EventType.PUT, f"{POLICY}/revisions/1")
            put, delete = await _events(changes.aliases(parent, after=start), 2)
            assert (put.type, put.name, delete.type, delete.name) == (EventType.PUT, alias, EventType.DELETE, alias)
        (bookmark,) = await _events(changes.aliases("tenants/other", after=start), 1)
        assert bookmark.type is EventType.BOOKMARK


async def test_a_watch_from_now_says_from_where() -> None:
    lab = Lab()
    async with _hub(lab) as hub:
        changes = Changes(lab.store, lab.tables, hub, lab.runs)
        (bookmark,) = await _events(changes.aliases("tenants/-", after=0), 1)
        assert bookmark == Event(EventType.BOOKMARK, lab.store.revision)
        for parent in ("", "tenants", "tenants/-/policies/x", "tenants/../x"):
            with pytest.raises(InvalidArgument):
                await _events(changes.aliases(parent, after=0), 1)
        with pytest.raises(InvalidArgument):
            await _events(changes.aliases("tenants/-", after=-1), 1)


async def test_a_run_is_watched_until_it_ends() -> None:
    lab = Lab()
    await lab.policy()
    await lab.run()
    async with _hub(lab) as hub:
        changes = Changes(lab.store, lab.tables, hub, lab.runs)
        states: list[str] = []

        async def watching() -> None:
            async for run in changes.run(RunName("acme", "r1")):
                states.append(run.state.name)

        task = asyncio.create_task(watching())
        await asyncio.sleep(0.01)
        await lab.claimed()
        await lab.runs.cancel(RunName("acme", "r1"), "")
        await lab.store.pass_time(31)
        await lab.queue.reap()
        await asyncio.wait_for(task, 5)
        assert states == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]
        with pytest.raises(NotFound):
            await anext(changes.run(RunName("acme", "none")))


async def test_one_of_several_catalogs_ticks() -> None:
    lab = Lab()
    async with _hub(lab) as hub, asyncio.timeout(5):
        tasks = [asyncio.create_task(keep_ticking(lab.store, lab.keys, hub, 0.05)) for _ in range(3)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        assert hub.tick_revision > 0
        assert 4 <= lab.store.num_txns <= 16, "three tickers write about as often as one"


async def test_followers_are_told() -> None:
    lab, signal = Lab(), Signal()
    async with _hub(lab) as hub:
        task = asyncio.create_task(follow(hub, lab.keys, ("leases", "queue"), signal.notify))
        await asyncio.sleep(0.01)
        seen = signal.count
        await _put(lab, "aliases/a")
        await _settled(lab, hub)
        assert not await signal.wait(seen, timeout_s=0.02)
        await _put(lab, "queue/b")
        assert await signal.wait(seen, timeout_s=1)
        assert await signal.wait(seen, timeout_s=0), "a notification that came earlier is not missed"
        task.cancel()


async def test_history_is_kept_and_then_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    time = [0.0]
    monkeypatch.setattr("mint_catalog.upkeep.loops.monotonic_s", lambda: time[0])
    compacted: list[tuple[float, int]] = []

    async def compact(revision: int) -> None:
        compacted.append((time[0], revision))

    lab.store.compact = compact  # type: ignore[method-assign]
    async with _hub(lab) as hub:
        positions: dict[float, int] = {}

        async def sleep(seconds: float) -> None:
            time[0] += seconds
            await _put(lab, f"aliases/{time[0]}")
            await _settled(lab, hub)
            positions[time[0]] = hub.position
            if time[0] > 10_000:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await compact_history(lab.store, hub, 3600, sleep)
    assert compacted
    assert all(positions[at - 3600] == revision for at, revision in compacted)
    assert compacted[0][0] >= 3660
