"""Single-flight, and what a flight's waiters claim for it."""

from __future__ import annotations

import asyncio

import pytest

from mint_core import calls
from mint_core.errors import NotFound
from mint_loader.gate import FairGate, GateLimits
from mint_loader.scheduler import Flight, SharedFlights


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Work:
    """Counts its runs and waits to be let go."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.remaining_s: float | None = -1.0

    async def __call__(self, flight: Flight[int]) -> int:
        self.num_runs += 1
        self.remaining_s = calls.remaining_s()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return self.num_runs


async def test_500_callers_share_one_run() -> None:
    flights: SharedFlights[int] = SharedFlights()
    work = Work()
    callers = [asyncio.ensure_future(flights.run("a", work, tenant="acme", priority=0)) for _ in range(500)]
    await settle()
    work.go.set()
    assert await asyncio.gather(*callers) == [1] * 500
    assert len(flights) == 0


async def test_a_cancelled_caller_cancels_nobody_else() -> None:
    flights: SharedFlights[int] = SharedFlights()
    work = Work()
    first, second = (asyncio.ensure_future(flights.run("a", work, tenant="acme", priority=0)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    work.go.set()
    assert await second == 1
    assert first.cancelled()


async def test_a_flight_that_nobody_waits_for_is_dropped_and_a_newcomer_starts_afresh() -> None:
    flights: SharedFlights[int] = SharedFlights()
    work = Work()
    only = asyncio.ensure_future(flights.run("a", work, tenant="acme", priority=0))
    await settle()
    only.cancel()
    await settle()
    assert len(flights) == 0
    work.go.set()
    assert await flights.run("a", work, tenant="acme", priority=0) == 2


async def test_a_flight_under_way_is_finished_for_the_next_caller() -> None:
    flights: SharedFlights[int] = SharedFlights()
    ended = asyncio.Event()

    async def work(flight: Flight[int]) -> int:
        flight.is_uninterruptible = True
        await asyncio.sleep(0.01)
        ended.set()
        return 1

    only = asyncio.ensure_future(flights.run("a", work, tenant="acme", priority=0))
    await settle()
    only.cancel()
    async with asyncio.timeout(1):
        await ended.wait()


async def test_a_failure_reaches_every_waiter_and_is_not_kept() -> None:
    flights: SharedFlights[int] = SharedFlights()
    work = Work()
    work.error = NotFound("gone")
    callers = [asyncio.ensure_future(flights.run("a", work, tenant="acme", priority=0)) for _ in range(3)]
    await settle()
    work.go.set()
    for caller in callers:
        with pytest.raises(NotFound, match="gone"):
            await caller
    work.error = None
    assert await flights.run("a", work, tenant="acme", priority=0) == 2


async def test_the_first_callers_deadline_is_not_the_flights() -> None:
    flights: SharedFlights[int] = SharedFlights()
    work = Work()
    work.go.set()
    with calls.inbound_call("ada", 0.5):
        await flights.run("a", work, tenant="acme", priority=0)
    assert work.remaining_s is None


async def test_the_gate_serves_higher_priority_first_and_equals_in_order() -> None:
    gate = FairGate(GateLimits(1), what="loads")
    flights: SharedFlights[int] = SharedFlights()
    order: list[str] = []
    release = asyncio.Event()

    def visitor(name: str, *, hold: bool = False):  # type: ignore[no-untyped-def]
        async def work(flight: Flight[int]) -> int:
            async with flight.turn(gate):
                order.append(name)
                if hold:
                    await release.wait()
            return 0

        return work

    tasks = [asyncio.ensure_future(flights.run("first", visitor("first", hold=True), tenant="acme", priority=0))]
    await settle()
    for name, priority in (("low1", 0), ("low2", 0), ("high", 5)):
        tasks.append(asyncio.ensure_future(flights.run(name, visitor(name), tenant="acme", priority=priority)))
    await settle()
    # A second, more urgent caller of low2 pulls it in front of everybody.
    tasks.append(asyncio.ensure_future(flights.run("low2", visitor("never"), tenant="acme", priority=9)))
    await settle()
    assert gate.num_queued == 3
    release.set()
    await asyncio.gather(*tasks)
    assert order == ["first", "low2", "high", "low1"]
    assert gate.num_queued == 0


async def test_a_second_tenants_claim_pulls_a_shared_flight_out_of_the_firsts_queue() -> None:
    gate = FairGate(GateLimits(1, burst=0.0), what="loads")
    inner: SharedFlights[int] = SharedFlights()
    outer: SharedFlights[int] = SharedFlights()
    order: list[str] = []
    release = asyncio.Event()

    def visitor(name: str):  # type: ignore[no-untyped-def]
        async def fetch(flight: Flight[int]) -> int:
            async with flight.turn(gate):
                order.append(name)
                await release.wait()
            return 0

        async def load(flight: Flight[int]) -> int:
            return await inner.run(name, fetch, tenant="greedy", priority=0, parent=flight)

        return load

    greedy = [
        asyncio.ensure_future(outer.run(name, visitor(name), tenant="greedy", priority=0))
        for name in ("a", "b", "c", "d", "e")
    ]
    await settle()
    modest = asyncio.ensure_future(outer.run("e", visitor("e"), tenant="modest", priority=0))
    await settle()
    assert [(each.tenant, each.num_queued) for each in gate.tenants()] == [("greedy", 4), ("modest", 1)]
    release.set()
    await asyncio.gather(*greedy, modest)
    assert order == ["a", "b", "e", "c", "d"] or order == ["a", "e", "b", "c", "d"]
    assert gate.num_queued == 0
    assert gate.num_running == 0
