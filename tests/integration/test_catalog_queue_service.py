"""Leases that are watched, and tenants that share the workers, over a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mint_api.v1 import run_service_pb2
from mint_client import Endpoints, MintClient
from mint_client.runtime import WorkClient
from mint_core import errors
from support.catalog_rig import BASE, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@dataclass(frozen=True, slots=True)
class Catalog:
    rig: Rig
    client: MintClient
    work: WorkClient

    async def claim(self, *, wait_s: float = 5.0) -> Any:
        claimed = await self.work.claim_run("worker-0001", BASE, ttl_s=30, wait_s=wait_s)
        assert claimed is not None
        return claimed

    async def fail(self, claimed: Any) -> run_service_pb2.Run:
        return await self.work.finish_run(
            claimed.run.name,
            claimed.lease.fence,
            run_service_pb2.RUN_STATE_FAILED,
            error="UNAVAILABLE: no trainer",
            retriable=True,
        )


@pytest.fixture
async def catalog(etcd: EtcdServer) -> AsyncIterator[Catalog]:
    changes: dict[str, Any] = {"max_run_attempts": 2, "run_retry_backoff_s": 0.5}
    async with (
        running_catalog(etcd, **changes) as rig,
        MintClient(Endpoints(catalog=rig.public_address)) as client,
        WorkClient(rig.runtime_address) as work,
    ):
        yield Catalog(rig, client, work)


async def _lost_after(watched: Any) -> float:
    """When the watch told of the loss."""
    with pytest.raises(errors.LeaseLost):
        await anext(watched)
    return time.monotonic()


async def test_holders_are_told_within_a_moment_that_their_lease_is_lost(catalog: Catalog) -> None:
    policy = await catalog.rig.policy()
    lease = await catalog.work.acquire_lease(policy, "worker-0001", ttl_s=30)
    watched = catalog.work.watch_lease(lease.fence)
    assert await anext(watched) == lease
    ending = asyncio.create_task(_lost_after(watched))
    await catalog.work.renew_lease(lease.fence)
    await asyncio.sleep(0.3)
    assert not ending.done()
    released = time.monotonic()
    await catalog.work.release_lease(lease.fence)
    assert await asyncio.wait_for(ending, 5) - released < 1.0
    with pytest.raises(errors.LeaseLost):
        await anext(catalog.work.watch_lease(lease.fence))
    short = await catalog.work.acquire_lease(policy, "worker-0002", ttl_s=2)
    watched = catalog.work.watch_lease(short.fence)
    await anext(watched)
    await asyncio.wait_for(_lost_after(watched), 8)


async def test_a_watched_lease_survives_a_restart_of_etcd() -> None:
    with running_etcd() as etcd:
        async with running_catalog(etcd) as rig, WorkClient(rig.runtime_address) as work:
            lease = await work.acquire_lease(await rig.policy(), "worker-0001", ttl_s=60)
            watched = work.watch_lease(lease.fence)
            await anext(watched)
            ending = asyncio.create_task(_lost_after(watched))
            etcd.kill()
            await asyncio.to_thread(etcd.start)
            async with asyncio.timeout(15):
                while True:
                    try:
                        assert (await work.renew_lease(lease.fence)).fence == lease.fence
                        break
                    except errors.Unavailable:
                        await asyncio.sleep(0.1)
            assert not ending.done(), "that etcd was away is no loss"
            await work.release_lease(lease.fence)
            await asyncio.wait_for(ending, 10)


async def test_a_draining_catalog_says_nothing_about_the_lease(etcd: EtcdServer) -> None:
    async with contextlib.AsyncExitStack() as clients:
        async with running_catalog(etcd) as rig:
            work = await clients.enter_async_context(WorkClient(rig.runtime_address))
            lease = await work.acquire_lease(await rig.policy(), "worker-0001", ttl_s=30)
            watched = work.watch_lease(lease.fence)
            await anext(watched)
            ending = asyncio.ensure_future(anext(watched))
            await asyncio.sleep(0.1)
        with pytest.raises(errors.Unavailable):
            await ending


async def test_a_tenant_with_many_queued_runs_delays_another_by_what_runs(catalog: Catalog) -> None:
    greedy, modest = await catalog.rig.policy(), await catalog.rig.policy()
    for policy in (greedy, modest):
        await catalog.rig.revision(policy, "one")
    await asyncio.gather(*(catalog.rig.evaluation(greedy, f"g{number:03d}") for number in range(60)))
    first = await catalog.claim()
    assert first.run.policy == greedy
    await catalog.rig.evaluation(modest, "m0")
    second = await catalog.claim()
    assert second.run.policy == modest
    third = await catalog.claim()
    assert third.run.policy == greedy
    urgent = await catalog.rig.evaluation(greedy, "urgent", priority=7)
    assert (await catalog.claim()).run.name == urgent.name


async def test_a_run_that_keeps_failing_pauses_becomes_a_dead_letter_and_is_retried(catalog: Catalog) -> None:
    policy = await catalog.rig.policy()
    tenant = policy.split("/")[1]
    name = (await catalog.rig.run(policy, "r1", priority=9)).name
    await catalog.fail(await catalog.claim())
    failed_at = time.monotonic()
    queued = await catalog.client.runs.get(name)
    assert (queued.state, queued.num_failures) == (run_service_pb2.RUN_STATE_QUEUED, 1)
    assert queued.HasField("not_before_time")
    again = await catalog.claim()
    while again.run.name != name:  # what other tests have left in the queue
        again = await catalog.claim()
    assert time.monotonic() - failed_at >= 0.3
    dead = await catalog.fail(again)
    assert dead.dead_letter
    assert [run.name async for run in catalog.client.runs.list(tenant, dead_letter=True)] == [name]
    assert [run async for run in catalog.client.runs.list(tenant, state=run_service_pb2.RUN_STATE_QUEUED)] == []
    retried = await catalog.client.runs.retry(name, reason="the trainer is back")
    assert (retried.state, retried.dead_letter, retried.num_failures) == (run_service_pb2.RUN_STATE_QUEUED, False, 0)
    assert retried.events[-1].message.endswith(": the trainer is back")
    with pytest.raises(errors.WrongState):
        await catalog.client.runs.retry(name)
    assert (await catalog.claim()).run.name == name


async def test_a_run_given_back_is_claimed_at_once_and_has_not_failed(catalog: Catalog) -> None:
    policy = await catalog.rig.policy()
    name = (await catalog.rig.run(policy, "r1", priority=11)).name
    claimed = await catalog.claim()
    given_back = await catalog.work.finish_run(
        name, claimed.lease.fence, run_service_pb2.RUN_STATE_QUEUED, error="the worker was drained"
    )
    assert (given_back.num_failures, given_back.HasField("not_before_time")) == (0, False)
    again = await catalog.claim(wait_s=1.0)
    assert (again.run.name, again.run.num_attempts) == (name, 2)
