"""Shared work: one flight per key, however many wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

from mint_core import calls
from mint_core.errors import Unavailable
from mint_loader.gate import FairGate, Turn

__all__ = ["Flight", "SharedFlights"]

T = TypeVar("T")


class Flight(Generic[T]):
    """One piece of work and its waiters."""

    def __init__(self, claims: Mapping[str, int], label: str = "") -> None:
        self.label = label
        """What the one who started it says of it."""
        self.claims = dict(claims)
        """The tenants among its waiters, each with its highest priority; larger first."""
        self.num_waiters = 0
        self.task: asyncio.Task[T]
        self.is_moving = False
        """Whether bytes move for it, here or in the flight it waits for."""
        self.is_uninterruptible = False
        """Whether its own part has begun, which is finished even if nobody waits any more: the next caller profits."""
        self._child: Flight[Any] | None = None
        self._turn: tuple[FairGate, Turn] | None = None
        self._on_moving: list[Callable[[], None]] = []

    def claim(self, tenant: str, priority: int) -> None:
        """Let another waiter pull the flight, and whatever it waits for, forward."""
        known = self.claims.get(tenant)
        if known is not None and known >= priority:
            return
        self.claims[tenant] = priority
        if self._child is not None:
            self._child.claim(tenant, priority)
        if self._turn is not None:
            gate, turn = self._turn
            gate.claim(turn, tenant, priority)

    @contextlib.asynccontextmanager
    async def turn(self, gate: FairGate, *, cost: float = 1.0) -> AsyncIterator[None]:
        """Hold one of the gate's places inside the block; waits for it. Raises what :meth:`FairGate.queue` raises."""
        turn = gate.queue(self.claims, cost=cost)
        self._turn = (gate, turn)
        async with gate.inside(turn):
            self._turn = None
            yield

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

    def __contains__(self, key: Hashable) -> bool:
        return key in self._flights

    def label_of(self, key: Hashable) -> str | None:
        """The label of the flight of ``key``, None if there is none."""
        flight = self._flights.get(key)
        return None if flight is None else flight.label

    async def run(
        self,
        key: Hashable,
        work: Callable[[Flight[T]], Awaitable[T]],
        *,
        tenant: str,
        priority: int,
        label: str = "",
        parent: Flight[Any] | None = None,
        when_moving: Callable[[], None] | None = None,
    ) -> T:
        """Join the flight of ``key``, or start it with ``work``; returns or raises what it does.

        ``parent`` is the flight that waits for this one: its tenants, their priorities and its progress are tied to it.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(key, work, {tenant: priority}, label)
        flight.claim(tenant, priority)
        if parent is not None:
            parent._child = flight
            for each, level in parent.claims.items():
                flight.claim(each, level)
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

    def _start(
        self, key: Hashable, work: Callable[[Flight[T]], Awaitable[T]], claims: Mapping[str, int], label: str
    ) -> Flight[T]:
        flight: Flight[T] = Flight(claims, label)

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
