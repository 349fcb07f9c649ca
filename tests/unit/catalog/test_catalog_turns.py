"""Whose run is next: fair among tenants, after a pause when it failed, and never lost or claimed twice."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.catalog.catalog_lab import BASE, POLICY, Lab

from mint_catalog.model.audit_codec import AuditCodec
from mint_catalog.model.records import BlobRef, Fence
from mint_catalog.model.run_records import Run, RunState, SftRecipe
from mint_catalog.storage.store import Put, prefix_end
from mint_catalog.work import retries, turns
from mint_catalog.work.queue import Claim, Outcome, RunQueue
from mint_catalog.work.retries import Retries
from mint_core.errors import MintError
from mint_core.names import PolicyName, RunName, TenantName

FAILED = Outcome(RunState.FAILED, "UNAVAILABLE: no trainer", retriable=True)
R1 = RunName("acme", "r1")


class Clock:
    """The wall clock, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        wall_s, now = turns.wall_s, retries.now
        monkeypatch.setattr(turns, "wall_s", lambda: wall_s() + self.ahead_s)
        monkeypatch.setattr(retries, "now", lambda: now() + timedelta(seconds=self.ahead_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def queue_runs(lab: Lab, tenant: str, *run_ids: str, priority: int = 0, policy: str = "") -> None:
    """Queue runs, each of a policy of its own unless one is named."""
    data = await lab.blob("{}", tenant)
    for run_id in run_ids:
        name = PolicyName(tenant, policy or run_id)
        if (await lab.store.get([lab.keys.policy(name)])).values[0] is None:
            await lab.policy(name)
        recipe = SftRecipe(train_data=BlobRef(data.digest), num_steps=10)
        wanted = Run(RunName(tenant, "ignored"), str(name), sft=recipe, priority=priority)
        await lab.runs.create(TenantName(tenant), run_id, wanted)


async def claim_names(lab: Lab, number: int) -> list[str]:
    claims = [await lab.claim() for _ in range(number)]
    return [f"{claim.run.name.tenant}/{claim.run.name.run}" for claim in claims if claim]


def fence_of(claim: Claim) -> Fence:
    return Fence(str(claim.resource), claim.holder.token)


async def keys_of(lab: Lab, family: str) -> list[str]:
    prefix = lab.keys.family(family)
    found = await lab.store.scan(prefix, prefix_end(prefix), limit=10_000)
    return [kv.key.decode() for kv in found.values]


async def test_a_tenant_that_queued_much_does_not_hold_up_one_that_queued_little() -> None:
    lab = Lab()
    await queue_runs(lab, "greedy", *(f"g{number:02d}" for number in range(20)))
    await queue_runs(lab, "modest", "m0")
    first = await lab.claim()
    assert first is not None
    assert str(first.run.name) == "tenants/greedy/runs/g00", "the oldest, as long as nobody has anything"
    assert await claim_names(lab, 3) == ["modest/m0", "greedy/g01", "greedy/g02"]
    await queue_runs(lab, "modest", "m1", "m2", "m3")
    await lab.queue.finish(first.run.name, fence_of(first), Outcome(RunState.SUCCEEDED))
    # greedy has two, modest one; both two, and greedy's is older; then modest again.
    assert await claim_names(lab, 3) == ["modest/m1", "greedy/g03", "modest/m2"]


async def test_priority_goes_before_fairness_and_blocked_runs_before_nobody() -> None:
    lab = Lab()
    await queue_runs(lab, "acme", "a1", "a2", priority=5, policy="tone")
    await queue_runs(lab, "acme", "a3", priority=5)
    await queue_runs(lab, "other", "o1")
    assert await claim_names(lab, 4) == ["acme/a1", "acme/a3", "other/o1"], "a2's policy is leased"


async def test_claims_of_another_base_do_not_count() -> None:
    lab = Lab()
    await queue_runs(lab, "acme", "a1")
    await queue_runs(lab, "other", "o1")
    await lab.store.txn([], [Put(lab.keys.claim(RunName("acme", f"x{n}")), b"p/big") for n in range(3)])
    assert await claim_names(lab, 2) == ["acme/a1", "other/o1"]


async def test_among_a_hundred_tenants_nobody_is_served_twice_before_all_are_once() -> None:
    lab = Lab()
    data = {f"t{number:03d}": await lab.blob("{}", f"t{number:03d}") for number in range(100)}
    for tenant in data:
        await lab.policy(PolicyName(tenant, "p"))
    for run_id in ("r1", "r2"):
        for tenant in data:
            recipe = SftRecipe(train_data=BlobRef(data[tenant].digest), num_steps=1)
            wanted = Run(RunName(tenant, "ignored"), f"tenants/{tenant}/policies/p", sft=recipe)
            await lab.runs.create(TenantName(tenant), run_id, wanted)
    served: Counter[str] = Counter()
    for _ in range(100):
        claim = await lab.claim()
        assert claim is not None
        served[claim.run.name.tenant] += 1
    assert len(served) == 100
    assert await lab.claim() is None, "every policy is leased"


async def test_lanes_beyond_the_first_five_hundred_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_MAX_LANES", 3)
    monkeypatch.setattr(turns, "_NUM_LANES", 2)
    lab = Lab()
    for each in range(12):
        for number in range(10):
            await queue_runs(lab, f"t{number}", f"r{each}", policy="p")
    served: Counter[str] = Counter()
    for _ in range(80):
        claim = await lab.claim()
        assert claim is not None
        served[claim.run.name.tenant] += 1
        await lab.queue.finish(claim.run.name, fence_of(claim), Outcome(RunState.SUCCEEDED))
    assert len(served) == 10


async def test_a_free_run_behind_a_thousand_blocked_ones_is_found() -> None:
    lab = Lab()
    await queue_runs(lab, "acme", "held", policy="held")
    assert await claim_names(lab, 1) == ["acme/held"]
    lane = lab.keys.lane(BASE, "acme", priority=0)
    for first in range(0, 2500, 100):
        names = [RunName("acme", f"b{number:04d}") for number in range(first, first + 100)]
        puts = [Put(lab.keys.queued(BASE, name, priority=0, create_time_us=1), b"held") for name in names]
        await lab.store.txn([], [*puts, Put(lane, b"")])
    await queue_runs(lab, "acme", "free")
    await queue_runs(lab, "other", "o1")
    assert await claim_names(lab, 1) == ["other/o1"]
    found = await claim_names(lab, 4)
    assert found == ["acme/free"], "each look goes a stretch further"


async def test_an_empty_lane_is_taken_away_unless_something_came() -> None:
    lab = Lab()
    await queue_runs(lab, "acme", "a1")
    await claim_names(lab, 1)
    assert len(await keys_of(lab, "lanes")) == 1
    assert await lab.claim() is None
    assert await keys_of(lab, "lanes") == []
    await queue_runs(lab, "acme", "a2")
    assert await claim_names(lab, 1) == ["acme/a2"]


def test_pauses_double_up_to_the_longest() -> None:
    doubling = Retries(Any, 5, 1.0, 300.0)  # type: ignore[arg-type]
    assert [doubling.pause_s(number) for number in (1, 2, 3, 9, 10, 10_000)] == [1, 2, 4, 256, 300, 300]
    assert Retries(Any, 5, 0.0, 300.0).pause_s(7) == 0  # type: ignore[arg-type]


async def test_a_failed_run_is_not_claimed_before_its_pause_is_over(clock: Clock) -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", "r1", "r2", policy="tone")
    for pause_s in (10.0, 20.0):
        claim = await lab.claim()
        assert claim is not None
        assert claim.run.not_before_time is None
        run = await lab.queue.finish(claim.run.name, fence_of(claim), FAILED)
        assert (run.state, run.name) == (RunState.QUEUED, R1)
        assert run.events[-1].message == f"UNAVAILABLE: no trainer; not claimed again for {pause_s:g} s"
        assert run.not_before_time is not None
        assert len(await keys_of(lab, "queue")) == len(await keys_of(lab, "delayed")) == 1
        clock.ahead_s += pause_s - 1
        assert 0 < await lab.queue._turns.wake(BASE) <= 1
        clock.ahead_s += 2
        assert await lab.queue._turns.wake(BASE) == math.inf
        assert await keys_of(lab, "delayed") == []
    # Back at its old place: before r2, which was queued later.
    assert await claim_names(lab, 1) == ["acme/r1"]


async def test_a_run_that_waits_holds_up_nobody(clock: Clock) -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", "r1", "r2", policy="tone")
    claim = await lab.claim()
    assert claim is not None
    await lab.queue.finish(R1, fence_of(claim), FAILED)
    assert await claim_names(lab, 2) == ["acme/r2"]


async def test_a_waiting_claim_takes_a_run_as_soon_as_its_pause_is_over() -> None:
    lab = Lab(backoff_s=0.2)
    await queue_runs(lab, "acme", "r1")
    claim = await lab.claim()
    assert claim is not None
    await lab.queue.finish(R1, fence_of(claim), FAILED)
    async with asyncio.timeout(0.8):
        again = await lab.queue.claim(BASE, "worker-2", 30, wait_s=5)
    assert again is not None
    assert (again.run.num_attempts, again.run.num_failures) == (2, 1)


async def test_a_clock_that_was_set_back_holds_no_run_up_for_long(clock: Clock) -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", "r1")
    claim = await lab.claim()
    assert claim is not None
    await lab.queue.finish(R1, fence_of(claim), FAILED)
    clock.ahead_s = -3600.0
    assert await claim_names(lab, 1) == ["acme/r1"]


async def test_many_pauses_that_end_at_once(clock: Clock) -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", *(f"r{number:02d}" for number in range(50)))
    claims = [await lab.claim() for _ in range(50)]
    for claim in claims:
        assert claim is not None
        await lab.queue.finish(claim.run.name, fence_of(claim), FAILED)
    clock.ahead_s = 11.0
    assert await lab.queue._turns.wake(BASE) == 0.0
    assert len(await claim_names(lab, 50)) == 50


async def test_nothing_of_a_tenant_that_is_being_erased_is_claimed_or_woken(clock: Clock) -> None:
    lab = Lab(backoff_s=10.0)
    for tenant in ("doomed", "other"):
        await queue_runs(lab, tenant, "r1")
        claim = await lab.claim()
        assert claim is not None
        await lab.queue.finish(claim.run.name, fence_of(claim), FAILED)
    await queue_runs(lab, "doomed", "r2", "r3")
    await queue_runs(lab, "other", "r2")
    assert await claim_names(lab, 1) == ["doomed/r2"]
    await lab.store.txn([], [Put(lab.keys.erasing("doomed"), b"")])
    await lab.store.pass_time(31)
    clock.ahead_s = 11.0
    assert await claim_names(lab, 3) == ["other/r1", "other/r2"]
    assert await keys_of(lab, "delayed") == []
    num_txns = lab.store.num_txns
    assert await lab.queue.claim(BASE, "worker-1", 30, wait_s=0.05) is None
    assert lab.store.num_txns - num_txns <= 1, "it is not tried again and again"
    assert await lab.queue.reap() == 0


async def test_a_lost_lease_is_a_failure_and_pauses_too() -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", "r1")
    await lab.claim()
    await lab.store.pass_time(31)
    assert await lab.queue.reap() == 1
    run = await lab.runs.get(R1)
    assert (run.num_failures, run.not_before_time is not None) == (1, True)
    assert await lab.claim() is None


async def test_a_cancelled_run_leaves_no_entry_behind() -> None:
    lab = Lab(backoff_s=10.0)
    await queue_runs(lab, "acme", "r1")
    claim = await lab.claim()
    assert claim is not None
    await lab.queue.finish(R1, fence_of(claim), FAILED)
    assert (await lab.runs.cancel(R1, "")).state is RunState.CANCELLED
    assert await keys_of(lab, "delayed") == []


async def test_a_run_given_back_neither_waits_nor_has_failed() -> None:
    lab = Lab(backoff_s=10.0, max_attempts=2)
    await queue_runs(lab, "acme", "r1")
    given_back = Outcome(RunState.QUEUED, "the worker was drained")
    for attempt in range(1, 6):
        claim = await lab.claim()
        assert claim is not None
        assert (claim.run.num_attempts, claim.run.num_failures) == (attempt, 0)
        run = await lab.queue.finish(R1, fence_of(claim), given_back)
        assert (run.state, run.worker) == (RunState.QUEUED, "")
        assert run.events[-1].message == "the worker was drained"
        assert await lab.queue.finish(R1, fence_of(claim), given_back) == run
    claim = await lab.claim()
    assert claim is not None
    await lab.runs.cancel(R1, "")
    assert (await lab.queue.finish(R1, fence_of(claim), given_back)).state is RunState.CANCELLED


async def test_a_claim_leaves_an_entry_in_the_audit_trail_and_a_report_none() -> None:
    lab = Lab()
    await queue_runs(lab, "acme", "r1")
    before = set(await keys_of(lab, "audit"))
    claim = await lab.claim()
    assert claim is not None
    (added,) = set(await keys_of(lab, "audit")) - before
    kv = (await lab.store.get([added.encode()])).values[0]
    assert kv is not None
    changed = {change.key: change for change in AuditCodec(lab.keys).decode(kv).changes}
    assert set(changed) == {lab.keys.run(R1), lab.keys.lease(claim.resource)}
    await lab.queue.report(R1, fence_of(claim), None)
    assert set(await keys_of(lab, "audit")) - before == {added}
    await lab.leases.release(POLICY if claim.resource == POLICY else claim.resource, claim.holder.token)
    assert await lab.queue.reap() == 1
    assert len(set(await keys_of(lab, "audit")) - before) == 3, "the release, and the claim taken back"


# Nothing is lost or claimed twice


@dataclass
class _Workers:
    """Two catalogs over one store, the runs that were made, and the claims that workers believe they hold."""

    lab: Lab
    other: RunQueue
    num_created: int = 0
    held: list[tuple[RunName, Fence]] = field(default_factory=list)
    tokens: Counter[int] = field(default_factory=Counter)

    async def do(self, kind: str, number: int, num_yields: int) -> None:
        for _ in range(num_yields):
            await asyncio.sleep(0)
        queue = (self.lab.queue, self.other)[number % 2]
        try:
            match kind:
                case "create":
                    self.num_created += 1
                    tenant = f"t{number % 3}"
                    await queue_runs(
                        self.lab, tenant, f"r{self.num_created}", priority=number % 2, policy=f"p{number % 2}"
                    )
                case "claim" | "claim, answer lost":
                    if kind != "claim":
                        self.lab.store.fail_next_txn = "after"
                    claim = await queue.claim(BASE, f"worker-{number}", 30, wait_s=0)
                    if claim is not None:
                        self.tokens[claim.holder.token] += 1
                        self.held.append((claim.run.name, fence_of(claim)))
                case "expire":
                    await self.lab.store.pass_time(31)
                    await queue.reap()
                case "reap":
                    await queue.reap()
                case "cancel" if self.num_created:
                    name = RunName(f"t{number % 3}", f"r{1 + number % self.num_created}")
                    await self.lab.runs.cancel(name, "")
                case "retry" if self.num_created:
                    name = RunName(f"t{number % 3}", f"r{1 + number % self.num_created}")
                    await self.lab.runs.retry(name, "", "ada")
                case "finish" | "fail" | "give back" if self.held:
                    name, fence = self.held.pop(number % len(self.held))
                    outcomes = {"finish": Outcome(RunState.SUCCEEDED), "fail": FAILED}
                    await queue.finish(name, fence, outcomes.get(kind, Outcome(RunState.QUEUED)))
        except MintError:
            pass

    async def check(self) -> None:
        """At rest: a queued run has one entry, a claimed one has one claim, and no entry is of another run."""
        entries = Counter(
            self.lab.keys.run_name(key.encode())
            for key in [*await keys_of(self.lab, "queue"), *await keys_of(self.lab, "delayed")]
        )
        claims = {self.lab.keys.run_name(key.encode()) for key in await keys_of(self.lab, "claims")}
        prefix = self.lab.keys.family("runs")
        found = (await self.lab.store.scan(prefix, prefix_end(prefix), limit=10_000)).values
        runs = [self.lab.tables.codecs.run.decode(kv) for kv in found]
        assert entries == Counter(run.name for run in runs if run.state is RunState.QUEUED)
        assert claims == {run.name for run in runs if run.state.claimed}
        assert set(self.tokens.values()) <= {1}
        lanes = {key.split("lanes/")[1] for key in await keys_of(self.lab, "lanes")}
        used = {"/".join(key.split("queue/")[1].split("/")[:3]) for key in await keys_of(self.lab, "queue")}
        assert used <= lanes, "an entry in a lane that is not marked is never found"


KINDS = [
    *["create"] * 4,
    *["claim"] * 6,
    *["claim, answer lost", "expire", "reap", "cancel", "retry", "finish", "fail", "fail", "fail", "give back"],
]
STEP = st.tuples(st.sampled_from(KINDS), st.integers(0, 30), st.integers(0, 12))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batches=st.lists(st.lists(STEP, min_size=1, max_size=6), min_size=1, max_size=12),
    backoff_s=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_no_run_is_lost_or_claimed_twice(batches: list[list[tuple[str, int, int]]], backoff_s: float) -> None:
    async def body() -> None:
        lab = Lab(backoff_s=backoff_s)
        other = RunQueue(lab.store, lab.tables, lab.signal, max_attempts=3, backoff_s=backoff_s, backoff_max_s=300.0)
        workers = _Workers(lab, other)
        for batch in batches:
            await asyncio.gather(*(workers.do(*step) for step in batch))
            lab.store.fail_next_txn = ""
            await workers.check()
        await lab.store.pass_time(31)
        await lab.queue.reap()
        lab.queue._turns._longest_delay_s = 0.0  # whatever is delayed has waited long enough
        waiting = len(await keys_of(lab, "queue")) + len(await keys_of(lab, "delayed"))
        for _ in range(waiting):
            claim = await lab.claim()
            assert claim is not None
            await lab.queue.finish(claim.run.name, fence_of(claim), Outcome(RunState.SUCCEEDED))
        await workers.check()
        assert await keys_of(lab, "queue") == await keys_of(lab, "delayed") == await keys_of(lab, "claims") == []

    asyncio.run(body())
