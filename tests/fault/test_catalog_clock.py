"""Two of three catalogs over one etcd have a clock that is an hour off: nothing is decided by it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    audit_service_pb2,
    common_pb2,
    policy_service_pb2,
    run_service_pb2,
)
from mint_core import errors
from support.catalog_rig import CatalogProcess, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd
from support.wrong_clock import find_libfaketime, jumping_clock, set_clock, stop, wrong_clock

HOUR_S = 3600
TTL_S = 2

pytestmark = pytest.mark.skipif(
    find_libfaketime() is None,
    reason="libfaketime is not here: 'apt-get install libfaketime', or name it by LIBFAKETIME=/path/libfaketime.so.1",
)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


@pytest.fixture(scope="module")
def wrong(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[CatalogProcess]]:
    """A catalog whose clock is an hour ahead, and one whose clock is an hour behind."""
    library, folder = find_libfaketime(), tmp_path_factory.mktemp("clocks")
    assert library is not None
    catalogs = [
        CatalogProcess(
            etcd,
            folder / f"catalog{offset_s:+d}.log",
            MINT_CATALOG_RUN_RETRY_BACKOFF_S="0.5",
            **wrong_clock(library, offset_s),
        )
        for offset_s in (HOUR_S, -HOUR_S)
    ]
    try:
        asyncio.run(_start(catalogs))
        yield catalogs
    finally:
        for catalog in catalogs:
            stop(catalog)


async def _start(catalogs: list[CatalogProcess]) -> None:
    await asyncio.gather(*(catalog.start() for catalog in catalogs))


@pytest.fixture
async def rigs(etcd: EtcdServer, wrong: list[CatalogProcess]) -> AsyncIterator[list[Rig]]:
    """Catalogs whose clocks are right, ahead and behind."""
    async with AsyncExitStack() as stack:
        right = await stack.enter_async_context(running_catalog(etcd, run_retry_backoff_s=0.5))
        yield [right, *[await stack.enter_async_context(catalog.rig()) for catalog in wrong]]


async def test_the_clocks_are_wrong(rigs: list[Rig]) -> None:
    """And what is shown to people says so; the order of things is told by catalog revisions."""
    offsets = []
    for rig in rigs:
        policy = await rig.policy()
        await rig.revision(policy, "one")
        alias = (await rig.promote(policy, 1)).alias
        offsets.append(round((alias.update_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)).total_seconds() / 60))
    assert offsets == [0, 60, -60]


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_a_request_id_is_known_by_every_clock(rigs: list[Rig], first: int) -> None:
    policy = await rigs[first].policy()
    await rigs[first].revision(policy, "one")
    request = alias_service_pb2.PromoteAliasRequest(
        name=f"{policy}/aliases/live", revision_number=1, request_id=str(uuid.uuid4())
    )
    answer = await rigs[first].call(rigs[first].aliases.PromoteAlias, request)
    for rig in rigs:
        assert await rig.call(rig.aliases.PromoteAlias, request) == answer


async def test_a_request_id_at_midnight(
    etcd: EtcdServer, rigs: list[Rig], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ids are kept by the day: for this catalog it is tomorrow."""
    library = find_libfaketime()
    assert library is not None
    log = tmp_path_factory.mktemp("tomorrow") / "catalog.log"
    to_midnight_s = 86_400 - int(time.time()) % 86_400 + 60
    tomorrow = CatalogProcess(etcd, log, **wrong_clock(library, to_midnight_s))
    try:
        await tomorrow.start()
        async with tomorrow.rig() as late:
            for first, second in ((rigs[0], late), (late, rigs[0])):
                policy = await first.policy()
                await first.revision(policy, "one")
                request = alias_service_pb2.PromoteAliasRequest(
                    name=f"{policy}/aliases/live", revision_number=1, request_id=str(uuid.uuid4())
                )
                sending = (rig.call(rig.aliases.PromoteAlias, request) for rig in [first, second] * 10)
                answers = await asyncio.gather(*sending)
                assert all(answer == answers[0] for answer in answers)
    finally:
        stop(tomorrow)


async def test_a_lease_lives_as_long_as_it_is_renewed(rigs: list[Rig]) -> None:
    await asyncio.gather(*(_hold_and_lose(rigs[each], rigs[(each + 1) % 3], rigs) for each in range(3)))


