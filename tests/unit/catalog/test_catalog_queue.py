from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, TENANT, Lab, digest_of

from mint_catalog.model.records import BlobRef, Fence, PolicyState, TrainingState
from mint_catalog.model.run_records import (
    Run,
    RunEvent,
    RunProgress,
    RunState,
    SftRecipe,
)
from mint_catalog.storage.store import Put
from mint_catalog.work.queue import Outcome
from mint_core.errors import (
    AlreadyExists,
    BlobMissing,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
    NotFound,
    WrongState,
)
from mint_core.names import PolicyName, RunName

R1 = RunName("acme", "r1")
OTHER = PolicyName("acme", "other")
DATA = BlobRef(digest_of("{}"))


async def _lab(**options: Any) -> Lab:
    lab = Lab(**options)
    await lab.policy()
    return lab


def _state(step: int, **changes: object) -> TrainingState:
    fields: dict[str, object] = {
        "step": step,
        "weights_key": "tenants/acme/states/w",
        "weights": BlobRef(digest_of("w"), 1),
        "optimizer_key": "tenants/acme/states/o",
        "optimizer": BlobRef(digest_of("o"), 1),
    }
    return TrainingState(**(fields | changes))  # type: ignore[arg-type]


async def _names(lab: Lab, family: str) -> list[str]:
    prefix = lab.keys.family(family)
    scanned = await lab.store.scan(prefix, prefix[:-1] + b"0", limit=1000)
    return [kv.key.decode().rsplit("/", 1)[-1] for kv in scanned.values]


async def test_a_run_waits_is_claimed_works_and_ends() -> None:
    lab = await _lab()
    queued = (await lab.run()).record
    assert queued.state is RunState.QUEUED
    assert queued.sft is not None
    assert queued.sft.train_data == BlobRef(DATA.digest, 2), "the true size is filled in"
    claim, fence = await lab.claimed()
    assert claim.run.state is RunState.RUNNING
    assert (claim.run.num_attempts, claim.run.worker) == (1, "worker-1")
    assert fence.token == claim.run.mod_revision
    assert await _names(lab, "queue") == []
    assert not await lab.queue.report(R1, fence, RunProgress(3, 10, 1.5), (RunEvent(kind="resumed"),))
    await lab.queue.commit_state(R1, fence, _state(5))
    run = await lab.runs.get(R1)
    assert run.progress is not None
    assert (run.progress.step, run.progress.loss) == (3, 1.5)
    head = await lab.policies.get(POLICY)
    assert head.latest_training_state == run.latest_training_state
    assert head.latest_training_state is not None
    assert (head.latest_training_state.run, head.latest_training_state.fence) == (str(R1), fence.token)
    done = await lab.queue.finish(R1, fence, Outcome(RunState.SUCCEEDED, published_revision=f"{POLICY}/revisions/1"))
    assert done.state is RunState.SUCCEEDED
    assert done.end_time is not None
    assert [event.kind for event in done.events] == ["queued", "claimed", "resumed", "succeeded"]
    assert await lab.leases.list(TENANT) == []
    assert await _names(lab, "claims") == []


async def test_progress_never_touches_the_head() -> None:
    lab = await _lab()
    await lab.run()
    _, fence = await lab.claimed()
    before = (await lab.policies.get(POLICY)).mod_revision
    await lab.queue.report(R1, fence, RunProgress(1), ())
    assert (await lab.policies.get(POLICY)).mod_revision == before


async def test_larger_priorities_go_first_then_older_runs() -> None:
    lab = await _lab()
    for number, priority in enumerate([0, 5, 0, -1, 5]):
        name = PolicyName("acme", f"p{number}")
        await lab.policy(name)
        await lab.run(f"r{number}", policy=name, priority=priority)
    order = []
    for _ in range(5):
        claim = await lab.claim()
        assert claim is not None
        order.append(claim.run.name.run)
    assert order == ["r1", "r4", "r0", "r2", "r3"]
    assert await lab.claim() is None


async def test_a_policy_is_trained_by_one_at_a_time() -> None:
    lab = await _lab()
    await lab.policy(OTHER)
    await lab.run("r1")
    await lab.run("r2")
    await lab.run("r3", policy=OTHER)
    first, fence = await lab.claimed("worker-1")
    second, _ = await lab.claimed("worker-2")
    assert [first.run.name.run, second.run.name.run] == ["r1", "r3"]
    assert await lab.claim("worker-3") is None
    await lab.queue.finish(R1, fence, Outcome(RunState.SUCCEEDED))
    third, _ = await lab.claimed("worker-3")
    assert third.run.name.run == "r2"


