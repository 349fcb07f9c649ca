"""The catalog's process and its etcd die, hang and fill up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd3aio import _protobuf as pb

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import alias_service_pb2, common_pb2, policy_service_pb2, run_service_pb2
from mint_catalog import app
from mint_catalog.settings import CatalogSettings
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Put
from mint_catalog.upkeep import space
from mint_core import errors
from support.catalog_rig import CatalogProcess, Rig, digest_of, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


@pytest.fixture
def process(etcd: EtcdServer, tmp_path: Path) -> Iterator[CatalogProcess]:
    catalog = CatalogProcess(etcd, tmp_path / "catalog.log")
    yield catalog
    catalog.stop()


async def _policy_with_alias(rig: Rig) -> str:
    policy = await rig.policy()
    await rig.revision(policy, "one")
    await rig.promote(policy, 1)
    return policy


async def test_a_killed_catalog_comes_back_with_everything(process: CatalogProcess) -> None:
    await process.start()
    async with process.rig() as rig:
        policy = await _policy_with_alias(rig)
        run = await rig.run(policy)
        claim = await rig.claim("worker-0001")
        before = await rig.resolve(policy)
        process.stop()
        with pytest.raises(errors.Unavailable):
            await rig.resolve(policy)
        await process.start()
        after = await rig.resolve(policy)
        assert (after.revision, after.blob, after.object_key) == (before.revision, before.blob, before.object_key)
        await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=claim.lease.fence))
        report = work_service_pb2.ReportRunRequest(name=run.name, fence=claim.lease.fence)
        await rig.call(rig.work.ReportRun, report)


async def test_a_terminated_catalog_tells_watchers_and_waiting_workers(etcd: EtcdServer, tmp_path: Path) -> None:
    process = CatalogProcess(etcd, tmp_path / "catalog.log", MINT_CATALOG_GRACE_S="30")
    await process.start()
    async with process.rig() as rig:
        await rig.base_model()
        watch = rig.stream(rig.aliases.WatchAliases, alias_service_pb2.WatchAliasesRequest(parent="tenants/-"))
        assert (await anext(watch)).type == common_pb2.WATCH_EVENT_TYPE_BOOKMARK
        claiming = asyncio.create_task(rig.claim("worker-0001", wait_s=60))
        watching = asyncio.create_task(_until_the_end(watch))
        await asyncio.sleep(0.5)
        started = time.monotonic()
        assert await asyncio.to_thread(process.stop, signal.SIGTERM) == 0
        assert time.monotonic() - started < 10
        assert not (await claiming).HasField("run")
        with pytest.raises(errors.Unavailable, match="stopping"):
            await watching
    log = (tmp_path / "catalog.log").read_text()
    assert "Traceback" not in log, log[-3000:]


async def _until_the_end(watch: Any) -> None:
    async for _ in watch:
        pass


@pytest.mark.parametrize("point", ["catalog.publish.before", "catalog.publish.after"])
async def test_killed_in_mid_publication(etcd: EtcdServer, tmp_path: Path, point: str) -> None:
    catalog = CatalogProcess(etcd, tmp_path / "catalog.log", MINT_FAILPOINTS=f"{point}=kill")
    survivor = CatalogProcess(etcd, tmp_path / "survivor.log")
    try:
        await catalog.start()
        async with catalog.rig() as rig:
            policy = await rig.policy()
            fence = await rig.acquire(policy, "worker-0001")
            run, request_id = f"{policy.split('/policies/', maxsplit=1)[0]}/runs/r", str(uuid.uuid4())
            with pytest.raises(errors.Unavailable):
                await rig.revision(policy, "one", fence, run=run, step=5, request_id=request_id)
            assert catalog.wait_for_death() == -signal.SIGKILL
        await survivor.start()
        async with survivor.rig() as rig:
            again = await rig.revision(policy, "one", fence, run=run, step=5, request_id=request_id)
            assert again.revision.number == 1
            assert again.revision.blob.digest == digest_of("one")
            get = policy_service_pb2.GetPolicyRequest(name=policy)
            assert (await rig.call(rig.policies.GetPolicy, get)).policy.next_revision_number == 2
    finally:
        catalog.stop()
        survivor.stop()


async def test_a_claim_whose_answer_was_lost_goes_back_to_the_queue(etcd: EtcdServer, tmp_path: Path) -> None:
    catalog = CatalogProcess(etcd, tmp_path / "catalog.log", MINT_FAILPOINTS="catalog.claim.after=kill")
    try:
        await catalog.start()
        async with catalog.rig() as rig:
            policy = await rig.policy()
            run = await rig.run(policy)
            with pytest.raises(errors.Unavailable):
                await rig.claim("worker-0001", ttl_s=2)
    finally:
        catalog.stop()
    async with running_catalog(etcd) as rig:
        claim = await rig.claim("worker-0002", wait_s=20)
        assert claim.run.name == run.name
        assert claim.run.num_attempts == 2


async def test_etcd_away_and_back(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as rig:
        policy = await _policy_with_alias(rig)
        claim_run = await rig.run(policy)
        claim = await rig.claim("worker-0001")
        etcd.kill()
        started = time.monotonic()
        with pytest.raises(errors.Unavailable) as caught:
            await rig.resolve(policy)
        with pytest.raises(errors.Unavailable):
            await rig.promote(policy, 1, alias="other")
        assert caught.value.retry_after_s == 1.0
        assert time.monotonic() - started < 10
        await asyncio.to_thread(etcd.start)
        async with asyncio.timeout(15):
            while True:
                try:
                    assert (await rig.resolve(policy)).revision == f"{policy}/revisions/1"
                    break
                except errors.Unavailable:
                    await asyncio.sleep(0.1)
        report = work_service_pb2.ReportRunRequest(name=claim_run.name, fence=claim.lease.fence)
        await rig.call(rig.work.ReportRun, report)
        watch = rig.stream(rig.runs.WatchRun, run_service_pb2.WatchRunRequest(name=claim_run.name))
        assert (await anext(watch)).run.state == run_service_pb2.RUN_STATE_RUNNING
        await watch.aclose()


async def test_a_hanging_etcd_is_given_up_in_time(etcd: EtcdServer) -> None:
    async with running_catalog(etcd, etcd=etcd.settings(call_timeout_s=0.5)) as rig:
        policy = await _policy_with_alias(rig)
        etcd.pause()
        try:
            started = time.monotonic()
            with pytest.raises(errors.Unavailable):
                await rig.resolve(policy)
            assert time.monotonic() - started < 5
        finally:
            etcd.resume()
        async with asyncio.timeout(20):
            while True:
                try:
                    await rig.resolve(policy)
                    break
                except errors.Unavailable:
                    await asyncio.sleep(0.1)


async def _resolve(rig: Rig, policy: str, **consistency: Any) -> str:
    request = alias_service_pb2.ResolveRequest(
        name=f"{policy}/aliases/live", consistency=common_pb2.Consistency(**consistency)
    )
    revision: str = (await rig.call(rig.aliases.Resolve, request)).resolution.revision
    return revision


async def _resolve_for(rig: Rig, policy: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await _resolve(rig, policy)
        await asyncio.sleep(0.05)


async def test_what_a_catalog_answers_while_etcd_is_away(etcd: EtcdServer) -> None:
    """Resolve from memory within the staleness bound, where the request allows it; everything else says UNAVAILABLE."""
    async with running_catalog(etcd, etcd=etcd.settings(call_timeout_s=1.0), cache_staleness_s=2.0) as rig:
        policy = await _policy_with_alias(rig)
        for _ in range(50):  # the first read comes before the watch has told of the move, and is not kept
            assert await _resolve(rig, policy) == f"{policy}/revisions/1"
            await asyncio.sleep(0.01)
        etcd.kill()
        away_since = time.monotonic()
        assert await _resolve(rig, policy) == f"{policy}/revisions/1"
        with pytest.raises(errors.Unavailable) as caught:
            await _resolve(rig, policy, strong=True)
        assert caught.value.retry_after_s == 1.0, "RetryInfo"
        with pytest.raises(errors.Unavailable):
            await _resolve(rig, policy, min_catalog_revision=1 << 40)
        with pytest.raises(errors.Unavailable):
            await rig.call(rig.policies.GetPolicy, policy_service_pb2.GetPolicyRequest(name=policy))
        with pytest.raises(errors.Unavailable):
            await rig.promote(policy, 1, alias="other")
        with pytest.raises(errors.Unavailable):
            await _resolve_for(rig, policy, 10)
        assert time.monotonic() - away_since > 1.0, "the bound of two seconds, less the age of the last tick"
        await asyncio.to_thread(etcd.start)
        async with asyncio.timeout(15):
            while True:
                try:
                    moved = await rig.promote(policy, 1, alias="other")
                    assert await _resolve(rig, policy, min_catalog_revision=moved.catalog_revision)
                    break
                except errors.Unavailable:
                    await asyncio.sleep(0.1)


@pytest.mark.timeout(180)
async def test_a_full_etcd_says_so_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself once history is compacted, or after an operator has done all by hand; never by a restart."""
    monkeypatch.setattr(app, "watch_space", functools.partial(space.watch_space, interval_s=0.2, retry_s=0.5))
    with running_etcd("--quota-backend-bytes=8388608", in_memory=True) as etcd:
        async with running_catalog(etcd) as rig:
            policy = await _policy_with_alias(rig)
            fence = await rig.acquire(policy, "holder-0001")
            for make_room in (_compact, _make_room):
                await _fill(etcd)
                with pytest.raises(errors.ResourceExhausted, match="reached its quota and takes no writes"):
                    await rig.promote(policy, 1, alias="other")
                assert await _resolve(rig, policy) == await _resolve(rig, policy, strong=True)
                get = policy_service_pb2.GetPolicyRequest(name=policy)
                assert (await rig.call(rig.policies.GetPolicy, get)).policy.name == policy
                await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=fence))
                await make_room(etcd)
                async with asyncio.timeout(10):
                    while True:
                        try:
                            await rig.promote(policy, 1, alias=make_room.__name__.strip("_").replace("_", "-"))
                            break
                        except (errors.ResourceExhausted, errors.Unavailable):
                            await asyncio.sleep(0.1)