async def _hold_and_lose(holder: Rig, rival: Rig, rigs: list[Rig]) -> None:
    policy = await holder.policy()
    fence = await holder.acquire(policy, "holder-0001", TTL_S)
    started = time.monotonic()
    while time.monotonic() - started < 1.5 * TTL_S:
        for rig in rigs:
            await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=fence))
            with pytest.raises(errors.LeaseHeld):
                await rig.acquire(policy, "rival-00001", TTL_S)
        await asyncio.sleep(0.2)
    renewed = time.monotonic()
    later = await _acquired(rival, policy)
    assert TTL_S - 0.3 < time.monotonic() - renewed < TTL_S + 4
    assert later.token > fence.token
    with pytest.raises(errors.LeaseLost):
        await holder.revision(policy, "late", fence)


async def _acquired(rig: Rig, policy: str) -> common_pb2.Fence:
    async with asyncio.timeout(10):
        while True:
            try:
                return await rig.acquire(policy, "rival-00001", TTL_S)
            except errors.LeaseHeld:
                await asyncio.sleep(0.1)


@pytest.mark.parametrize(("fails_at", "claimed_at"), [(1, 0), (2, 0), (0, 1), (0, 2), (1, 2), (2, 1)])
async def test_a_pause_between_attempts_does_not_become_an_hour(
    rigs: list[Rig], fails_at: int, claimed_at: int
) -> None:
    policy = await rigs[0].policy()
    run = await rigs[0].run(policy)
    claim = await rigs[fails_at].claim("worker-0001")
    assert claim.run.name == run.name
    failed = work_service_pb2.FinishRunRequest(
        name=run.name,
        fence=claim.lease.fence,
        state=run_service_pb2.RUN_STATE_FAILED,
        error="UNAVAILABLE: the store was away",
        retriable=True,
    )
    rig = rigs[fails_at]
    assert (await rig.call(rig.work.FinishRun, failed)).run.state == run_service_pb2.RUN_STATE_QUEUED
    again = await rigs[claimed_at].claim("worker-0002", wait_s=8)
    assert again.run.name == run.name
    done = work_service_pb2.FinishRunRequest(
        name=run.name, fence=again.lease.fence, state=run_service_pb2.RUN_STATE_SUCCEEDED
    )
    await rigs[claimed_at].call(rigs[claimed_at].work.FinishRun, done)


async def test_a_listing_goes_on_at_another_catalog(rigs: list[Rig]) -> None:
    for number in range(9):
        await rigs[number % 3].policy("clocks", f"p{number}")
    names: list[str] = []
    token, revision = "", 0
    for number in range(9):
        rig = rigs[number % 3]
        request = policy_service_pb2.ListPoliciesRequest(parent="tenants/clocks", page_size=2, page_token=token)
        page = await rig.call(rig.policies.ListPolicies, request)
        names += [policy.name for policy in page.policies]
        assert revision in (0, page.catalog_revision)
        token, revision = page.next_page_token, page.catalog_revision
        if not token:
            break
    assert sorted(names) == [f"tenants/clocks/policies/p{number}" for number in range(9)]


async def test_the_audit_trail_is_whole_and_tells_the_order(rigs: list[Rig]) -> None:
    """Times are those of the catalog that wrote; every entry is listed, and its catalog revision is the truth."""
    policy = await rigs[0].policy("trail")
    await rigs[0].revision(policy, "one")
    await rigs[0].revision(policy, "two")
    written = [(await rigs[number % 3].promote(policy, 1 + number % 2)).catalog_revision for number in range(9)]
    for rig in rigs:
        listed: dict[int, audit_service_pb2.AuditEntry] = {}
        token = ""
        while True:
            request = audit_service_pb2.ListAuditEntriesRequest(
                parent="tenants/trail", resource=f"{policy}/aliases/live", page_size=4, page_token=token
            )
            page = await rig.call(rig.audit.ListAuditEntries, request)
            for entry in page.audit_entries:
                assert entry.catalog_revision not in listed
                listed[entry.catalog_revision] = entry
            token = page.next_page_token
            if not token:
                break
        assert sorted(listed) == written
        minutes = [round((listed[each].time.seconds - time.time()) / 60) for each in written]
        assert minutes == [0, 60, -60] * 3