async def test_a_lease_by_hand_blocks_the_queue() -> None:
    lab = await _lab()
    held = await lab.leases.acquire(POLICY, "by-hand-1", 30)
    await lab.run()
    assert await lab.claim() is None
    await lab.leases.release(POLICY, held.token)
    assert await lab.claim() is not None


async def test_rival_workers_claim_different_runs() -> None:
    lab = await _lab()
    for number in range(8):
        name = PolicyName("acme", f"p{number}")
        await lab.policy(name)
        await lab.run(f"r{number}", policy=name)
    claims = await asyncio.gather(*(lab.queue.claim(BASE, f"worker-{n}", 30, wait_s=2) for n in range(8)))
    assert len({claim.run.name for claim in claims if claim}) == 8


async def test_a_claim_waits_for_a_run() -> None:
    lab = await _lab()
    waiting = asyncio.create_task(lab.queue.claim(BASE, "worker-1", 30, wait_s=5))
    await asyncio.sleep(0.01)
    await lab.run()
    lab.signal.notify()
    claim = await asyncio.wait_for(waiting, 0.9)
    assert claim is not None
    assert await lab.queue.claim(BASE, "worker-1", 30, wait_s=0.01) is None


async def test_a_lost_claim_goes_back_to_the_queue_and_its_worker_is_refused() -> None:
    lab = await _lab()
    await lab.run()
    _, stale = await lab.claimed("worker-1")
    await lab.queue.commit_state(R1, stale, _state(5))
    assert await lab.queue.reap() == 0
    await lab.store.pass_time(31)
    assert await lab.queue.reap() == 1
    run = await lab.runs.get(R1)
    assert (run.state, run.worker) == (RunState.QUEUED, "")
    assert run.events[-1].kind == "requeued"
    claim, fence = await lab.claimed("worker-2")
    assert claim.run.num_attempts == 2
    assert claim.run.latest_training_state is not None
    assert claim.run.latest_training_state.step == 5
    before = lab.store.revision
    for write in (
        lab.queue.report(R1, stale, RunProgress(9), ()),
        lab.queue.commit_state(R1, stale, _state(10)),
        lab.queue.finish(R1, stale, Outcome(RunState.SUCCEEDED)),
        lab.publish("stale", stale),
    ):
        with pytest.raises(LeaseLost):
            await write
    assert lab.store.revision == before + 2, "nothing but the blob's two records was written"
    await lab.queue.report(R1, fence, RunProgress(9), ())


async def test_a_fence_of_a_lease_acquired_again_is_not_the_claim() -> None:
    lab = await _lab()
    await lab.run()
    await lab.claimed("worker-1")
    await lab.store.pass_time(31)
    again = await lab.leases.acquire(POLICY, "worker-1", 30)
    with pytest.raises(LeaseLost):
        await lab.queue.report(R1, Fence(str(POLICY), again.token), RunProgress(1), ())
    assert await lab.queue.reap() == 1


async def test_attempts_are_used_up() -> None:
    lab = await _lab(max_attempts=2)
    await lab.run()
    for attempt in (1, 2):
        claim, fence = await lab.claimed(f"worker-{attempt}")
        assert claim.run.num_attempts == attempt
        run = await lab.queue.finish(R1, fence, Outcome(RunState.FAILED, "UNAVAILABLE: no trainer", retriable=True))
        assert run.state is (RunState.QUEUED if attempt == 1 else RunState.FAILED)
    assert run.error == "UNAVAILABLE: no trainer (attempt 2 of 2)"
    assert await lab.claim() is None
    assert await lab.leases.list(TENANT) == []


async def test_a_failure_that_a_retry_would_not_mend_ends_it() -> None:
    lab = await _lab()
    await lab.run()
    _, fence = await lab.claimed()
    run = await lab.queue.finish(R1, fence, Outcome(RunState.FAILED, "INVALID_FIELD: line 3"))
    assert (run.state, run.error) == (RunState.FAILED, "INVALID_FIELD: line 3")
    with pytest.raises(WrongState):
        await lab.queue.report(R1, fence, RunProgress(1), ())


async def test_a_repeated_finish_answers_the_stored_run() -> None:
    lab = await _lab()
    await lab.run()
    _, first = await lab.claimed()
    retry = Outcome(RunState.FAILED, "UNAVAILABLE: x", retriable=True)
    requeued = await lab.queue.finish(R1, first, retry)
    assert await lab.queue.finish(R1, first, retry) == requeued
    claim, second = await lab.claimed()
    assert (await lab.queue.finish(R1, first, retry)).num_attempts == claim.run.num_attempts == 2
    done = await lab.queue.finish(R1, second, Outcome(RunState.SUCCEEDED))
    before = lab.store.revision
    assert await lab.queue.finish(R1, second, Outcome(RunState.SUCCEEDED)) == done
    assert lab.store.revision == before
    with pytest.raises(WrongState):
        await lab.queue.finish(R1, first, retry)


