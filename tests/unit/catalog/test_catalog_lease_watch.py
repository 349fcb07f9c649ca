from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from unit.catalog.catalog_lab import POLICY, Lab

from mint_catalog.storage.changes import Changes
from mint_catalog.storage.watch import Hub
from mint_core.errors import LeaseLost, Unavailable


@pytest.fixture
async def lab() -> AsyncIterator[tuple[Lab, Hub, Changes]]:
    lab = Lab()
    await lab.policy()
    hub = Hub(lab.store, lab.keys)
    task = asyncio.create_task(hub.run())
    yield lab, hub, Changes(lab.store, lab.tables, hub, lab.runs)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _end(watched: AsyncIterator[object]) -> None:
    async for _ in watched:
        raise AssertionError("told twice")


@pytest.mark.parametrize("way", ["released", "run out", "superseded"])
async def test_a_watch_tells_the_lease_and_then_its_loss(lab: tuple[Lab, Hub, Changes], way: str) -> None:
    made, _, changes = lab
    held = await made.leases.acquire(POLICY, "worker-1", 30)
    watched = changes.lease(POLICY, held.token)
    assert await anext(watched) == held
    ending = asyncio.create_task(_end(watched))
    await made.leases.renew(POLICY, held.token)
    await made.policies.get(POLICY)
    await asyncio.sleep(0.01)
    assert not ending.done(), "a renewal is no loss"
    if way == "run out":
        await made.store.pass_time(31)
    else:
        await made.leases.release(POLICY, held.token)
    if way == "superseded":
        await made.leases.acquire(POLICY, "worker-2", 30)
    with pytest.raises(LeaseLost, match=f"fence {held.token}"):
        await asyncio.wait_for(ending, 1)


async def test_a_watch_of_a_lease_that_is_lost_already_ends_at_once(lab: tuple[Lab, Hub, Changes]) -> None:
    made, _, changes = lab
    held = await made.leases.acquire(POLICY, "worker-1", 30)
    for token in (held.token - 1, held.token + 1, 0):
        with pytest.raises(LeaseLost):
            await anext(changes.lease(POLICY, token))


async def test_a_loss_that_was_compacted_away_is_told(lab: tuple[Lab, Hub, Changes]) -> None:
    made, hub, changes = lab
    held = await made.leases.acquire(POLICY, "worker-1", 30)
    watched = changes.lease(POLICY, held.token)
    await anext(watched)
    ending = asyncio.create_task(_end(watched))
    await asyncio.sleep(0.01)
    for subscriber in hub._subscribers:  # as when history was compacted under the hub
        subscriber.failed = True
        subscriber.wake.set()
    await asyncio.sleep(0.01)
    assert not ending.done()
    await made.leases.release(POLICY, held.token)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(ending, 1)


async def test_a_catalog_that_stops_says_nothing_about_the_lease(lab: tuple[Lab, Hub, Changes]) -> None:
    made, hub, changes = lab
    held = await made.leases.acquire(POLICY, "worker-1", 30)
    watched = changes.lease(POLICY, held.token)
    await anext(watched)
    ending = asyncio.create_task(_end(watched))
    await asyncio.sleep(0.01)
    hub.close()
    with pytest.raises(Unavailable, match="stopping"):
        await asyncio.wait_for(ending, 1)
