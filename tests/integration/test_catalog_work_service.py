"""What workers of runs write to a catalog over a real etcd, through the client that they use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from mint_api.v1 import common_pb2, evaluation_service_pb2, rollout_service_pb2, run_service_pb2
from mint_client import Endpoints, MintClient
from mint_client.runtime import WorkClient
from mint_core import errors
from support.catalog_rig import BASE, Rig, digest_of, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@dataclass(frozen=True, slots=True)
class Worker:
    """A policy with one revision, and the clients of a worker."""

    rig: Rig
    client: MintClient
    work: WorkClient
    policy: str

    async def claim(self, holder: str, *, ttl_s: float = 30, wait_s: float = 5) -> tuple[str, common_pb2.Fence]:
        """The claimed run's name and the fence of the claim."""
        claimed = await self.work.claim_run(holder, BASE, ttl_s=ttl_s, wait_s=wait_s)
        assert claimed is not None
        return claimed.run.name, claimed.lease.fence


@pytest.fixture
async def worker(etcd: EtcdServer) -> AsyncIterator[Worker]:
    async with (
        running_catalog(etcd) as rig,
        MintClient(Endpoints(catalog=rig.public_address)) as client,
        WorkClient(rig.runtime_address) as work,
    ):
        policy = await rig.policy()
        await rig.revision(policy, "one")
        yield Worker(rig, client, work, policy)


async def test_the_rollouts_and_steps_of_a_run(worker: Worker) -> None:
    client, policy = worker.client, worker.policy
    await worker.rig.run(policy, "r1")
    run, fence = await worker.claim("worker-0001")
    assert fence.resource == policy
    for step in range(1, 6):
        wanted = worker.rig.rollout(policy, f"r1-{step}", fence, run=run, step=step).rollout
        created = await client.rollouts.create(policy, f"r1-{step}", wanted, fence)
        assert created.revision_digest == digest_of("one")
        assert await client.rollouts.create(policy, f"r1-{step}", wanted, fence) == created
        assert await client.rollouts.get(created.name) == created
        figures = run_service_pb2.RunStep(step=step, loss=1.0 / step, metrics={"reward_mean": 0.1 * step})
        progress = run_service_pb2.RunProgress(step=step, num_steps=5)
        assert not await worker.work.report_run(run, fence, progress=progress, steps=[figures])
    with pytest.raises(errors.AlreadyExists):
        await client.rollouts.create(policy, "r1-5", wanted_with(wanted, reward_mean=0.75), fence)
    steps = [step async for step in client.runs.steps(run, page_size=2)]
    assert [(step.step, step.loss) for step in steps] == [(step, 1.0 / step) for step in range(1, 6)]
    assert all(step.HasField("time") for step in steps)
    ids = [rollout.name.rsplit("/", 1)[-1] async for rollout in client.rollouts.list(policy, run=run, page_size=2)]
    assert ids == [f"r1-{step}" for step in range(1, 6)]
    other = run.replace("runs/r1", "runs/r2")
    assert [rollout async for rollout in client.rollouts.list(policy, run=other)] == []
    await client.rollouts.delete(f"{policy}/rollouts/r1-1", fence)
    await client.rollouts.delete(f"{policy}/rollouts/r1-1", fence)
    with pytest.raises(errors.NotFound):
        await client.rollouts.get(f"{policy}/rollouts/r1-1")


def wanted_with(rollout: rollout_service_pb2.Rollout, *, reward_mean: float) -> rollout_service_pb2.Rollout:
    changed = rollout_service_pb2.Rollout()
    changed.CopyFrom(rollout)
    changed.reward_mean = reward_mean
    return changed


async def test_a_worker_that_slept_through_its_lease_writes_nothing(worker: Worker) -> None:
    client, policy = worker.client, worker.policy
    await worker.rig.run(policy, "r1")
    run, stale = await worker.claim("worker-0001", ttl_s=2)
    wanted = worker.rig.rollout(policy, "r1-1", stale, run=run).rollout
    known = await client.rollouts.create(policy, "r1-1", wanted, stale)
    again, fence = await worker.claim("worker-0002", wait_s=15)
    assert again == run
    assert fence.token > stale.token
    await worker.rig.blob(policy, "two")
    before = await client.policies.get(policy)
    second = worker.rig.rollout(policy, "r1-2", stale, run=run, step=2).rollout
    figures = run_service_pb2.RunStep(step=1, loss=9.0)
    for write in (
        client.rollouts.create(policy, "r1-2", second, stale),
        client.rollouts.delete(known.name, stale),
        worker.work.report_run(run, stale, steps=[figures]),
        worker.rig.revision(policy, "two", stale, run=run, step=1),
    ):
        with pytest.raises(errors.LeaseLost):
            await write
    assert await client.policies.get(policy) == before
    assert [rollout async for rollout in client.rollouts.list(policy)] == [known]
    assert [step async for step in client.runs.steps(run)] == []
    assert await client.rollouts.get(known.name) == known, "the successor goes on from what was persisted"
    await client.rollouts.create(policy, "r1-2", second, fence)


