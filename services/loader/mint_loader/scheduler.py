"""Shared and ordered work: one flight per key however many wait for it, and a gate that lets the most urgent through
first.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

from mint_core import calls
from mint_core.errors import ResourceExhausted, Unavailable

__all__ = ["Flight", "PriorityGate", "SharedFlights"]

T = TypeVar("T")


class Flight(Generic[T]):
    """One piece of work and its waiters."""

    def __init__(self, priority: int, label: str) -> None:
        self.label = label
        """What the one who started it says of it."""
        self.priority = priority
        """The highest among its waiters; larger first."""
        self.num_waiters = 0
        self.task: asyncio.Task[T]
        self.is_moving = False
        """Whether bytes move for it, here or in the flight it waits for."""
        self.is_uninterruptible = False
        """Whether its own part has begun, which is finished even if nobody waits any more: the next caller profits."""
        self._child: Flight[Any] | None = None
        self._turn: _Turn | None = None
        self._on_moving: list[Callable[[], None]] = []

    def raise_priority(self, priority: int) -> None:
        """Let a more urgent waiter pull the flight, and whatever it waits for, forward."""
        if priority <= self.priority:
            return
        self.priority = priority
        if self._child is not None:
            self._child.raise_priority(priority)
        if self._turn is not None:
            self._turn.raise_priority(priority)

    def when_moving(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` once bytes move; at once if they do."""
        if self.is_moving:
            tell()
        else:
            self._on_moving.append(tell)

    def mark_moving(self) -> None:
        self.is_moving = True
        waiting, self._on_moving = self._on_moving, []
        for tell in waiting:
            tell()


class SharedFlights(Generic[T]):
    """Single-flight: callers of one key share one task.

    The task belongs to nobody: a caller that is cancelled or out of time leaves it to the others. When the last one
    left, a flight still in a queue is dropped, one under way is finished. A failure is told to everybody who waited
    and not kept.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_moving(self) -> int:
        return sum(flight.is_moving for flight in self._flights.values())

    def label_of(self, key: Hashable) -> str | None:
        """The label of the flight of ``key``, None if there is none."""
        flight = self._flights.get(key)
        return None if flight is None else flight.label

    async def run(
        self,
        key: Hashable,
        work: Callable[[Flight[T]], Awaitable[T]],
        *,
        priority: int,
        label: str = "",
        parent: Flight[Any] | None = None,
        when_moving: Callable[[], None] | None = None,
    ) -> T:
        """Join the flight of ``key``, or start it with ``work``; returns or raises what it does.

        ``parent`` is the flight that waits for this one: its priority and progress are tied to it.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(key, work, priority, label)
        flight.raise_priority(priority)
        if parent is not None:
            parent._child = flight
            flight.raise_priority(parent.priority)
            flight.when_moving(parent.mark_moving)
        if when_moving is not None:
            flight.when_moving(when_moving)
        flight.num_waiters += 1
        try:
            # Unlike awaiting the task, wait() does not hand a cancellation of this caller on to it.
            await asyncio.wait([flight.task])
        finally:
            flight.num_waiters -= 1
            if parent is not None:
                parent._child = None
            if not flight.num_waiters and not flight.is_uninterruptible and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight)
        if flight.task.cancelled():
            raise Unavailable("the loader is shutting down; retry at another replica or in a moment")
        error = flight.task.exception()
        if error is not None:
            # One exception object serves all waiters; without this its traceback grows with each of them.
            raise error.with_traceback(None)
        return flight.task.result()

    async def close(self) -> None:
        """Cancel everything and wait for the end of it."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: Hashable, work: Callable[[Flight[T]], Awaitable[T]], priority: int, label: str) -> Flight[T]:
        flight: Flight[T] = Flight(priority, label)

        async def fly() -> T:
            # The first caller's deadline is not that of those who join later.
            with calls.inbound_call(calls.principal(), None):
                return await work(flight)

        flight.task = asyncio.get_running_loop().create_task(fly(), name=f"flight {key}")
        flight.task.add_done_callback(lambda task: self._land(key, flight, task))
        self._flights[key] = flight
        return flight

    def _land(self, key: Hashable, flight: Flight[T], task: asyncio.Task[T]) -> None:
        self._forget(key, flight)
        if not task.cancelled():
            task.exception()  # seen, so that a flight whose waiters all left is not reported as forgotten

    def _forget(self, key: Hashable, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Turn:
    """A place in a gate's queue."""

    def __init__(self, gate: PriorityGate, priority: int) -> None:
        self.priority = priority
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gate = gate

    def raise_priority(self, priority: int) -> None:
        if priority > self.priority and not self.granted.done():
            self.priority = priority
            self._gate._push(self)


class PriorityGate:
    """At most ``num_places`` flights inside; the others queue, larger priority first, then in order of arrival."""

    def __init__(self, num_places: int, *, max_queued: int, what: str) -> None:
        self._num_free = num_places
        self._max_queued = max_queued
        self._what = what
        self._heap: list[tuple[int, int, _Turn]] = []
        self._order = itertools.count()
        self._num_queued = 0

    @property
    def num_queued(self) -> int:
        return self._num_queued

    @contextlib.asynccontextmanager
    async def turn(self, flight: Flight[Any]) -> AsyncIterator[None]:
        """Wait for a place; raises :class:`ResourceExhausted` at once if the queue is full."""
        await self._enter(flight)
        try:
            yield
        finally:
            self._num_free += 1
            self._grant()

    async def _enter(self, flight: Flight[Any]) -> None:
        if self._num_free and not self._num_queued:
            self._num_free -= 1
            return
        if self._num_queued >= self._max_queued:
            raise ResourceExhausted(
                f"{self._num_queued} {self._what} wait already, which is the limit; retry later", retry_after_s=1.0
            )
        turn = _Turn(self, flight.priority)
        flight._turn = turn
        self._push(turn)
        self._num_queued += 1
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                self._num_free += 1  # granted and cancelled in the same moment: hand the place on
                self._grant()
            else:
                self._num_queued -= 1
            raise
        finally:
            flight._turn = None

    def _push(self, turn: _Turn) -> None:
        # A turn whose priority was raised is in the heap twice; the later, lower entry is skipped when it comes up.
        heapq.heappush(self._heap, (-turn.priority, next(self._order), turn))

    def _grant(self) -> None:
        while self._num_free and self._heap:
            _, _, turn = heapq.heappop(self._heap)
            if turn.granted.done():
                continue
            self._num_free -= 1
            self._num_queued -= 1
            turn.granted.set_result(None)
        if not self._num_queued:
            self._heap.clear()
