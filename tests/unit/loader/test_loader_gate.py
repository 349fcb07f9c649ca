"""The fair gate: priority, turns of tenants, credit, limits, lent places, estimates."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.errors import ResourceExhausted
from mint_loader.gate import FairGate, GateLimits, Turn


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Rig:
    """Visitors that stay inside until they are let out, and the order in which they came in."""

    def __init__(self, limits: GateLimits) -> None:
        self.gate = FairGate(limits, what="loads")
        self.order: list[str] = []
        self.inside: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def come(self, name: str, tenant: str, priority: int = 0, cost: float = 1.0) -> asyncio.Task[None]:
        return self.claim(name, {tenant: priority}, cost)

    def claim(self, name: str, claims: Mapping[str, int], cost: float = 1.0) -> asyncio.Task[None]:
        async def visit() -> None:
            turn = self.gate.queue(claims, cost=cost)
            async with self.gate.inside(turn):
                self.order.append(name)
                self.inside[name] = asyncio.Event()
                try:
                    await self.inside[name].wait()
                finally:
                    del self.inside[name]

        self.tasks[name] = asyncio.ensure_future(visit())
        return self.tasks[name]

    async def next(self) -> None:
        """Let the one out that has been inside for longest."""
        next(iter(self.inside.values())).set()
        await settle()

    async def drain(self) -> None:
        await settle()
        while self.inside:
            await self.next()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_tenants_take_turns_and_one_with_little_to_do_does_not_wait_for_one_with_much() -> None:
    rig = Rig(GateLimits(1, burst=0.0))
    for number in range(20):
        rig.come(f"g{number}", "greedy")
    await settle()
    for number in range(3):
        rig.come(f"m{number}", "modest")
    await rig.drain()
    assert [name for name in rig.order if name[0] == "m"] == ["m0", "m1", "m2"]
    assert max(rig.order.index(f"m{number}") for number in range(3)) <= 6
    assert [name for name in rig.order if name[0] == "g"] == [f"g{number}" for number in range(20)]


async def test_who_was_idle_has_credit_but_only_so_much() -> None:
    rig = Rig(GateLimits(1, burst=4.0))
    for number in range(30):
        rig.come(f"g{number}", "greedy")
    await settle()
    for _ in range(9):
        await rig.next()
    begin = len(rig.order)
    for number in range(12):
        rig.come(f"m{number}", "modest")
    await rig.drain()
    after = "".join(name[0] for name in rig.order[begin:])
    assert after.startswith("mmmm")
    assert "mmmmmmm" not in after  # the credit is spent after about four, then they alternate
    assert after[:24].count("m") == 12


async def test_weights_are_shares() -> None:
    rig = Rig(GateLimits(1, burst=0.0, weights={"gold": 3.0}))
    rig.come("first", "nobody")
    await settle()
    for number in range(40):
        rig.come(f"s{number}", "silver")
        rig.come(f"g{number}", "gold")
    await rig.drain()
    first = rig.order[1:41]
    assert sum(name[0] == "g" for name in first) in (29, 30, 31)


async def test_what_costs_more_counts_for_more() -> None:
    rig = Rig(GateLimits(1, burst=0.0))
    rig.come("first", "nobody")
    await settle()
    for number in range(10):
        rig.come(f"l{number}", "large", cost=4.0)
        rig.come(f"s{number}", "small")
    await rig.drain()
    assert sum(name[0] == "l" for name in rig.order[1:11]) in (2, 3)


async def test_priority_goes_before_fairness() -> None:
    rig = Rig(GateLimits(1))
    rig.come("first", "greedy")
    await settle()
    for name, priority in (("low", 0), ("high", 5), ("lower", -1)):
        rig.come(name, "greedy", priority)
    rig.come("other", "modest", 0)
    await rig.drain()
    assert rig.order == ["first", "high", "other", "low", "lower"]


async def test_a_full_queue_refuses_with_a_time_to_come_back_and_the_cancelled_make_room() -> None:
    rig = Rig(GateLimits(1, max_queued=3, max_queued_per_tenant=2))
    for number in range(3):
        rig.come(f"g{number}", "greedy")
    await settle()
    with pytest.raises(ResourceExhausted, match="2 loads of tenant 'greedy' wait already") as caught:
        rig.gate.queue({"greedy": 9})
    assert caught.value.retry_after_s is not None
    rig.come("m0", "modest")
    await settle()
    with pytest.raises(ResourceExhausted, match="3 loads wait already"):
        rig.gate.queue({"third": 0})
    rig.tasks["g1"].cancel()
    await settle()
    rig.come("t0", "third")
    await settle()
    assert rig.gate.num_queued == 3
    assert [(each.tenant, each.num_queued, each.num_refused) for each in rig.gate.tenants()] == [
        ("greedy", 1, 1),
        ("modest", 1, 0),
        ("third", 1, 1),
    ]
    await rig.drain()
    assert sorted(rig.order) == ["g0", "g2", "m0", "t0"]
    assert (rig.gate.num_queued, rig.gate.num_running) == (0, 0)


async def test_a_place_granted_to_a_visitor_cancelled_in_that_moment_is_handed_on() -> None:
    rig = Rig(GateLimits(1))
    rig.come("first", "a")
    await settle()
    second, third = rig.come("second", "a"), rig.come("third", "a")
    await asyncio.sleep(0)
    rig.inside["first"].set()
    while not rig.tasks["first"].done():  # noqa: ASYNC110 - exactly one step at a time
        await asyncio.sleep(0)
    second.cancel()
    await rig.drain()
    assert third.done()
    assert rig.order in (["first", "third"], ["first", "second", "third"])
    assert rig.gate.num_running == 0


async def test_a_slow_visitor_lends_its_place_and_no_tenant_gets_them_all() -> None:
    rig = Rig(GateLimits(2, slow_after_s=0.02))
    for number in range(10):
        rig.come(f"h{number}", "hanging")
    async with asyncio.timeout(5):
        while len(rig.inside) < 4:  # noqa: ASYNC110 - twice the gate's places, and no more
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.06)
    assert len(rig.inside) == 4
    good = rig.come("good", "modest")
    await settle()
    assert "good" in rig.inside
    rig.inside["good"].set()
    await good
    await rig.drain()
    assert (rig.gate.num_queued, rig.gate.num_running) == (0, 0)


async def test_500_that_give_up_at_once_leave_nothing_behind() -> None:
    rig = Rig(GateLimits(2))
    for number in range(500):
        rig.come(f"g{number}", "greedy")
    rig.come("m", "modest")
    await settle()
    assert rig.gate.num_queued == 499
    for number in range(500):
        rig.tasks[f"g{number}"].cancel()
    await settle()
    assert rig.order == ["g0", "g1", "m"]
    assert rig.gate.num_queued == 0
    await rig.drain()
    assert (rig.gate.num_queued, rig.gate.num_running) == (0, 0)


async def test_the_expected_wait_grows_with_what_is_ahead_and_is_nothing_without_a_queue() -> None:
    rig = Rig(GateLimits(1, burst=0.0))
    assert rig.gate.expected_wait_s("acme", 0) == 0.0
    for number in range(4):
        rig.come(f"w{number}", "acme")
        await asyncio.sleep(0.01)
        await rig.next()
    mean_s = rig.gate.mean_s
    assert 0.005 < mean_s < 0.5
    rig.come("inside", "greedy")
    for number in range(50):
        rig.come(f"g{number}", "greedy")
    await settle()
    assert rig.gate.expected_wait_s("greedy", 0) == pytest.approx(51 * mean_s)
    assert rig.gate.expected_wait_s("modest", 0) == pytest.approx(2 * mean_s)
    assert rig.gate.expected_wait_s("modest", 1) == pytest.approx(mean_s)
    assert rig.gate.expected_wait_s("modest", -1) == pytest.approx(51 * mean_s)
    await rig.drain()
    assert rig.gate.expected_wait_s("greedy", 0) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(["come", "leave", "cancel", "claim", "wait"]), st.integers(0, 3), st.integers(-1, 1)),
        max_size=40,
    ),
)
def test_whatever_happens_nobody_is_lost_and_no_place_either(
    num_places: int, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        gate = FairGate(GateLimits(num_places, burst=2.0), what="loads")
        waiting: list[asyncio.Task[None]] = []
        turns: list[Turn] = []
        release: list[asyncio.Event] = []

        async def visit(claims: dict[str, int], cost: float) -> None:
            # As a flight does: nothing happens between the two.
            turn = gate.queue(claims, cost=cost)
            turns.append(turn)
            async with gate.inside(turn):
                release.append(asyncio.Event())
                await release[-1].wait()

        for action, tenant, priority in steps:
            if action == "come":
                waiting.append(asyncio.ensure_future(visit({f"t{tenant}": priority}, 1.0 + tenant)))
            elif action == "leave" and release:
                release.pop(tenant % len(release)).set()
            elif action == "cancel" and waiting:
                waiting[tenant % len(waiting)].cancel()
            elif action == "claim" and turns:
                gate.claim(turns[tenant % len(turns)], f"t{(tenant + 1) % 4}", priority)
            if action != "wait":  # several things may happen before anybody runs
                continue
            await settle()
            num_queued = sum(not turn.granted.done() for turn in turns)
            assert num_queued == gate.num_queued
            assert sum(not task.done() for task in waiting) == gate.num_running + num_queued
            assert gate.num_running <= num_places
            assert not num_queued or gate.num_running == num_places  # nobody waits beside a free place
        await settle()
        async with asyncio.timeout(10):
            while gate.num_running:
                for event in release:
                    event.set()
                await settle()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert gate.num_queued == 0
        assert all(not (each.num_queued or each.num_running) for each in gate.tenants())

    asyncio.run(run())