async def test_each_attempt_starts_from_the_same_state() -> None:
    lab = await _lab()
    await lab.run("r0")
    _, fence = await lab.claimed()
    await lab.queue.commit_state(RunName("acme", "r0"), fence, _state(7))
    await lab.queue.finish(RunName("acme", "r0"), fence, Outcome(RunState.SUCCEEDED))
    await lab.run("r1", continue_from_latest=True)
    first, fence = await lab.claimed()
    assert first.run.initial_training_state is not None
    assert first.run.initial_training_state.step == 7
    await lab.queue.commit_state(R1, fence, _state(20))
    await lab.queue.finish(R1, fence, Outcome(RunState.FAILED, "x", retriable=True))
    second, _ = await lab.claimed()
    assert second.run.initial_training_state == first.run.initial_training_state


async def test_a_fresh_run_starts_from_nothing() -> None:
    lab = await _lab()
    await lab.run("r1")
    _, fence = await lab.claimed()
    await lab.queue.commit_state(R1, fence, _state(7))
    await lab.queue.finish(R1, fence, Outcome(RunState.SUCCEEDED))
    await lab.run("r2")
    claim, _ = await lab.claimed()
    assert claim.run.initial_training_state is None


async def test_cancelling() -> None:
    lab = await _lab()
    await lab.run("r1")
    await lab.run("r2")
    cancelled = await lab.runs.cancel(RunName("acme", "r2"), "not wanted")
    assert cancelled.state is RunState.CANCELLED
    assert await _names(lab, "queue") == ["r1"]
    _, fence = await lab.claimed()
    assert (await lab.runs.cancel(R1, "")).state is RunState.CANCELLING
    assert (await lab.runs.cancel(R1, "")).state is RunState.CANCELLING
    assert await lab.queue.report(R1, fence, RunProgress(1), ())
    assert (await lab.queue.finish(R1, fence, Outcome(RunState.CANCELLED))).state is RunState.CANCELLED
    with pytest.raises(WrongState):
        await lab.runs.cancel(R1, "")
    with pytest.raises(NotFound):
        await lab.runs.cancel(RunName("acme", "none"), "")


async def test_a_cancelled_run_whose_worker_is_gone_is_over() -> None:
    lab = await _lab()
    await lab.run()
    await lab.claimed()
    await lab.runs.cancel(R1, "")
    await lab.store.pass_time(31)
    assert await lab.queue.reap() == 1
    assert (await lab.runs.get(R1)).state is RunState.CANCELLED
    assert await lab.claim() is None


async def test_a_run_does_not_outlive_its_policy() -> None:
    lab = await _lab()
    await lab.run()
    await lab.policies.delete(POLICY)
    await lab.policy()
    assert await lab.claim() is None
    run = await lab.runs.get(R1)
    assert run.state is RunState.FAILED
    assert run.error.startswith("RESOURCE_NOT_FOUND")
    assert await _names(lab, "queue") == []


async def test_an_older_state_is_refused_and_a_repeated_one_is_not() -> None:
    lab = await _lab()
    await lab.run()
    _, fence = await lab.claimed()
    await lab.queue.commit_state(R1, fence, _state(10))
    await lab.queue.commit_state(R1, fence, _state(10))
    with pytest.raises(WrongState):
        await lab.queue.commit_state(R1, fence, _state(9))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"step": -1}, "state.step"),
        ({"run": "tenants/acme/runs/r2"}, "state.run"),
        ({"fence": 1}, "state.fence"),
        ({"weights_key": "tenants/other/states/w"}, "state.weights_key"),
        ({"optimizer_key": "tenants/acme/../x"}, "state.optimizer_key"),
        ({"weights": None}, "state.weights"),
        ({"optimizer": BlobRef("x")}, "state.optimizer.digest"),
    ],
)
async def test_a_bad_state_is_refused(changes: dict[str, object], field: str) -> None:
    lab = await _lab()
    await lab.run()
    _, fence = await lab.claimed()
    with pytest.raises(InvalidArgument) as caught:
        await lab.queue.commit_state(R1, fence, _state(**({"step": 1} | changes)))  # type: ignore[arg-type]
    assert caught.value.field == field


