"""The watch loop over etcd, and its fan-out to many subscribers.

``watch`` is one stream over a range that survives restarts of etcd: it remembers the last whole revision it has
delivered and resumes after it. ``Hub`` holds one such stream over everything and gives each subscriber what lies in
its range. A subscriber that starts in the past, or falls behind the bounded queue, reads from etcd's history until it
has caught up with the hub, and is never cut off. A listener of this process is called as the hub moves on, with
nothing in between. The catalog's tick key lies in the watched range and changes once a
second: each tick tells a subscriber that nothing before it was missed (etcd's own progress notifications, asked for
by hand, are wrong before 3.4.31 and 3.5.13).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb

from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import Change, Revision, Store, prefix_end
from mint_core import clock
from mint_core.errors import RevisionCompacted, Unavailable
from mint_core.log import get_logger

__all__ = ["Hub", "Listener", "watch"]

_logger = get_logger(__name__)

_FIRST_BACKOFF_S: Final = 0.05
_LAST_BACKOFF_S: Final = 1.0
_DELETE: Final = 1
_TICK: Final = b"tick"
_METADATA: Final = grpc.aio.Metadata(("hasleader", "true"))


def _compacted(after: int) -> RevisionCompacted:
    return RevisionCompacted(
        f"catalog revision {after + 1} was compacted away; list again and watch from the revision of that listing"
    )


def _change(event: Any) -> Change:
    kv = event.kv
    return Change(kv.key, kv.value, kv.create_revision, kv.mod_revision, event.type == _DELETE)


async def watch(stub: Any, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
    """Yield every revision of ``[start, end)`` after ``after``, in order, whole and once, over restarts of etcd.

    Raises :class:`RevisionCompacted` when the next revision to deliver is gone.
    """
    backoff_s = _FIRST_BACKOFF_S
    while True:
        try:
            async for revision in _stream(stub, start, end, after=after):
                after = revision.revision
                backoff_s = _FIRST_BACKOFF_S
                yield revision
        except grpc.aio.AioRpcError as error:
            _logger.info(
                "watch interrupted, resuming",
                extra={"fields": {"after": after, "code": error.code().name, "details": error.details()}},
            )
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)


async def _stream(stub: Any, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
    """One connection's worth of :func:`watch`. Ends, or raises ``AioRpcError``, when the connection does."""
    # Fragments keep a revision's worth of large values below gRPC's message limits.
    create = pb.WatchCreateRequest(key=start, range_end=end, start_revision=after + 1, fragment=True)
    done = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        yield pb.WatchRequest(create_request=create)
        await done.wait()

    stream = stub.Watch(requests(), metadata=_METADATA)
    try:
        events: list[Any] = []
        async for answer in stream:
            if answer.compact_revision > 0:
                raise _compacted(after)
            if answer.canceled:
                return
            events.extend(answer.events)
            if answer.fragment:
                continue
            # etcd never spreads a revision over two answers, only over the fragments of one.
            for number, changes in itertools.groupby(events, key=lambda event: event.kv.mod_revision):
                if number > after:
                    yield Revision(number, tuple(_change(event) for event in changes))
            events = []
    finally:
        done.set()
        stream.cancel()


@dataclass(eq=False, slots=True)
class _Subscriber:
    start: bytes
    end: bytes
    family: bytes | None
    """The one family that the range lies in, None if it spans several."""
    is_whole: bool
    """Whether it takes all of the family."""
    queue: deque[Revision] = field(default_factory=deque)
    num_queued: int = 0
    overflowed: bool = False
    failed: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Listener(Protocol):
    """Called by the hub itself: never behind it, and never by more than one step of the event loop."""

    def hear(self, changes: Sequence[Change]) -> None:
        """Changes of its family, of one revision; the hub's position moves in the same step. Must not raise."""
        ...

    def lost(self) -> None:
        """Changes were missed (history was compacted under the hub), or undone: etcd went back. Must not raise."""
        ...