async def _fill(etcd: EtcdServer) -> None:
    """Write history until the quota is reached."""
    async with EtcdStore(etcd.settings()) as store:
        with contextlib.suppress(errors.ResourceExhausted):
            while True:
                await store.txn([], [Put(b"/elsewhere", b"x" * 50_000)])


async def _compact(etcd: EtcdServer) -> None:
    """What the catalog does too when history is old enough."""
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        kv = pb.KVStub(channel)
        head = (await kv.Range(pb.RangeRequest(key=b"x"))).header.revision
        await kv.Compact(pb.CompactionRequest(revision=head, physical=True))


async def _make_room(etcd: EtcdServer) -> None:
    """What an operator may do: compact, defragment, disarm the alarm."""
    await _compact(etcd)
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        maintenance = pb.MaintenanceStub(channel)
        await maintenance.Defragment(pb.DefragmentRequest())
        raised = await maintenance.Alarm(pb.AlarmRequest(action=pb.AlarmRequest.GET))
        for alarm in raised.alarms:
            off = pb.AlarmRequest(action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=alarm.alarm)
            await maintenance.Alarm(off)


def _start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MINT_")}
    command = [sys.executable, "-m", "mint_catalog", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)


def test_without_etcd_it_ends_with_one_clear_sentence() -> None:
    ended = _start("--etcd.endpoints", '["127.0.0.1:1"]', "--etcd.call-timeout-s", "1")
    assert ended.returncode != 0
    assert "etcd at 127.0.0.1:1 does not answer within 1 s: start it" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_its_process_never_imports_torch(etcd: EtcdServer) -> None:
    script = (
        "import asyncio, sys\n"
        "from mint_catalog.app import catalog\n"
        "from mint_catalog.settings import CatalogSettings\n"
        "from mint_core.server import running\n"
        "async def main():\n"
        f"    settings = CatalogSettings(etcd={{'endpoints': ['{etcd.endpoint}']}})\n"
        "    async with running('catalog', settings, lambda: catalog(settings)):\n"
        "        pass\n"
        "asyncio.run(main())\n"
        "heavy = {'torch', 'transformers', 'peft', 'sglang', 'numpy', 'aiobotocore'}\n"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]


async def test_two_catalogs_serve_one_etcd(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as one, running_catalog(etcd) as two:
        policy = await _policy_with_alias(one)
        await two.revision(policy, "two")
        promoted = await two.promote(policy, 2)
        assert (await one.resolve(policy)).revision == promoted.alias.resolution.revision
        run = await one.run(policy)
        claim = await two.claim("worker-0001")
        assert claim.run.name == run.name
        finish = work_service_pb2.FinishRunRequest(
            name=run.name, fence=claim.lease.fence, state=run_service_pb2.RUN_STATE_SUCCEEDED
        )
        await one.call(one.work.FinishRun, finish)


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="prefix"):
        CatalogSettings(etcd={"prefix": "no slash"})
