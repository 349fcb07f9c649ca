"""The history checker is shown bugs that a catalog could have: it must find each, and nothing where none is planted.

Reads and writes are slowed down at random, as a network would, so that calls meet in the middle of each other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from mint_catalog.model.records import Alias
from mint_catalog.policies import revisions
from mint_catalog.serving.cache import AliasCache
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Compare, Operation, ReadResult, TxnResult
from support.catalog_rig import running_catalog
from support.catalog_workload import Client, World
from support.etcd import EtcdServer, running_etcd

NUM_OPERATIONS = 500


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


@pytest.fixture(autouse=True)
def slow_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of reads, and transactions on their way, take up to 10 ms longer."""
    rng = random.Random(1)
    get, txn = EtcdStore.get, EtcdStore.txn

    async def slow_get(self: EtcdStore, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        result = await get(self, keys, revision=revision)
        await asyncio.sleep(rng.random() * 0.01)
        return result

    async def slow_txn(self: EtcdStore, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        await asyncio.sleep(rng.random() * 0.01)
        return await txn(self, compares, operations)

    monkeypatch.setattr(EtcdStore, "get", slow_get)
    monkeypatch.setattr(EtcdStore, "txn", slow_txn)


async def _violations(etcd: EtcdServer, seed: int, **weights: int) -> list[str]:
    """What the checker finds after eight clients have worked over two catalogs in this process."""
    world = World()
    settings = etcd.settings(prefix=f"/history-{seed}/")
    async with running_catalog(etcd, etcd=settings) as one, running_catalog(etcd, etcd=settings) as two:
        await world.set_up(one, num_policies=3)
        clients = [Client(number, seed, [one, two], world, weights=weights) for number in range(8)]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run(lambda: world.num_operations >= NUM_OPERATIONS))
        await clients[0].read_everything()
    return world.history.check()


async def _expect(etcd: EtcdServer, seed: int, says: str, **weights: int) -> None:
    """The bug is found, at the latest in the third history: each is short, and what it meets is up to chance."""
    for each in range(seed, seed + 3):
        found = [violation for violation in await _violations(etcd, each, **weights) if says in violation]
        if found:
            return
    raise AssertionError(f"nothing was found that says {says!r}")


async def test_no_bug(etcd: EtcdServer) -> None:
    assert await _violations(etcd, 1) == []


async def test_a_stale_cache_fill(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fill does not ask whether the watch has told of something newer already."""
    fill = AliasCache.fill

    def blind(self: AliasCache, alias: Alias, read_at: int) -> bool:
        return fill(self, alias, max(read_at, self._told.position))

    monkeypatch.setattr(AliasCache, "fill", blind)
    await _expect(etcd, 10, "since revision", resolve=80)


async def test_an_unfenced_write(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence of a publication is not looked at."""
    monkeypatch.setattr(revisions, "require_fence", lambda *_: None)
    await _expect(etcd, 20, "a write under fence", train=60)


async def test_a_promotion_without_compare(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves of aliases are written whatever has happened since they were decided."""
    txn: Callable[..., Any] = EtcdStore.txn

    async def careless(self: EtcdStore, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        moves = any(b"/aliases/" in getattr(each, "key", b"") for each in operations)
        result: TxnResult = await txn(self, [] if moves else compares, operations)
        return result

    monkeypatch.setattr(EtcdStore, "txn", careless)
    await _expect(etcd, 30, "is not linearizable", promote=60)
