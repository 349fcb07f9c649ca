"""Resolve's cache over a real etcd: two catalogs, etcd killed, etcd away, history compacted under a stopped catalog."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.v1 import alias_service_pb2, common_pb2
from mint_catalog.storage.etcd import EtcdStore
from mint_core.errors import Unavailable
from support.catalog_rig import CatalogProcess, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd("--heartbeat-interval=100", "--election-timeout=500", in_memory=True) as server:
        yield server


async def _two_revisions(rig: Rig) -> str:
    """A policy with two revisions, the first one live."""
    policy = await rig.policy()
    await rig.revision(policy, "one")
    await rig.revision(policy, "two")
    await rig.promote(policy, 1)
    return policy


async def _number(rig: Rig, policy: str, timeout_s: float = 20.0, **consistency: Any) -> int:
    request = alias_service_pb2.ResolveRequest(name=f"{policy}/aliases/live")
    request.consistency.CopyFrom(common_pb2.Consistency(**consistency))
    resolution = (await rig.call(rig.aliases.Resolve, request, timeout_s)).resolution
    assert resolution.catalog_revision >= consistency.get("min_catalog_revision", 0)
    return int(resolution.revision.rpartition("/")[2])


async def _until(rig: Rig, policy: str, number: int, within_s: float) -> None:
    """Resolve until it answers ``number``."""
    give_up = time.monotonic() + within_s
    while await _number(rig, policy) != number:
        assert time.monotonic() < give_up, f"{policy} still is not at {number}"
        await asyncio.sleep(0.02)


async def test_a_move_through_one_catalog_reaches_the_cache_of_another(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as one, running_catalog(etcd) as other:
        policy = await _two_revisions(one)
        await _until(other, policy, 1, 5)
        for number in (2, 1, 2):
            moved = await one.promote(policy, number)
            assert await _number(other, policy, min_catalog_revision=moved.catalog_revision) == number
            assert await _number(other, policy, strong=True) == number
            await _until(other, policy, number, 5)
        await asyncio.to_thread(etcd.restart)
        await _until(other, policy, 2, 5)
        assert (await one.promote(policy, 1)).catalog_revision
        await _until(other, policy, 1, 6)


async def test_etcd_away_the_cache_answers_for_its_staleness_bound_and_no_longer(etcd: EtcdServer) -> None:
    async with running_catalog(etcd, cache_staleness_s=2.0) as rig:
        policy = await _two_revisions(rig)
        await asyncio.sleep(0.5)
        assert await _number(rig, policy) == 1
        began = time.monotonic()
        await asyncio.to_thread(etcd.kill)
        assert await _number(rig, policy) == 1
        with pytest.raises(Unavailable):
            await _number(rig, policy, strong=True)
        await asyncio.sleep(max(0.0, began + 2.1 - time.monotonic()))
        with pytest.raises(Unavailable):
            await _number(rig, policy)
        await asyncio.to_thread(etcd.start)
        async with asyncio.timeout(15):
            while True:
                try:
                    await _number(rig, policy)
                except Unavailable:
                    await asyncio.sleep(0.1)
                else:
                    break
        await rig.promote(policy, 2)
        await _until(rig, policy, 2, 3)


async def test_history_compacted_under_a_stopped_catalog_empties_its_cache(etcd: EtcdServer, tmp_path: Path) -> None:
    log = tmp_path / "catalog.log"
    stopped = CatalogProcess(etcd, log)
    await stopped.start()
    try:
        async with running_catalog(etcd) as rig, stopped.rig() as late:
            policy = await _two_revisions(rig)
            await _until(late, policy, 1, 5)
            stopped.send(signal.SIGSTOP)
            await asyncio.to_thread(etcd.restart)  # its watch must begin anew, at a revision that is gone by then
            for number in (2, 1, 2):
                moved = await rig.promote(policy, number)
            async with EtcdStore(etcd.settings()) as store:
                await store.compact(moved.catalog_revision)
            stopped.send(signal.SIGCONT)
            assert await _number(late, policy, min_catalog_revision=moved.catalog_revision) == 2
            await _until(late, policy, 2, 6)
            async with asyncio.timeout(5):
                while "history was compacted under the watch" not in log.read_text():  # noqa: ASYNC110 - a file
                    await asyncio.sleep(0.05)
            assert (await rig.promote(policy, 1)).catalog_revision
            await _until(late, policy, 1, 6)
    finally:
        stopped.stop()