class Hub:
    """One watch over all keys, shared by every subscriber of this process."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        *,
        queue_events: int = 10_000,
        now_s: Callable[[], float] = clock.boottime_s,
    ) -> None:
        self._store = store
        self._keys = keys
        self._now_s = now_s
        self._queue_events = queue_events
        self._subscribers: set[_Subscriber] = set()
        # By the family that a subscriber's range lies in: an import is millions of changes that hardly anybody wants.
        self._by_family: dict[bytes | None, list[_Subscriber]] = {}
        self._listeners: dict[bytes, list[Listener]] = {}
        self._told_until_s = float("-inf")
        self._head: tuple[float, int] | None = None
        self._position = 0
        # What was handed out lately, so that a subscriber that starts at a listing just made need not ask etcd.
        self._recent: deque[Revision] = deque()
        self._num_recent = 0
        self._recent_after = 0
        self._moved = asyncio.Event()
        self._closed = False
        self.tick_revision = 0
        """mod_revision of the last tick seen."""

    @property
    def position(self) -> int:
        """Every change up to this revision of the store has been handed out."""
        return self._position

    @property
    def told_until_s(self) -> float:
        """Everything written before this instant (of :func:`mint_core.clock.boottime_s`) has been handed out."""
        return self._told_until_s

    def listen(self, family: str, listener: Listener) -> None:
        """Tell ``listener`` of a family's changes from now on, for as long as the hub lives."""
        self._listeners.setdefault(family.encode(), []).append(listener)

    @property
    def closed(self) -> bool:
        """Whether the process is about to stop."""
        return self._closed

    def close(self) -> None:
        """End every subscription: the process is about to stop."""
        self._closed = True
        self._signal()
        for subscriber in self._subscribers:
            subscriber.wake.set()

    async def run(self) -> None:
        """Follow the store for ever; one task of the process."""
        while True:
            try:
                if self._position == 0:
                    self._start_at((await self._store.get([self._keys.tick])).revision)
                stream = self._store.watch(self._keys.prefix, prefix_end(self._keys.prefix), after=self._position)
                async with contextlib.aclosing(stream):
                    async for revision in stream:
                        self._deliver(revision)
            except RevisionCompacted:
                # Away for longer than history is kept: whoever follows must list again.
                _logger.warning("history was compacted under the watch", extra={"fields": {"after": self._position}})
                self._position = 0
                self._head, self._told_until_s = None, float("-inf")
                self._tell_lost()
                for subscriber in self._subscribers:
                    subscriber.failed = True
                    subscriber.wake.set()
            except Unavailable:
                await asyncio.sleep(_LAST_BACKOFF_S)

    async def keep_looking(self, interval_s: float) -> None:
        """Look once an interval, for ever; one task of the process."""
        while True:
            with contextlib.suppress(Unavailable):
                await self.look()
            await asyncio.sleep(interval_s)

    async def look(self) -> None:
        """Look where the store's head is, to know how far behind the hub is. Raises ``Unavailable``.

        What was written before a look lies at or below the head that it finds: once the hub has been there, it has
        told all of that, however late. The arrival of changes says less: after an outage they are old ones.
        """
        asked_at_s, position = self._now_s(), self._position
        revision = (await self._store.get([self._keys.tick])).revision
        if revision < position:
            _logger.error(
                "etcd has gone back in time, as if restored under a running catalog; restart the catalog",
                extra={"fields": {"position": position, "head": revision}},
            )
            self._tell_lost()
        elif self._head is None:
            self._head = (asked_at_s, revision)
            self._note_progress()

    def _tell_lost(self) -> None:
        for listener in itertools.chain.from_iterable(self._listeners.values()):
            listener.lost()

    def _note_progress(self) -> None:
        if self._head is not None and self._position >= self._head[1]:
            self._told_until_s = self._head[0]
            self._head = None

    def _start_at(self, revision: int) -> None:
        self._recent.clear()
        self._num_recent = 0
        self._position = self._recent_after = revision
        self._note_progress()
        self._signal()

    def _signal(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _deliver(self, revision: Revision) -> None:
        families = self._by_family_of(revision.changes)
        for family, changes in families.items():
            for listener in self._listeners.get(family, ()):
                listener.hear(changes)
            for subscriber in self._by_family.get(family, ()):
                self._offer(subscriber, revision.revision, changes)
        for subscriber in self._by_family.get(None, ()):
            self._offer(subscriber, revision.revision, revision.changes)
        if _TICK in families:
            self.tick_revision = revision.revision
            for subscriber in self._subscribers:
                self._bookmark(subscriber, revision.revision)
        self._recent.append(revision)
        self._num_recent += len(revision.changes)
        while self._num_recent > self._queue_events:
            oldest = self._recent.popleft()
            self._num_recent -= len(oldest.changes)
            self._recent_after = oldest.revision
        self._position = revision.revision
        self._note_progress()

    def _by_family_of(self, changes: Sequence[Change]) -> dict[bytes, list[Change]]:
        families: dict[bytes, list[Change]] = {}
        for change in changes:
            family = self._keys.family_of(change.key)
            if family in families:
                families[family].append(change)
            else:
                families[family] = [change]
        return families

    def _offer(self, subscriber: _Subscriber, revision: int, changes: Sequence[Change]) -> None:
        if subscriber.overflowed:
            return
        wanted = tuple(changes) if subscriber.is_whole else _within(changes, subscriber.start, subscriber.end)
        if not wanted:
            return
        if subscriber.num_queued + len(wanted) > self._queue_events:
            subscriber.overflowed = True
        else:
            subscriber.queue.append(Revision(revision, wanted))
            subscriber.num_queued += len(wanted)
        subscriber.wake.set()

    def _bookmark(self, subscriber: _Subscriber, revision: int) -> None:
        if subscriber.overflowed or (subscriber.queue and subscriber.queue[-1].revision == revision):
            return
        if subscriber.queue and not subscriber.queue[-1].changes:
            subscriber.queue.pop()  # a newer bookmark replaces one that nobody has read
        subscriber.queue.append(Revision(revision, ()))
        subscriber.wake.set()

    @contextlib.contextmanager
    def _subscribed(self, start: bytes, end: bytes) -> Iterator[_Subscriber]:
        prefix = self._keys.family(self._keys.family_of(start).decode())
        within = start >= prefix and end <= prefix_end(prefix)
        is_whole = (start, end) == (prefix, prefix_end(prefix))
        subscriber = _Subscriber(start, end, self._keys.family_of(start) if within else None, is_whole)
        self._subscribers.add(subscriber)
        self._by_family.setdefault(subscriber.family, []).append(subscriber)
        try:
            yield subscriber
        finally:
            self._subscribers.discard(subscriber)
            self._by_family[subscriber.family].remove(subscriber)

    async def subscribe(self, start: bytes, end: bytes, *, after: int | None) -> AsyncGenerator[Revision, None]:
        """Every revision after ``after`` (None: from now) that changes ``[start, end)``; without changes a bookmark.

        Raises :class:`RevisionCompacted`, and :class:`Unavailable` when the process stops.
        """
        while not self._closed:
            with self._subscribed(start, end) as subscriber:
                while self._position == 0 and not self._closed:
                    await self._moved.wait()
                if after is None:
                    after = self._position
                past = self._past(start, end, after=after)
                async with contextlib.aclosing(past):
                    async for revision in past:
                        after = revision.revision
                        yield revision
                async for revision in self._live(subscriber):
                    if revision.revision > after:
                        after = revision.revision
                        yield revision
                if subscriber.failed:
                    raise _compacted(after)
        raise Unavailable(
            "the catalog is stopping; watch again from the last catalog_revision received", retry_after_s=0.5
        )

    async def _past(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
        """What the hub has handed out already; ends with a bookmark at the hub's position."""
        until = self._position
        if after >= until:
            return
        if after < self._recent_after:
            history = self._history(start, end, after=after, until=until)
            async with contextlib.aclosing(history):
                async for revision in history:
                    yield revision
        else:
            for revision in list(self._recent):
                changes = _within(revision.changes, start, end)
                if after < revision.revision <= until and changes:
                    yield Revision(revision.revision, changes)
        yield Revision(until, ())

    async def _history(self, start: bytes, end: bytes, *, after: int, until: int) -> AsyncGenerator[Revision, None]:
        """What lies between ``after`` and ``until``, read from etcd."""
        stream = self._store.watch(self._keys.prefix, prefix_end(self._keys.prefix), after=after)
        async with contextlib.aclosing(stream):
            async for revision in stream:
                if revision.revision > until:
                    break
                changes = _within(revision.changes, start, end)
                if changes:
                    yield Revision(revision.revision, changes)
                if revision.revision == until:
                    break

    async def _live(self, subscriber: _Subscriber) -> AsyncGenerator[Revision, None]:
        """What the hub hands out; ends when the subscriber fell behind or history is gone."""
        while True:
            while subscriber.queue:
                revision = subscriber.queue.popleft()
                subscriber.num_queued -= len(revision.changes)
                yield revision
            if subscriber.overflowed or subscriber.failed or self._closed:
                return
            subscriber.wake.clear()
            await subscriber.wake.wait()


def _within(changes: Sequence[Change], start: bytes, end: bytes) -> tuple[Change, ...]:
    return tuple(change for change in changes if start <= change.key < end)