@pytest.mark.parametrize(("deleted_at", "undeleted_at"), [(0, 1), (1, 0), (1, 2), (2, 1)])
async def test_a_deleted_policy_comes_back_with_its_canary(rigs: list[Rig], deleted_at: int, undeleted_at: int) -> None:
    first, second = rigs[deleted_at], rigs[undeleted_at]
    policy = await first.policy()
    await first.revision(policy, "one")
    await first.revision(policy, "two")
    await first.promote(policy, 1)
    canary = alias_service_pb2.SetCanaryRequest(name=f"{policy}/aliases/live")
    canary.canary.target.revision_number, canary.canary.weight = 2, 0.5
    await second.call(second.aliases.SetCanary, canary)
    await first.call(first.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=policy))
    with pytest.raises(errors.NotFound):
        await second.resolve(policy)
    await second.call(second.policies.UndeletePolicy, policy_service_pb2.UndeletePolicyRequest(name=policy))
    for rig in rigs:
        request = alias_service_pb2.GetAliasRequest(
            name=f"{policy}/aliases/live", consistency=common_pb2.Consistency(strong=True)
        )
        alias = (await rig.call(rig.aliases.GetAlias, request)).alias
        assert (alias.active.revision_number, alias.canary.target.revision_number) == (1, 2)


async def test_reads_and_watches_are_as_fresh_as_elsewhere(rigs: list[Rig]) -> None:
    policy = await rigs[0].policy()
    await rigs[0].revision(policy, "one")
    await rigs[0].revision(policy, "two")
    watches = [
        rig.stream(rig.aliases.WatchAliases, alias_service_pb2.WatchAliasesRequest(parent=policy)) for rig in rigs
    ]
    for watch in watches:
        assert (await anext(watch)).type == common_pb2.WATCH_EVENT_TYPE_BOOKMARK
    for number in range(9):
        moved = await rigs[number % 3].promote(policy, 1 + number % 2)
        for rig, watch in zip(rigs, watches, strict=True):
            request = alias_service_pb2.ResolveRequest(
                name=f"{policy}/aliases/live",
                consistency=common_pb2.Consistency(min_catalog_revision=moved.catalog_revision),
            )
            resolution = (await rig.call(rig.aliases.Resolve, request)).resolution
            assert resolution.revision == moved.alias.resolution.revision
            async with asyncio.timeout(5):
                while (event := await anext(watch)).type != common_pb2.WATCH_EVENT_TYPE_PUT:
                    pass
            assert event.catalog_revision == moved.catalog_revision
    for watch in watches:
        await watch.aclose()


async def test_a_clock_that_jumps_an_hour_and_back(etcd: EtcdServer, tmp_path: Path) -> None:
    """Forth, back and back again, under a catalog that holds a lease, a queue, a watch and request ids for others."""
    library, stamp = find_libfaketime(), tmp_path / "clock"
    assert library is not None
    pause = {"MINT_CATALOG_RUN_RETRY_BACKOFF_S": "0.5", "MINT_CATALOG_RUN_RETRY_BACKOFF_MAX_S": "0.5"}
    catalog = CatalogProcess(etcd, tmp_path / "catalog.log", **pause, **jumping_clock(library, stamp))
    try:
        await catalog.start()
        async with catalog.rig() as rig:
            policy = await rig.policy()
            await rig.revision(policy, "one")
            await rig.revision(policy, "two")
            await rig.run(policy)
            claim = await rig.claim("worker-0001", TTL_S)
            request = alias_service_pb2.PromoteAliasRequest(
                name=f"{policy}/aliases/live", revision_number=1, request_id=str(uuid.uuid4())
            )
            promoted = await rig.call(rig.aliases.PromoteAlias, request)
            watch = rig.stream(rig.aliases.WatchAliases, alias_service_pb2.WatchAliasesRequest(parent=policy))
            assert (await anext(watch)).type == common_pb2.WATCH_EVENT_TYPE_BOOKMARK
            for offset_s in (HOUR_S, 0, -HOUR_S, 0):
                failed = work_service_pb2.FinishRunRequest(
                    name=claim.run.name,
                    fence=claim.lease.fence,
                    state=run_service_pb2.RUN_STATE_FAILED,
                    error="UNAVAILABLE: the store was away",
                    retriable=True,
                )
                await rig.call(rig.work.FinishRun, failed)
                set_clock(stamp, offset_s)
                assert await rig.call(rig.aliases.PromoteAlias, request) == promoted
                assert (await rig.resolve(policy)).revision == f"{policy}/revisions/1"
                claim = await rig.claim("worker-0001", TTL_S, wait_s=8)
                assert claim.run.name == failed.name, "the pause has not become an hour"
                await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=claim.lease.fence))
            moved = await rig.promote(policy, 2)
            async with asyncio.timeout(5):
                while (event := await anext(watch)).type != common_pb2.WATCH_EVENT_TYPE_PUT:
                    pass
            assert event.catalog_revision == moved.catalog_revision
            await watch.aclose()
    finally:
        stop(catalog)
