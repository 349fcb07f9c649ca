"""The watch loses nothing: etcd killed in mid catch-up, compaction under a watcher and during a listing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mint_api.v1 import alias_service_pb2, common_pb2, policy_service_pb2
from mint_catalog.model.keys import Keys
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Put, Revision, prefix_end
from mint_catalog.storage.watch import Hub
from mint_core import errors
from support.catalog_rig import Rig, running_catalog
from support.etcd import EtcdServer, running_etcd

NUM_EVENTS = 20_000
KEYS = Keys()
PREFIX = KEYS.family("aliases")


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd("--heartbeat-interval=100", "--election-timeout=500", in_memory=True) as server:
        yield server


@pytest.fixture
async def store(etcd: EtcdServer) -> AsyncIterator[EtcdStore]:
    async with EtcdStore(etcd.settings()) as real:
        yield real


async def _write(store: EtcdStore, num_events: int, *, seed: int) -> dict[int, int]:
    """Write events, one to ten in a transaction; how many each revision has."""
    rng = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < num_events:
        sizes.append(min(rng.randint(1, 10), num_events - sum(sizes)))
    written: dict[int, int] = {}
    pending = iter(enumerate(sizes))

    async def writer() -> None:
        for number, size in pending:
            puts = [Put(PREFIX + b"%06d-%d" % (number, each), b"v" * 200) for each in range(size)]
            written[(await store.txn([], puts)).revision] = size

    await asyncio.gather(*(writer() for _ in range(16)))
    return written


def _check(seen: list[Revision], written: dict[int, int]) -> None:
    revisions = [each.revision for each in seen if each.changes]
    assert revisions == sorted(written), "each revision once and in order"
    assert {each.revision: len(each.changes) for each in seen if each.changes} == written, "each revision whole"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
async def test_etcd_killed_in_mid_catch_up(etcd: EtcdServer, store: EtcdStore, seed: int) -> None:
    start = (await store.get([PREFIX])).revision
    written = await _write(store, NUM_EVENTS, seed=seed)
    kills = sorted(random.Random(seed).sample(range(1, len(written) - 1), 3))
    seen: list[Revision] = []
    async with asyncio.timeout(60):
        stream = store.watch(PREFIX, prefix_end(PREFIX), after=start)
        async with contextlib.aclosing(stream):
            async for revision in stream:
                seen.append(revision)
                if len(seen) in kills:
                    await asyncio.to_thread(etcd.restart)
                if len(seen) == len(written):
                    break
    _check(seen, written)


@pytest.mark.timeout(180)
async def test_a_subscriber_catches_up_while_etcd_dies_and_writes_go_on(etcd: EtcdServer, store: EtcdStore) -> None:
    hub = Hub(store, KEYS, queue_events=500)
    task = asyncio.create_task(hub.run())
    start = (await store.get([PREFIX])).revision
    written = await _write(store, NUM_EVENTS // 2, seed=3)
    seen: list[Revision] = []
    caught_up_a_little = asyncio.Event()

    async def subscribing() -> None:
        stream = hub.subscribe(PREFIX, prefix_end(PREFIX), after=start)
        async with contextlib.aclosing(stream):
            async for revision in stream:
                seen.append(revision)
                if len(seen) == 200:
                    caught_up_a_little.set()
                if revision.changes and revision.changes[0].value == b"end":
                    return

    subscriber = asyncio.create_task(subscribing())
    await caught_up_a_little.wait()
    await asyncio.to_thread(etcd.restart)
    later = await _write_through_outages(store, etcd, num=1500)
    end = (await store.txn([], [Put(PREFIX + b"end", b"end")])).revision
    await asyncio.wait_for(subscriber, 60)
    task.cancel()
    revisions = [each.revision for each in seen if each.changes]
    assert revisions == sorted(set(revisions)), "in order and once"
    assert set(written) | later | {end} <= set(revisions), "what was acknowledged was seen"


async def _write_through_outages(store: EtcdStore, etcd: EtcdServer, *, num: int) -> set[int]:
    """Revisions of acknowledged writes, with a kill in the middle of them."""
    acknowledged: set[int] = set()
    for number in range(num):
        with contextlib.suppress(errors.Unavailable):
            acknowledged.add((await store.txn([], [Put(PREFIX + b"later%06d" % number, b"x")])).revision)
        if number == num // 2:
            await asyncio.to_thread(etcd.restart)
    assert len(acknowledged) > num // 2
    return acknowledged


async def _until_compacted(responses: Any) -> None:
    async with contextlib.aclosing(responses):
        async for _ in responses:
            pass


@pytest.mark.timeout(120)
async def test_a_watcher_from_compacted_history_lists_again(etcd: EtcdServer, store: EtcdStore) -> None:
    async with running_catalog(etcd, watch_queue_events=100) as rig:
        policy = await rig.policy()
        start = (await rig.revision(policy, "one")).catalog_revision
        for number in range(200):
            await rig.promote(policy, 1, alias=f"a{number % 50}")
            if number < 150:
                request = alias_service_pb2.DeleteAliasRequest(name=f"{policy}/aliases/a{number % 50}")
                await rig.call(rig.aliases.DeleteAlias, request)
        await store.compact((await store.get([PREFIX])).revision)
        watch = alias_service_pb2.WatchAliasesRequest(parent=policy, start_after_catalog_revision=start)
        with pytest.raises(errors.RevisionCompacted):
            await _until_compacted(rig.stream(rig.aliases.WatchAliases, watch))
        listed = await rig.call(rig.aliases.ListAliases, alias_service_pb2.ListAliasesRequest(parent=policy))
        assert len(listed.aliases) == 50
        again = alias_service_pb2.WatchAliasesRequest(
            parent=policy, start_after_catalog_revision=listed.catalog_revision
        )
        responses = rig.stream(rig.aliases.WatchAliases, again)
        delete = alias_service_pb2.DeleteAliasRequest(name=f"{policy}/aliases/a7")
        deleted = await rig.call(rig.aliases.DeleteAlias, delete)
        async with contextlib.aclosing(responses):
            async for response in responses:
                if response.type == common_pb2.WATCH_EVENT_TYPE_DELETE:
                    assert response.catalog_revision == deleted.catalog_revision
                    break


@pytest.mark.timeout(120)
async def test_a_listing_whose_history_is_compacted_starts_again(etcd: EtcdServer, store: EtcdStore) -> None:
    async with running_catalog(etcd) as rig:
        for number in range(20):
            await rig.policy("acme", f"p{number}")
        request = policy_service_pb2.ListPoliciesRequest(parent="tenants/acme", page_size=6)
        first = await rig.call(rig.policies.ListPolicies, request)
        await rig.policy("acme", "more")
        await store.compact((await store.get([PREFIX])).revision)
        request.page_token = first.next_page_token
        with pytest.raises(errors.RevisionCompacted) as caught:
            await rig.call(rig.policies.ListPolicies, request)
        assert caught.value.reason == "REVISION_COMPACTED"
        assert len(await _list_all(rig)) == 21


async def _list_all(rig: Rig) -> set[str]:
    names: set[str] = set()
    token = ""
    while True:
        request = policy_service_pb2.ListPoliciesRequest(parent="tenants/acme", page_size=6, page_token=token)
        page = await rig.call(rig.policies.ListPolicies, request)
        names |= {policy.name for policy in page.policies}
        token = page.next_page_token
        if not token:
            return names