async def test_a_fence_belongs_to_its_policy() -> None:
    lab = await _lab()
    await lab.policy(OTHER)
    await lab.run("r1")
    await lab.run("r2", policy=OTHER)
    await lab.claimed()
    _, other = await lab.claimed()
    with pytest.raises(InvalidArgument) as caught:
        await lab.queue.report(R1, other, RunProgress(1), ())
    assert caught.value.field == "fence.resource"
    with pytest.raises(InvalidArgument):
        await lab.queue.finish(R1, other, Outcome(RunState.QUEUED))
    with pytest.raises(InvalidArgument):
        await lab.queue.finish(R1, other, Outcome(RunState.SUCCEEDED, published_revision=f"{POLICY}/revisions/1"))
    with pytest.raises(NotFound):
        await lab.queue.report(RunName("acme", "none"), other, RunProgress(1), ())


async def test_a_run_needs_its_data_policy_and_name() -> None:
    lab = await _lab()
    missing = SftRecipe(train_data=BlobRef(digest_of("absent")), num_steps=1)
    with pytest.raises(BlobMissing):
        await lab.run(sft=missing)
    with pytest.raises(NotFound):
        await lab.run(policy=OTHER)
    await lab.run("r1")
    with pytest.raises(AlreadyExists):
        await lab.run("r1")
    first, second = (await lab.run("")).record, (await lab.run("")).record
    assert first.name != second.name


async def test_a_paused_policy_takes_no_runs_and_its_queue_stands_still() -> None:
    lab = await _lab()
    await lab.run()
    ref, head = lab.tables.policy(POLICY), await lab.policies.get(POLICY)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(replace(head, state=PolicyState.PAUSED)))])
    with pytest.raises(WrongState):
        await lab.run("r2")
    assert await lab.claim() is None
    assert (await lab.runs.get(R1)).state is RunState.QUEUED
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(head))])
    assert await lab.claim() is not None


async def test_runs_are_listed_by_policy() -> None:
    lab = await _lab()
    await lab.policy(OTHER)
    for number in range(6):
        await lab.run(f"r{number}", policy=OTHER if number % 2 else POLICY)
    everything = await lab.runs.list(TENANT, page_size=0, page_token="")
    assert len(everything.records) == 6
    own = await lab.runs.list(TENANT, page_size=0, page_token="", policies=[str(OTHER)])
    assert sorted(run.name.run for run in own.records) == ["r1", "r3", "r5"]


async def test_events_are_bounded() -> None:
    lab = await _lab()
    await lab.run()
    _, fence = await lab.claimed()
    for number in range(0, 100, 10):
        events = tuple(RunEvent(kind=f"e{number + each}") for each in range(10))
        await lab.queue.report(R1, fence, None, events)
    run: Run = await lab.runs.get(R1)
    assert len(run.events) == 64
    assert run.events[-1].kind == "e99"


async def test_leases() -> None:
    lab = await _lab()
    first = await lab.leases.acquire(POLICY, "worker-1", 10)
    assert (await lab.leases.acquire(POLICY, "worker-1", 10)).token == first.token
    with pytest.raises(LeaseHeld):
        await lab.leases.acquire(POLICY, "worker-2", 10)
    await lab.store.pass_time(8)
    await lab.leases.renew(POLICY, first.token)
    await lab.store.pass_time(8)
    await lab.leases.renew(POLICY, first.token)
    with pytest.raises(LeaseLost):
        await lab.leases.renew(POLICY, first.token + 1)
    await lab.leases.release(POLICY, first.token + 1)
    assert [resource for resource, _ in await lab.leases.list(TENANT)] == [POLICY]
    await lab.store.pass_time(11)
    with pytest.raises(LeaseLost):
        await lab.leases.renew(POLICY, first.token)
    second = await lab.leases.acquire(POLICY, "worker-2", 10)
    assert second.token > first.token, "a later fence is a larger one"
    await lab.leases.release(POLICY, second.token)
    await lab.leases.release(POLICY, second.token)
    assert (await lab.leases.acquire(POLICY, "worker-1", 10)).token > second.token
    with pytest.raises(NotFound):
        await lab.leases.acquire(OTHER, "worker-1", 10)
    with pytest.raises(InvalidArgument):
        await lab.leases.acquire(POLICY, "short", 10)


async def test_rivals_for_a_lease() -> None:
    lab = await _lab()
    results = await asyncio.gather(
        *(lab.leases.acquire(POLICY, f"worker-{n}", 10) for n in range(10)), return_exceptions=True
    )
    assert sum(isinstance(result, LeaseHeld) for result in results) == 9


async def test_a_run_can_be_leased() -> None:
    lab = await _lab()
    await lab.run()
    held = await lab.leases.acquire(R1, "worker-1", 10)
    assert (R1, held) in [(resource, holder) for resource, holder in await lab.leases.list(TENANT)]
