"""Claims, fences, rollouts and steps of runs over a real etcd and over its in-memory twin."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, TENANT, Lab, rollout

from mint_catalog.model.records import Evaluation, Fence
from mint_catalog.model.run_records import RunProgress, RunState, RunStep
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.work.queue import Outcome
from mint_core.errors import AlreadyExists, InvalidArgument, LeaseLost
from mint_core.names import EvaluationName, RunName
from support.etcd import EtcdServer, running_etcd

R1, E1, E2 = RunName("acme", "r1"), RunName("acme", "e1"), RunName("acme", "e2")
_prefixes = itertools.count()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(params=["memory", "etcd"])
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """A policy with one revision. Tests share one etcd, so each has keys of its own."""
    if request.param == "memory":
        made = Lab()
        await made.policy()
        await made.publish("one")
        yield made
        return
    server: EtcdServer = request.getfixturevalue("etcd")
    async with EtcdStore(server.settings()) as store:
        made = Lab(store, prefix=f"/w{next(_prefixes):04d}/")
        await made.policy()
        await made.publish("one")
        yield made


async def _superseded(lab: Lab) -> tuple[Fence, Fence]:
    """The fence of a claim whose lease has ended, and the one of the claim that took the run over."""
    _, stale = await lab.claimed("worker-1")
    await lab.leases.release(POLICY, stale.token)
    assert await lab.queue.reap() == 1
    _, fence = await lab.claimed("worker-2")
    return stale, fence


async def test_no_write_of_a_step_succeeds_under_a_superseded_fence(lab: Lab) -> None:
    await lab.run("r1")
    stale, fence = await _superseded(lab)
    known = (await lab.rollouts.create(rollout("r1-1"), fence)).record
    head = await lab.policies.get(POLICY)
    for write in (
        lab.rollouts.create(rollout("r1-2"), stale),
        lab.rollouts.delete(known.name, stale),
        lab.queue.report(R1, stale, RunProgress(1), steps=(RunStep(1, loss=9.0),)),
        lab.publish("two", stale, run=str(R1), step=1),
    ):
        with pytest.raises(LeaseLost):
            await write
    assert await lab.policies.get(POLICY) == head
    assert (await lab.rollouts.list(POLICY, page_size=0, page_token="")).records == [known]
    assert (await lab.runs.steps(R1, page_size=0, page_token="")).records == []


async def test_a_zombie_and_its_successor_race_for_one_rollout(lab: Lab) -> None:
    await lab.run("r1")
    stale, fence = await _superseded(lab)
    results = await asyncio.gather(
        *(
            lab.rollouts.create(rollout("r1-1", object_key=f"tenants/acme/rollouts/{number}"), each)
            for number, each in enumerate([stale, fence] * 5)
        ),
        return_exceptions=True,
    )
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert all(isinstance(result, LeaseLost) for result in results[::2])
    assert sum(isinstance(result, AlreadyExists) for result in results[1::2]) == 4


async def test_the_same_rollout_at_once_is_one(lab: Lab) -> None:
    fence = await lab.fence()
    written = await asyncio.gather(*(lab.rollouts.create(rollout(), fence) for _ in range(10)))
    assert len({(each.record.create_time, each.record.mod_revision) for each in written}) == 1


async def test_pages_of_rollouts_hold_still_under_writes(lab: Lab) -> None:
    fence = await lab.fence()
    for step in range(1, 8):
        await lab.rollouts.create(rollout(f"r1-{step}", step=step), fence)
    page = await lab.rollouts.list(POLICY, page_size=3, page_token="")
    await lab.rollouts.delete(page.records[-1].name, fence)
    await lab.rollouts.create(rollout("r1-9", step=9), fence)
    ids = [each.name.rollout for each in page.records]
    while page.next_page_token:
        page = await lab.rollouts.list(POLICY, page_size=3, page_token=page.next_page_token)
        ids += [each.name.rollout for each in page.records]
    assert ids == [f"r1-{step}" for step in range(1, 8)]


async def test_a_hundred_steps_fit_one_report(lab: Lab) -> None:
    await lab.run("r1")
    _, fence = await lab.claimed()
    metrics = {f"metric_{number}": float(number) for number in range(20)}
    steps = tuple(RunStep(step, loss=1.0 / step, metrics=metrics) for step in range(1, 101))
    await lab.queue.report(R1, fence, RunProgress(100), steps=steps)
    await lab.queue.report(R1, fence, None, steps=(RunStep(50, loss=0.0),))
    page = await lab.runs.steps(R1, page_size=60, page_token="")
    rest = await lab.runs.steps(R1, page_size=60, page_token=page.next_page_token)
    found = [*page.records, *rest.records]
    assert [each.step for each in found] == list(range(1, 101))
    assert [each.loss for each in found[48:51]] == [1.0 / 49, 0.0, 1.0 / 51]
    assert rest.next_page_token == ""


async def test_evaluations_are_claimed_beside_a_training(lab: Lab) -> None:
    await lab.run("r1")
    await lab.evaluation("e1")
    await lab.evaluation("e2")
    await lab.run("r2")
    claims = await asyncio.gather(*(lab.queue.claim(BASE, f"worker-{n}", 30, wait_s=1.0) for n in range(4)))
    assert sorted(claim.run.name.run for claim in claims if claim) == ["e1", "e2", "r1"]
    fences = {claim.run.name: Fence(str(claim.resource), claim.holder.token) for claim in claims if claim}
    assert {str(resource) for resource, _ in await lab.leases.list(TENANT)} == {str(POLICY), str(E1), str(E2)}
    for name in (E1, E2):
        wanted = Evaluation(
            EvaluationName("acme", "tone", name.run),
            f"{POLICY}/revisions/1",
            run=str(name),
            metrics={"score_mean": 1.0},
        )
        first = await lab.evaluations.create(wanted, fences[name])
        assert (await lab.evaluations.create(wanted, fences[name])).record == first.record
        with pytest.raises(InvalidArgument):
            await lab.rollouts.create(rollout(), fences[name])
        done = await lab.queue.finish(name, fences[name], Outcome(RunState.SUCCEEDED))
        assert await lab.queue.finish(name, fences[name], Outcome(RunState.SUCCEEDED)) == done
    await lab.rollouts.create(rollout(), fences[R1])
    assert {str(resource) for resource, _ in await lab.leases.list(TENANT)} == {str(POLICY)}


async def test_an_evaluation_whose_lease_has_ended_is_claimed_again(lab: Lab) -> None:
    await lab.evaluation("e1")
    _, stale = await lab.claimed("worker-1")
    assert await lab.queue.reap() == 0
    await lab.leases.release(E1, stale.token)
    assert await lab.queue.reap() == 1
    claim, fence = await lab.claimed("worker-2")
    assert (claim.run.name, claim.run.num_attempts) == (E1, 2)
    wanted = Evaluation(EvaluationName("acme", "tone", "e1"), run=str(E1))
    with pytest.raises(LeaseLost):
        await lab.evaluations.create(wanted, stale)
    with pytest.raises(LeaseLost):
        await lab.queue.report(E1, stale, RunProgress(1))
    await lab.evaluations.create(wanted, fence)
