"""Evaluations as records, and the runs that make them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, TENANT, Lab, digest_of, rollout

from mint_catalog.model.records import BlobRef, Evaluation, Fence, TrainingState
from mint_catalog.model.run_records import EvaluationRecipe, RunProgress, RunState
from mint_catalog.work.queue import Outcome
from mint_core.errors import AlreadyExists, InvalidArgument, LeaseHeld, LeaseLost, NotFound
from mint_core.names import EvaluationName, PolicyName, RunName

E1 = RunName("acme", "e1")


def _evaluation(evaluation: str = "e1", **changes: object) -> Evaluation:
    fields: dict[str, object] = {"revision": f"{POLICY}/revisions/1", "scorer": "exact", "metrics": {"score": 0.5}}
    return Evaluation(EvaluationName("acme", "tone", evaluation), **(fields | changes))  # type: ignore[arg-type]


async def test_an_evaluation_takes_its_revisions_digest() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    head = await lab.policies.get(POLICY)
    written = await lab.evaluations.create(_evaluation(), None)
    assert written.record.revision_digest == digest_of("one")
    assert await lab.evaluations.get(written.record.name) == written.record
    assert (await lab.policies.get(POLICY)) == head, "an evaluation leaves the head alone"
    with pytest.raises(AlreadyExists):
        await lab.evaluations.create(_evaluation(), None)
    await lab.evaluations.create(_evaluation("e2", revision=""), None)
    page = await lab.evaluations.list(POLICY, page_size=1, page_token="")
    rest = await lab.evaluations.list(POLICY, page_size=1, page_token=page.next_page_token)
    assert [each.name.evaluation for each in (*page.records, *rest.records)] == ["e1", "e2"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"metrics": {"score": float("nan")}}, InvalidArgument),
        ({"metrics": {"score": float("inf")}}, InvalidArgument),
        ({"metrics": {"Bad Key": 1.0}}, InvalidArgument),
        ({"revision": "tenants/acme/policies/other/revisions/1"}, InvalidArgument),
        ({"revision": f"{POLICY}/revisions/2"}, NotFound),
        ({"revision_digest": digest_of("two")}, InvalidArgument),
        ({"num_examples": -1}, InvalidArgument),
        ({"run": "r"}, InvalidArgument),
    ],
)
async def test_a_bad_evaluation_is_refused(changes: dict[str, object], error: type[Exception]) -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    with pytest.raises(error):
        await lab.evaluations.create(_evaluation(**changes), None)


async def test_an_evaluation_under_a_fence() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    held = await lab.leases.acquire(POLICY, "worker-1", 10)
    fence = Fence(str(POLICY), held.token)
    await lab.evaluations.create(_evaluation("e1"), fence)
    await lab.store.pass_time(11)
    with pytest.raises(LeaseLost):
        await lab.evaluations.create(_evaluation("e2"), fence)


async def test_evaluations_do_not_outlive_their_policy() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    name = (await lab.evaluations.create(_evaluation(), None)).record.name
    await lab.policies.delete(POLICY)
    with pytest.raises(NotFound):
        await lab.evaluations.get(name)
    await lab.policy()
    with pytest.raises(NotFound):
        await lab.evaluations.get(name)
    assert (await lab.evaluations.list(POLICY, page_size=0, page_token="")).records == []


async def _evaluating(*run_ids: str) -> tuple[Lab, Fence]:
    """A policy with one revision that is in training as r1, and evaluations that wait."""
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.run("r1")
    _, fence = await lab.claimed("trainer-1")
    for run_id in run_ids:
        await lab.evaluation(run_id)
    return lab, fence


def _state(step: int) -> TrainingState:
    blob = BlobRef(digest_of("w"), 1)
    return TrainingState(
        step=step, weights_key="tenants/acme/w", weights=blob, optimizer_key="tenants/acme/o", optimizer=blob
    )


async def test_a_policy_is_evaluated_while_it_is_trained() -> None:
    lab, training = await _evaluating("e1", "e2")
    await lab.run("r2")
    first, one = await lab.claimed("worker-1")
    second, two = await lab.claimed("worker-2")
    assert [first.run.name.run, second.run.name.run] == ["e1", "e2"]
    assert (one.resource, two.resource) == (str(first.run.name), str(second.run.name))
    assert await lab.claim("worker-3") is None, "the policy is in training, so r2 waits"
    assert sorted(str(resource) for resource, _ in await lab.leases.list(TENANT)) == [
        str(POLICY),
        str(E1),
        "tenants/acme/runs/e2",
    ]
    await lab.queue.commit_state(RunName("acme", "r1"), training, _state(5))
    await lab.rollouts.create(rollout(), training)
    await lab.publish("two", training)
    for name, fence in ((E1, one), (RunName("acme", "e2"), two)):
        await lab.queue.report(name, fence, RunProgress(1))
        wanted = _evaluation(name.run, run=str(name))
        await lab.evaluations.create(wanted, fence)
        done = await lab.queue.finish(name, fence, Outcome(RunState.SUCCEEDED))
        assert done.state is RunState.SUCCEEDED
    assert [str(resource) for resource, _ in await lab.leases.list(TENANT)] == [str(POLICY)]
    await lab.queue.finish(RunName("acme", "r1"), training, Outcome(RunState.SUCCEEDED))
    assert (await lab.claimed())[0].run.name.run == "r2"


async def test_rival_workers_claim_different_evaluations() -> None:
    lab, _ = await _evaluating(*(f"e{number}" for number in range(8)))
    claims = await asyncio.gather(*(lab.queue.claim(BASE, f"worker-{n}", 30, wait_s=2) for n in range(8)))
    assert len({claim.run.name for claim in claims if claim}) == 8


async def test_the_fence_of_an_evaluation_writes_nothing_else() -> None:
    lab, training = await _evaluating("e1")
    _, fence = await lab.claimed()
    before = await lab.policies.get(POLICY)
    for refused in (
        lab.queue.commit_state(E1, fence, _state(1)),
        lab.queue.commit_state(E1, training, _state(1)),
        lab.queue.commit_state(RunName("acme", "r1"), fence, _state(1)),
        lab.queue.report(E1, training, RunProgress(1)),
        lab.queue.finish(E1, fence, Outcome(RunState.SUCCEEDED, published_revision=f"{POLICY}/revisions/1")),
        lab.rollouts.create(rollout(), fence),
        lab.publish("two", fence),
    ):
        with pytest.raises(InvalidArgument):
            await refused
    assert await lab.policies.get(POLICY) == before


async def test_a_lost_evaluation_goes_back_to_the_queue_and_its_worker_is_refused() -> None:
    lab, _ = await _evaluating("e1")
    _, stale = await lab.claimed("worker-1")
    assert await lab.queue.reap() == 0
    await lab.store.pass_time(31)
    assert await lab.queue.reap() == 2, "the training and the evaluation"
    assert (await lab.runs.get(E1)).state is RunState.QUEUED
    await lab.leases.acquire(POLICY, "trainer-2", 30)
    claim, fence = await lab.claimed("worker-2")
    assert (claim.run.name, claim.run.num_attempts) == (E1, 2)
    for write in (
        lab.queue.report(E1, stale, RunProgress(1)),
        lab.queue.finish(E1, stale, Outcome(RunState.SUCCEEDED)),
        lab.evaluations.create(_evaluation(run=str(E1)), stale),
    ):
        with pytest.raises(LeaseLost):
            await write
    await lab.evaluations.create(_evaluation(run=str(E1)), fence)


async def test_a_repeated_finish_of_an_evaluation_answers_the_stored_run() -> None:
    lab, _ = await _evaluating("e1")
    _, first = await lab.claimed()
    retry = Outcome(RunState.FAILED, "UNAVAILABLE: no engine", retriable=True)
    requeued = await lab.queue.finish(E1, first, retry)
    assert requeued.state is RunState.QUEUED
    assert await lab.queue.finish(E1, first, retry) == requeued
    _, second = await lab.claimed()
    done = await lab.queue.finish(E1, second, Outcome(RunState.SUCCEEDED))
    assert await lab.queue.finish(E1, second, Outcome(RunState.SUCCEEDED)) == done


async def test_an_evaluation_that_is_leased_by_hand_waits() -> None:
    lab, _ = await _evaluating("e1")
    held = await lab.leases.acquire(E1, "by-hand-1", 30)
    assert await lab.claim() is None
    await lab.leases.release(E1, held.token)
    await lab.claimed()
    with pytest.raises(LeaseHeld):
        await lab.leases.acquire(E1, "by-hand-1", 30)


async def test_a_cancelled_evaluation_is_over() -> None:
    lab, _ = await _evaluating("e1", "e2")
    assert (await lab.runs.cancel(RunName("acme", "e2"), "")).state is RunState.CANCELLED
    _, fence = await lab.claimed()
    await lab.runs.cancel(E1, "")
    assert await lab.queue.report(E1, fence, RunProgress(1))
    assert (await lab.queue.finish(E1, fence, Outcome(RunState.CANCELLED))).state is RunState.CANCELLED
    assert await lab.claim() is None


async def test_what_a_run_recorded_is_answered_again() -> None:
    lab, _ = await _evaluating("e1")
    _, fence = await lab.claimed()
    wanted = _evaluation(run=str(E1))
    first = await lab.evaluations.create(wanted, fence)
    before = lab.store.revision
    assert (await lab.evaluations.create(wanted, fence)).record == first.record
    with pytest.raises(AlreadyExists):
        await lab.evaluations.create(replace(wanted, metrics={"score": 0.25}), fence)
    assert lab.store.revision == before
    await lab.queue.finish(E1, fence, Outcome(RunState.SUCCEEDED))
    assert (await lab.evaluations.create(wanted, fence)).record == first.record, "after the lease was given back, too"
    with pytest.raises(LeaseLost):
        await lab.evaluations.create(_evaluation("e9", run=str(E1)), fence)


async def test_an_evaluation_of_the_base_has_no_revision() -> None:
    lab = Lab()
    await lab.policy()
    data = await lab.blob("{}")
    await lab.run("e1", sft=None, evaluation=EvaluationRecipe(str(BASE), data, "exact_match"))
    _, fence = await lab.claimed()
    written = await lab.evaluations.create(_evaluation(revision="", run=str(E1)), fence)
    assert (written.record.revision, written.record.revision_digest) == ("", "")


async def test_a_runs_fence_records_its_own_evaluation_only() -> None:
    lab, training = await _evaluating("e1")
    other = PolicyName("acme", "other")
    await lab.policy(other)
    _, fence = await lab.claimed()
    for run in ("", "tenants/acme/runs/e2"):
        with pytest.raises(InvalidArgument) as caught:
            await lab.evaluations.create(_evaluation(run=run), fence)
        assert caught.value.field == "fence.resource"
    elsewhere = Evaluation(EvaluationName("acme", "other", "x"), run=str(E1))
    with pytest.raises(InvalidArgument) as caught:
        await lab.evaluations.create(elsewhere, fence)
    assert caught.value.field == "evaluation.run"
    await lab.policies.delete(POLICY)
    await lab.policy()
    with pytest.raises(InvalidArgument) as caught:
        await lab.evaluations.create(_evaluation(revision="", run=str(E1)), fence)
    assert caught.value.field == "evaluation.run"
    none = Fence("tenants/acme/runs/none", training.token)
    with pytest.raises(NotFound):
        await lab.evaluations.create(_evaluation(revision="", run=none.resource), none)