async def test_a_policy_is_evaluated_while_it_is_trained(worker: Worker) -> None:
    client, policy = worker.client, worker.policy
    await worker.rig.run(policy, "r1")
    run, training = await worker.claim("trainer-001")
    for run_id in ("e1", "e2"):
        await worker.rig.evaluation(policy, run_id)
    claims = await asyncio.gather(worker.claim("worker-0001"), worker.claim("worker-0002"))
    assert sorted(name.rsplit("/", 1)[-1] for name, _ in claims) == ["e1", "e2"]
    assert await worker.work.claim_run("worker-0003", BASE, ttl_s=30, wait_s=0.8) is None
    for name, fence in claims:
        assert fence.resource == name
        await worker.work.renew_lease(fence)
        evaluation = evaluation_service_pb2.Evaluation(
            revision=f"{policy}/revisions/1", run=name, num_examples=4, metrics={"score_mean": 0.75}
        )
        run_id = name.rsplit("/", 1)[-1]
        created = await client.evaluations.create(policy, run_id, evaluation, fence=fence)
        assert created.revision_digest == digest_of("one")
        assert await client.evaluations.create(policy, run_id, evaluation, fence=fence) == created
        assert await client.evaluations.get(created.name) == created
        with pytest.raises(errors.InvalidArgument):
            await worker.rig.revision(policy, "two", fence, run=name, step=1)
        with pytest.raises(errors.InvalidArgument):
            await client.rollouts.create(policy, "x", worker.rig.rollout(policy, "x", fence, run=name).rollout, fence)
        await worker.work.finish_run(name, fence, run_service_pb2.RUN_STATE_SUCCEEDED)
    names = [evaluation.name async for evaluation in client.evaluations.list(policy)]
    assert names == [f"{policy}/evaluations/e1", f"{policy}/evaluations/e2"]
    leases = await worker.work.list_leases(policy.split("/")[1])
    assert [lease.resource for lease in leases] == [policy]
    published = await worker.rig.revision(policy, "two", training, run=run, step=1)
    assert published.revision.number == 2


async def test_an_evaluation_whose_worker_is_gone_is_done_by_another(worker: Worker) -> None:
    await worker.rig.evaluation(worker.policy, "e1")
    run, stale = await worker.claim("worker-0001", ttl_s=2)
    again, fence = await worker.claim("worker-0002", wait_s=15)
    assert (again, fence.token > stale.token) == (run, True)
    evaluation = evaluation_service_pb2.Evaluation(run=run, metrics={"score_mean": 0.75})
    for write in (
        worker.client.evaluations.create(worker.policy, "e1", evaluation, fence=stale),
        worker.work.report_run(run, stale, progress=run_service_pb2.RunProgress(step=1)),
        worker.work.finish_run(run, stale, run_service_pb2.RUN_STATE_SUCCEEDED),
    ):
        with pytest.raises(errors.LeaseLost):
            await write
    await worker.client.evaluations.create(worker.policy, "e1", evaluation, fence=fence)
    ended = await worker.work.finish_run(run, fence, run_service_pb2.RUN_STATE_SUCCEEDED)
    assert ended.num_attempts == 2


async def test_an_evaluation_by_hand_needs_no_fence_and_its_name_is_taken_once(worker: Worker) -> None:
    client, policy = worker.client, worker.policy
    evaluation = evaluation_service_pb2.Evaluation(revision=f"{policy}/revisions/1", metrics={"score_mean": 0.5})
    created = await client.evaluations.create(policy, "by-hand", evaluation)
    assert [each async for each in client.evaluations.list(policy)] == [created]
    with pytest.raises(errors.AlreadyExists):
        await client.evaluations.create(policy, "by-hand", evaluation)
