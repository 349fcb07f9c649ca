"""What is done to many policies or to a whole tenant, by catalogs that are killed in the middle of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.v1 import fleet_service_pb2, tenant_service_pb2
from mint_blobs.s3 import S3ObjectStore
from mint_catalog.model.keys import Keys
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Delete, prefix_end
from mint_client import Endpoints, MintClient
from mint_core import errors
from support.catalog_rig import CatalogProcess, Rig, running_catalog
from support.commands import run_mint
from support.etcd import EtcdServer, running_etcd
from support.weed import WeedServer, running_weed

_KEYS = Keys()
_DONE = tenant_service_pb2.TENANT_ERASURE_STATE_DONE


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


async def _let_lapse(etcd: EtcdServer, duty: str) -> None:
    """As if the killed catalog's lease had run out; waiting for it would take 15 s."""
    async with EtcdStore(etcd.settings()) as store:
        await store.txn([], [Delete(_KEYS.duty(duty))])


async def _policies(rig: Rig, tenant: str, num: int) -> list[str]:
    """Policies with two revisions each, live at the first."""

    async def one(number: int) -> str:
        policy = await rig.policy(tenant, f"p{number:02d}")
        for text in ("one", "two"):
            await rig.revision(policy, text)
        await rig.promote(policy, 1)
        return policy

    await rig.base_model()
    first = await one(0)
    return [first, *await asyncio.gather(*map(one, range(1, num)))]


async def test_a_fleet_operation_outlives_its_catalog(etcd: EtcdServer, tmp_path: Path) -> None:
    async with running_catalog(etcd) as rig:
        policies = await _policies(rig, "fleet", 45)
        bare = await rig.policy("fleet", "bare")
    # Killed after the first 40 were tried, before a result of theirs is written.
    doomed = CatalogProcess(etcd, tmp_path / "log", MINT_FAILPOINTS="catalog.fleet.tried=kill")
    await doomed.start()
    async with doomed.rig() as rig, MintClient(Endpoints(catalog=rig.public_address)) as client:
        operation = fleet_service_pb2.FleetOperation(reason="spring")
        operation.promote.alias = "live"
        begun = await client.fleet_operations.create("fleet", operation, operation_id="op")
        await asyncio.to_thread(doomed.wait_for_death)
    await _let_lapse(etcd, "fleet")
    async with running_catalog(etcd) as rig, MintClient(Endpoints(catalog=rig.public_address)) as client:
        before = [await client.aliases.get(f"{policy}/aliases/live") for policy in policies]
        assert 0 < sum(alias.active.revision_number == 2 for alias in before) <= 40
        done = await client.fleet_operations.wait(begun.name, timeout_s=20)
        assert (done.state, done.num_done, done.num_failed) == (fleet_service_pb2.FLEET_OPERATION_STATE_DONE, 46, 1)
        aliases = [await client.aliases.get(f"{policy}/aliases/live") for policy in policies]
        # Each was moved once: what was moved before the kill was not written again.
        assert {(alias.active.revision_number, len(alias.history)) for alias in aliases} == {(2, 2)}
        assert {alias.history[0].attribution.reason for alias in aliases} == {"spring"}
        moved = [alias for alias in before if alias.active.revision_number == 2]
        assert {alias.etag for alias in moved} <= {alias.etag for alias in aliases}
        results = {result.policy: result async for result in client.fleet_operations.results(begun.name, page_size=7)}
        assert set(results) == {*policies, bare}
        failed = [result async for result in client.fleet_operations.results(begun.name, failed_only=True)]
        assert [result.policy for result in failed] == [bare]
        assert "no READY revision" in failed[0].status.message
        code, output = await run_mint(
            "fleet", "results", "fleet/op", "--failed", "--json", "--catalog", rig.public_address
        )
        assert code == 0, output
        (plain,) = json.loads(output)["fleet_results"]
        assert (plain["policy"], plain["status"]["reason"]) == (bare, "WRONG_STATE")
        code, output = await run_mint(
            "fleet", "rollback", "fleet", "--wait", "--filter", 'alias = "live"', "--catalog", rig.public_address
        )
        assert code == 0, output
        assert "rollback live" in output
        assert (await client.aliases.get(aliases[0].name)).active.revision_number == 1


async def test_an_erasure_outlives_its_catalog_and_proves_that_nothing_is_left(
    etcd: EtcdServer, weed: WeedServer, tmp_path: Path
) -> None:
    settings = weed.settings()
    async with S3ObjectStore(settings) as objects:
        await objects.ensure_bucket()
        async with running_catalog(etcd) as rig:
            policy = (await _policies(rig, "erased", 3))[0]
            neighbour = await rig.policy("erased-2", "tone")
            await rig.run(policy, "r1")
            with pytest.raises(errors.FailedPrecondition, match="no object store"):
                await _delete(rig, "erased")
        for key in ("blobs/aa/1", "blobs/ab/2", "states/p00/r1/00000001-7/state.json"):
            await objects.put_bytes(f"tenants/erased/{key}", key.encode())
        await objects.put_bytes("tenants/erased-2/blobs/aa/1", b"stays")
        doomed = CatalogProcess(
            etcd,
            tmp_path / "log",
            MINT_FAILPOINTS="catalog.erasure.deleted=kill@6",
            MINT_CATALOG_OBJECT_STORE=json.dumps(
                {
                    "endpoint_url": settings.endpoint_url,
                    "access_key_id": settings.access_key_id,
                    "secret_access_key": settings.secret_access_key.get_secret_value(),
                }
            ),
        )
        await doomed.start()
        async with doomed.rig() as rig:
            await _delete(rig, "erased")
            await asyncio.to_thread(doomed.wait_for_death)
        await _let_lapse(etcd, "erasure")
        async with (
            running_catalog(etcd, object_store=settings, erasure_settle_s=0.1) as rig,
            MintClient(Endpoints(catalog=rig.public_address)) as client,
        ):
            with pytest.raises(errors.WrongState, match="being erased"):
                await client.policies.create("erased", "new", base_model="baseModels/tiny")
            await rig.revision(neighbour, "others go on")
            async with asyncio.timeout(20):
                while True:
                    proof = await client.tenants.erasure("erased")
                    if proof.state == _DONE:
                        break
                    await asyncio.sleep(0.1)
            assert set(proof.num_records_left.values()) == {0}
            assert proof.num_objects_left == 0
            assert proof.num_objects_deleted == 3
            assert proof.num_records_deleted["policies"] == 3
            assert proof.num_records_deleted["revisions"] == 6
            assert proof.num_records_deleted["audit"] > 10
            assert await _keys_of(etcd, "erased") == []
            assert [info.key async for info in objects.list("tenants/erased")] == ["tenants/erased-2/blobs/aa/1"]
            assert (await client.revisions.get(f"{neighbour}/revisions/1")).number == 1
            created = await client.policies.create("erased", "p00", base_model="baseModels/tiny")
            assert created.next_revision_number == 1, "the name is used anew"


async def _delete(rig: Rig, tenant: str) -> Any:
    async with MintClient(Endpoints(catalog=rig.public_address)) as client:
        return await client.tenants.delete(tenant, confirm=tenant, reason="asked to")


async def _keys_of(etcd: EtcdServer, tenant: str) -> list[bytes]:
    async with EtcdStore(etcd.settings()) as store:
        found = (await store.scan(_KEYS.prefix, prefix_end(_KEYS.prefix), limit=100_000)).values
    return [kv.key for kv in found if tenant in _KEYS.parts(kv.key) and _KEYS.parts(kv.key)[0] != "erasures"]
