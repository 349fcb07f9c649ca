"""Space in a real etcd: a full one comes back without a restart, a roomy one is defragmented."""

from __future__ import annotations

import asyncio
import contextlib

from mint_catalog.model.keys import Keys
from mint_catalog.storage.duty import Duties
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.members import Members
from mint_catalog.storage.store import DeleteRange, Put
from mint_catalog.upkeep.space import defragment_roomy, watch_space
from mint_core.errors import ResourceExhausted, Unavailable
from support.etcd import EtcdServer, running_etcd

_VALUE = bytes(512 << 10)


async def fill(store: EtcdStore) -> int:
    """Write the same key until etcd is full; the number of writes."""
    for number in range(200):
        try:
            await store.txn([], [Put(b"/big", _VALUE)])
        except ResourceExhausted:
            return number
    raise AssertionError("the quota was never reached")


async def writable(store: EtcdStore) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(ResourceExhausted, Unavailable):
                await store.txn([], [Put(b"/small", b"x")])
                return
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def watching(etcd: EtcdServer, retry_s: float = 0.5):  # type: ignore[no-untyped-def]
    task = asyncio.create_task(watch_space(Members(etcd.settings()), interval_s=0.1, retry_s=retry_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_full_etcd_takes_writes_again_once_history_is_compacted() -> None:
    with running_etcd("--quota-backend-bytes=16777216", in_memory=True) as etcd:
        members = Members(etcd.settings())
        async with EtcdStore(etcd.settings()) as store, watching(etcd):
            assert not await members.is_full()
            assert await fill(store) > 10
            assert await members.is_full()
            await asyncio.sleep(1.0)
            await fill(store)  # nothing was compacted, so there is an end to it again
            await store.compact((await store.get([b"/big"])).revision)
            await writable(store)
            assert not await members.is_full()
            (member,) = await members.statuses()
            assert member.size_bytes < 4 << 20
            assert member.is_leader
            assert await fill(store) > 10


async def test_quota_raised_by_hand_is_found_out() -> None:
    with running_etcd("--quota-backend-bytes=16777216", in_memory=True) as etcd:
        async with EtcdStore(etcd.settings()) as store:
            await fill(store)
            async with watching(etcd, retry_s=0.3):
                await asyncio.sleep(1.0)
                await fill(store)  # disarmed, and armed again by a write
            etcd.stop()
            etcd._options = ("--quota-backend-bytes=67108864",)
            etcd.spawn()  # its health is bad as long as the alarm is on
            async with watching(etcd, retry_s=0.3):
                await writable(store)
                await store.txn([], [Put(b"/big", _VALUE)])


async def test_member_is_defragmented_if_that_frees_enough() -> None:
    with running_etcd(in_memory=True) as etcd:
        members, keys = Members(etcd.settings()), Keys()
        async with EtcdStore(etcd.settings()) as store, Duties(store, keys).hold("defragment") as duty:
            for number in range(20):
                await store.txn([], [Put(b"/%02d" % number, _VALUE)])
            await defragment_roomy(members, duty, 64 << 20)
            result = await store.txn([], [DeleteRange(b"/00", b"/18")])
            await store.compact(result.revision)
            for _ in range(200):  # etcd frees pages with later writes; a catalog ticks
                await store.txn([], [Put(b"/tick", b"")])
                if (await members.statuses())[0].in_use_bytes < 4 << 20:
                    break
                await asyncio.sleep(0.1)
            (before,) = await members.statuses()
            await defragment_roomy(members, duty, 64 << 20)
            assert (await members.statuses())[0].size_bytes == before.size_bytes
            await defragment_roomy(members, duty, 1 << 20)
            assert (await members.statuses())[0].size_bytes < before.size_bytes / 2
            assert (await store.get([b"/19"])).values[0] is not None
