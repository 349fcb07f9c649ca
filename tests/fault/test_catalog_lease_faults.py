"""A holder that is stopped, outlives its lease and wakes up beside its successor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    common_pb2,
    evaluation_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    rollout_service_pb2,
    run_service_pb2,
)
from mint_core import errors
from support.catalog_rig import Rig, running_catalog
from support.children import dying_with_parent
from support.etcd import EtcdServer, running_etcd
from support.lease_holder import Worker

TTL_S = 2
TESTS = Path(__file__).parents[1]


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


@contextlib.contextmanager
def _holder(rig: Rig) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "support.lease_holder", rig.public_address, rig.runtime_address, str(TTL_S)]
    process = subprocess.Popen(
        dying_with_parent(command), stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def _line(process: subprocess.Popen[str]) -> Any:
    stdout = process.stdout
    assert stdout is not None
    return json.loads(await asyncio.wait_for(asyncio.to_thread(_read, stdout), 30))


def _read(stdout: IO[str]) -> str:
    return stdout.readline()


async def _everything(rig: Rig, policy: str, run: str) -> list[Any]:
    """All that the catalog has of a policy and its run, and whose lease it is."""
    tenant = policy.partition("/policies/")[0]
    return [
        await rig.call(rig.policies.GetPolicy, policy_service_pb2.GetPolicyRequest(name=policy)),
        await rig.call(rig.runs.GetRun, run_service_pb2.GetRunRequest(name=run)),
        (await rig.call(rig.runs.ListRunSteps, run_service_pb2.ListRunStepsRequest(name=run))).steps,
        (
            await rig.call(rig.revisions.ListRevisions, revision_service_pb2.ListRevisionsRequest(parent=policy))
        ).revisions,
        (await rig.call(rig.aliases.ListAliases, alias_service_pb2.ListAliasesRequest(parent=policy))).aliases,
        (await rig.call(rig.rollouts.ListRollouts, rollout_service_pb2.ListRolloutsRequest(parent=policy))).rollouts,
        (
            await rig.call(
                rig.evaluations.ListEvaluations, evaluation_service_pb2.ListEvaluationsRequest(parent=policy)
            )
        ).evaluations,
        (await rig.call(rig.work.ListLeases, work_service_pb2.ListLeasesRequest(parent=tenant))).leases,
    ]


@contextlib.asynccontextmanager
async def _watched(rig: Rig, fence: common_pb2.Fence) -> AsyncIterator[asyncio.Task[None]]:
    """Somebody who watches the lease, until it is told that it was lost."""

    async def watch() -> None:
        async for response in rig.stream(rig.work.WatchLease, work_service_pb2.WatchLeaseRequest(fence=fence)):
            assert response.lease.fence == fence

    task = asyncio.create_task(watch())
    try:
        yield task
    finally:
        task.cancel()


@pytest.mark.parametrize("successor_at_work", [True, False], ids=["beside its successor", "after its successor"])
async def test_a_stopped_holder_wakes_up_and_writes_nothing(etcd: EtcdServer, successor_at_work: bool) -> None:
    async with running_catalog(etcd, run_retry_backoff_s=0.1) as rig:
        policy = await rig.policy()
        run = (await rig.run(policy)).name
        with _holder(rig) as process:
            old = common_pb2.Fence(resource=policy, token=(await _line(process))["fence"])
            async with _watched(rig, old) as told:
                process.send_signal(signal.SIGSTOP)
                claim = await rig.claim("successor-0001", wait_s=15)
                assert claim.run.name == run
                with pytest.raises(errors.LeaseLost):
                    await asyncio.wait_for(told, 5)
            assert claim.lease.fence.token > old.token
            assert claim.run.latest_training_state.step == 1, "what the holder had saved is where its successor goes on"
            successor = Worker(rig, "successor-0001", claim)
            await successor.work_a_step(2)
            await rig.promote(policy, 2)
            if not successor_at_work:
                await successor.finish()
            before = await _everything(rig, policy, run)
            process.send_signal(signal.SIGCONT)
            answers = await _line(process)
            assert process.wait(10) == 0
        refused = dict.fromkeys(answers, "LEASE_LOST") | {"release": "OK"}  # there is nothing to give back
        if not successor_at_work:  # the run has ended, which says so first
            refused |= dict.fromkeys(["report", "commit state", "finish"], "WRONG_STATE")
        assert answers == refused
        assert await _everything(rig, policy, run) == before
        if successor_at_work:
            await successor.work_a_step(3)
            await successor.finish()


async def test_a_lease_that_ran_out_is_not_renewed(etcd: EtcdServer) -> None:
    """Nobody took it over: the fence is gone all the same."""
    async with running_catalog(etcd) as rig:
        policy = await rig.policy()
        fence = await rig.acquire(policy, "holder-0001", TTL_S)
        async with _watched(rig, fence) as told:
            with pytest.raises(errors.LeaseLost):
                await asyncio.wait_for(told, 15)
        with pytest.raises(errors.LeaseLost):
            await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=fence))
        with pytest.raises(errors.LeaseLost):
            await rig.revision(policy, "late", fence)
        again = await rig.acquire(policy, "holder-0001", TTL_S)
        assert again.token > fence.token, "the same holder again is another one"
