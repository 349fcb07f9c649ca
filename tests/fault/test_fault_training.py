"""A training run survives the death of whoever takes part in it, and nobody without the lease can publish."""

import asyncio
from pathlib import Path

import pytest
from google.protobuf import duration_pb2

from mint_api.runtime.v1 import exporter_service_pb2, exporter_service_pb2_grpc, work_service_pb2, work_service_pb2_grpc
from mint_api.v1 import common_pb2, run_service_pb2
from mint_client import MintClient
from mint_core import errors
from mint_core.channel import call
from support.invariants import Invariants
from support.publishing import create_policy, write_sft_data
from support.stack import Stack

NUM_STEPS = 60


def recipe(data: common_pb2.BlobRef) -> run_service_pb2.SftRecipe:
    return run_service_pb2.SftRecipe(
        train_data=data,
        num_steps=NUM_STEPS,
        batch_size=4,
        seed=11,
        save_every_steps=10,
        optimizer=run_service_pb2.OptimizerConfig(learning_rate=2e-3, num_warmup_steps=5, max_grad_norm=1.0),
    )


async def start_run(stack: Stack, client: MintClient, work: Path) -> run_service_pb2.Run:
    policy = await create_policy(stack, client)
    data = await client.blobs.upload("acme", write_sft_data(work / "data.jsonl"))
    run = run_service_pb2.Run(policy=policy, sft=recipe(data), publish=True, promote_alias="live")
    return await client.runs.create("acme", run)


async def finish(client: MintClient, name: str) -> run_service_pb2.Run:
    async with asyncio.timeout(110):
        run = await client.runs.wait(name)
    assert run.state == run_service_pb2.RUN_STATE_SUCCEEDED, run.error
    return run


async def digest_of(client: MintClient, run: run_service_pb2.Run) -> str:
    return (await client.revisions.get(run.published_revision)).blob.digest


@pytest.fixture(scope="module")
def uninterrupted(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter that an undisturbed run makes."""

    async def train() -> str:
        async with stack.client() as client:
            queued = await start_run(stack, client, tmp_path_factory.mktemp("data"))
            return await digest_of(client, await finish(client, queued.name))

    return asyncio.run(train())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["runs", "trainer", "exporter", "catalog", "etcd"])
async def test_a_run_killed_in_mid_step_ends_with_the_same_bytes(
    stack: Stack, work: Path, uninterrupted: str, name: str
) -> None:
    async with stack.client() as client:
        queued = await start_run(stack, client, work)
        async for run in client.runs.watch(queued.name):
            if run.progress.step >= 17:
                break
        assert 17 <= run.progress.step < NUM_STEPS, "the run ended before it could be disturbed"
        pid = await stack.kill(name)
        await stack.wait_healthy(dead={name: pid})
        run = await finish(client, queued.name)
        assert await digest_of(client, run) == uninterrupted
        assert [r.number async for r in client.revisions.list(run.policy)] == [1]
        await Invariants(stack).check(client, [run.policy])


async def test_two_runs_of_one_recipe_make_the_same_bytes(stack: Stack, work: Path, uninterrupted: str) -> None:
    async with stack.client() as client:
        queued = await start_run(stack, client, work)
        assert await digest_of(client, await finish(client, queued.name)) == uninterrupted


async def test_a_worker_whose_lease_expired_publishes_nothing(stack: Stack, work: Path) -> None:
    async with stack.client() as client, stack.channel("catalog") as catalog, stack.channel("exporter") as exporter:
        queued = await start_run(stack, client, work)
        run = await finish(client, queued.name)
        policy = run.policy
        leases = work_service_pb2_grpc.WorkServiceStub(catalog)

        async def acquire(holder: str) -> work_service_pb2.Lease:
            request = work_service_pb2.AcquireLeaseRequest(
                resource=policy, holder=holder, ttl=duration_pb2.Duration(seconds=2)
            )
            return (await call(leases.AcquireLease, request)).lease

        slow = await acquire("worker-slow")
        with pytest.raises(errors.LeaseHeld):
            await acquire("worker-fast")
        assert (await acquire("worker-slow")).fence == slow.fence
        async with asyncio.timeout(30):
            while True:
                try:
                    fast = await acquire("worker-fast")
                    break
                except errors.LeaseHeld:
                    await asyncio.sleep(0.2)
        assert fast.fence.token > slow.fence.token

        before = await client.policies.get(policy)
        state = run.latest_training_state
        state.step += 1  # another step, so that the publication would be a new one
        request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=slow.fence)
        with pytest.raises(errors.LeaseLost):
            await call(exporter_service_pb2_grpc.ExporterServiceStub(exporter).Export, request)
        state.fence = slow.fence.token
        commit = work_service_pb2.CommitTrainingStateRequest(name=run.name, fence=slow.fence, state=state)
        with pytest.raises(errors.WrongState):  # the run has ended; one that goes on answers LEASE_LOST
            await call(leases.CommitTrainingState, commit)
        after = await client.policies.get(policy)
        assert (after.etag, after.next_revision_number) == (before.etag, before.next_revision_number)
        assert [r.number async for r in client.revisions.list(policy)] == [1]
        await call(leases.ReleaseLease, work_service_pb2.ReleaseLeaseRequest(fence=fast.fence))
