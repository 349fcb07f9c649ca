"""Garbage collection of a catalog over a real etcd and a real object store, by its client and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import policy_service_pb2, revision_service_pb2
from mint_blobs.s3 import S3ObjectStore
from mint_cli.main import run as mint
from mint_client.garbage import GarbageClient
from mint_core import errors
from support.catalog_rig import Rig, digest_of, running_catalog
from support.etcd import EtcdServer, running_etcd
from support.weed import WeedServer, running_weed


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest.fixture
async def store(weed: WeedServer) -> AsyncIterator[S3ObjectStore]:
    async with S3ObjectStore(weed.settings()) as opened:
        await opened.ensure_bucket()
        yield opened


@pytest.fixture
async def rig(etcd: EtcdServer, weed: WeedServer) -> AsyncIterator[Rig]:
    settings = {"gc_grace_s": 0, "gc_condemned_s": 0, "object_store": weed.settings()}
    async with running_catalog(etcd, **settings) as running:
        yield running


async def put(rig: Rig, store: S3ObjectStore, tenant: str, text: str) -> str:
    """Store a blob as the exporter does; its object key."""
    name = f"tenants/{tenant}/blobs/{digest_of(text)}"
    stage = publish_service_pb2.StageBlobRequest(name=name, size_bytes=len(text))
    key = str((await rig.call(rig.publish.StageBlob, stage)).blob.object_key)
    await store.put_bytes(key, text.encode())
    await rig.call(rig.publish.VerifyBlob, publish_service_pb2.VerifyBlobRequest(name=name, object_key=key))
    return key


async def collect(rig: Rig, *, dry_run: bool = False) -> list[tuple[str, int, int]]:
    """The steps of one collection, with what had been condemned and deleted when each began."""
    async with GarbageClient(rig.runtime_address) as client:
        return [
            (each.step, each.report.num_blobs_condemned, each.report.num_blobs_deleted)
            async for each in client.collect(dry_run=dry_run)
        ]


async def test_life_of_a_blob(rig: Rig, store: S3ObjectStore) -> None:
    policy = await rig.policy()
    tenant = policy.split("/")[1]
    keys = {text: await put(rig, store, tenant, text) for text in ("live", "retired", "unused")}
    for text in ("live", "retired"):
        await rig.revision(policy, text)
    await rig.promote(policy, 1)
    upload = await store._begin({"Bucket": store._bucket, "Key": f"tenants/{tenant}/blobs/aa/b"}, digest_of("never"))
    assert [each.upload_id async for each in store.list_part_uploads(f"tenants/{tenant}/")] == [upload["UploadId"]]

    assert (await collect(rig, dry_run=True))[-1] == ("done", 1, 0)
    assert (await collect(rig))[-1] == ("done", 1, 0)
    assert await store.head(keys["unused"]) is not None
    assert [each async for each in store.list_part_uploads(f"tenants/{tenant}/")] == []
    assert (await collect(rig))[-1] == ("done", 0, 1)
    assert await store.head(keys["unused"]) is None
    with pytest.raises(errors.NotFound):
        await rig.call(
            rig.publish.GetBlob,
            publish_service_pb2.GetBlobRequest(name=f"tenants/{tenant}/blobs/{digest_of('unused')}"),
        )

    delete = revision_service_pb2.DeleteRevisionRequest(name=f"{policy}/revisions/2")
    with pytest.raises(errors.WrongState, match="is READY: retire it"):
        await rig.call(rig.revisions.DeleteRevision, delete)
    await rig.call(rig.revisions.RetireRevision, revision_service_pb2.RetireRevisionRequest(name=delete.name))
    await rig.call(rig.revisions.DeleteRevision, delete)
    with pytest.raises(errors.NotFound):
        await rig.call(rig.revisions.DeleteRevision, delete)
    assert (await collect(rig))[-1] == ("done", 1, 0)
    assert (await collect(rig))[-1] == ("done", 0, 1)
    assert {each.key async for each in store.list(f"tenants/{tenant}/")} == {keys["live"]}
    assert (await rig.resolve(policy)).object_key == keys["live"]
    assert (await rig.revision(policy, "live", run=f"tenants/{tenant}/runs/r1", step=1)).revision.number == 3


async def test_deleted_policy_is_purged_once_it_cannot_come_back(
    rig: Rig, store: S3ObjectStore, etcd: EtcdServer, weed: WeedServer
) -> None:
    policy = await rig.policy()
    tenant = policy.split("/")[1]
    await put(rig, store, tenant, "weights")
    await rig.revision(policy, "weights")
    await rig.promote(policy, 1)
    await rig.call(rig.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=policy))
    assert (await collect(rig))[-1] == ("done", 0, 0)
    await rig.call(rig.policies.UndeletePolicy, policy_service_pb2.UndeletePolicyRequest(name=policy))
    assert (await rig.resolve(policy)).blob.digest == digest_of("weights")
    await rig.call(rig.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=policy))
    settings = {"gc_grace_s": 0, "gc_condemned_s": 0, "undelete_grace_s": 0, "object_store": weed.settings()}
    async with running_catalog(etcd, **settings) as other:
        async with GarbageClient(other.runtime_address) as client:
            reports = [each.report async for each in client.collect()]
        assert reports[-1].num_policies_purged == 1
        with pytest.raises(errors.NotFound):
            await rig.call(rig.policies.UndeletePolicy, policy_service_pb2.UndeletePolicyRequest(name=policy))
        assert (await collect(other))[-1] == ("done", 1, 0)
        assert (await collect(other))[-1] == ("done", 0, 1)
    assert [each async for each in store.list(f"tenants/{tenant}/")] == []
    assert await rig.policy(tenant, policy.rpartition("/")[2]) == policy
    assert (await rig.revision(policy, "new")).revision.number == 2


async def test_command_line(rig: Rig, store: S3ObjectStore) -> None:
    policy = await rig.policy()
    tenant = policy.split("/")[1]
    await put(rig, store, tenant, "unused")

    async def run(*argv: str) -> str:
        def call() -> str:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert mint(argv) == 0
            return out.getvalue()

        return await asyncio.to_thread(call)

    where = ("--catalog-runtime", rig.runtime_address)
    told = json.loads(await run("catalog", "gc", "--dry-run", "--json", *where))
    name = f"tenants/{tenant}/blobs/{digest_of('unused')}"
    assert (told["num_blobs_condemned"], told["examples"]) == (1, [name])
    text = await run("catalog", "gc", *where)
    assert "blobs condemned" in text
    assert name in text
    await rig.revision(policy, "one")
    short = f"{tenant}/{policy.rpartition('/')[2]}@1"
    assert "RETIRED" in await run("revision", "retire", short, "--catalog", rig.public_address)
    assert f"deleted {short}" in await run("revision", "delete", short, "--catalog", rig.public_address)


async def test_without_a_store_and_one_at_a_time(etcd: EtcdServer, rig: Rig, store: S3ObjectStore) -> None:
    async with running_catalog(etcd) as without:
        with pytest.raises(errors.FailedPrecondition, match=r"catalog\.object_store"):
            await collect(without)
    policy = await rig.policy()
    for number in range(20):
        await put(rig, store, policy.split("/")[1], f"unused {number}")
    outcomes = await asyncio.gather(*(collect(rig) for _ in range(3)), return_exceptions=True)
    assert len([each for each in outcomes if isinstance(each, list)]) >= 1
    assert len([each for each in outcomes if isinstance(each, errors.LeaseHeld)]) >= 1
    assert (await collect(rig))[-1][2] >= 20  # whoever was refused has left nothing behind
