"""The watch loop over etcd, and its fan-out to many subscribers.

``watch`` is one stream over a range that survives restarts of etcd: it remembers the last whole revision it has
delivered and resumes after it. ``Hub`` holds one such stream over everything and gives each subscriber what lies in
its range. A subscriber that starts in the past, or falls behind the bounded queue, reads from etcd's history until it
has caught up with the hub, and is never cut off. The catalog's tick key lies in the watched range and changes once a
second: each tick tells a subscriber that nothing before it was missed (etcd's own progress notifications, asked for
by hand, are wrong before 3.4.31 and 3.5.13).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb

from mint_catalog.keys import Keys
from mint_catalog.store import Change, Revision, Store, prefix_end
from mint_core.errors import RevisionCompacted, Unavailable
from mint_core.log import get_logger

__all__ = ["Hub", "watch"]

_logger = get_logger(__name__)

_FIRST_BACKOFF_S: Final = 0.05
_LAST_BACKOFF_S: Final = 1.0
_DELETE: Final = 1
_METADATA: Final = (("hasleader", "true"),)


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
            for number, changes in groupby(events, key=lambda event: event.kv.mod_revision):
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
    queue: deque[Revision] = field(default_factory=deque)
    num_queued: int = 0
    overflowed: bool = False
    failed: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Hub:
    """One watch over all keys, shared by every subscriber of this process."""

    def __init__(self, store: Store, keys: Keys, *, queue_events: int = 10_000) -> None:
        self._store = store
        self._keys = keys
        self._queue_events = queue_events
        self._subscribers: set[_Subscriber] = set()
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
                for subscriber in self._subscribers:
                    subscriber.failed = True
                    subscriber.wake.set()
            except Unavailable:
                await asyncio.sleep(_LAST_BACKOFF_S)

    def _start_at(self, revision: int) -> None:
        self._recent.clear()
        self._num_recent = 0
        self._position = self._recent_after = revision
        self._signal()

    def _signal(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _deliver(self, revision: Revision) -> None:
        ticked = any(change.key == self._keys.tick for change in revision.changes)
        if ticked:
            self.tick_revision = revision.revision
        for subscriber in self._subscribers:
            self._offer(subscriber, revision, ticked)
        self._recent.append(revision)
        self._num_recent += len(revision.changes)
        while self._num_recent > self._queue_events:
            oldest = self._recent.popleft()
            self._num_recent -= len(oldest.changes)
            self._recent_after = oldest.revision
        self._position = revision.revision
        self._signal()

    def _offer(self, subscriber: _Subscriber, revision: Revision, ticked: bool) -> None:
        if subscriber.overflowed:
            return
        changes = _within(revision.changes, subscriber.start, subscriber.end)
        if not changes and not ticked:
            return
        if changes and subscriber.num_queued + len(changes) > self._queue_events:
            subscriber.overflowed = True
        else:
            if not changes and subscriber.queue and not subscriber.queue[-1].changes:
                subscriber.queue.pop()  # a newer bookmark replaces one that nobody has read
            subscriber.queue.append(Revision(revision.revision, changes))
            subscriber.num_queued += len(changes)
        subscriber.wake.set()

    async def subscribe(self, start: bytes, end: bytes, *, after: int | None) -> AsyncGenerator[Revision, None]:
        """Every revision after ``after`` (None: from now) that changes ``[start, end)``; without changes a bookmark.

        Raises :class:`RevisionCompacted`, and :class:`Unavailable` when the process stops.
        """
        while not self._closed:
            subscriber = _Subscriber(start, end)
            self._subscribers.add(subscriber)
            try:
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
            finally:
                self._subscribers.discard(subscriber)
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
