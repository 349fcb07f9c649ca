"""Erasing a tenant over the in-memory store, killed at every step."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from unit.catalog.catalog_lab import POLICY, TENANT, digest_of, rollout
from unit.catalog.garbage_lab import GarbageLab
from unit.catalog.memory_store import MemoryStore
from unit.catalog.mortal_store import Killed, MortalStore

from mint_blobs import ObjectInfo
from mint_blobs.memory import MemoryObjectStore
from mint_catalog.fleet.erasure import Erasures
from mint_catalog.fleet.operations import Fleet
from mint_catalog.model.fleet_records import FleetOperation, FleetPause, TenantErasure, TenantErasureState
from mint_catalog.model.run_records import RunState
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Put, prefix_end
from mint_catalog.work.queue import Outcome
from mint_core.errors import FailedPrecondition, InvalidArgument, LeaseHeld, NotFound, Unavailable, WrongState
from mint_core.names import BlobName, FleetOperationName, PolicyName, TenantErasureName, TenantName

ACME = TenantErasureName("acme")


class _MortalObjects(MemoryObjectStore):
    """Killed after the n-th deletion."""

    left = -1

    async def delete(self, key: str) -> None:
        await super().delete(key)
        self.left -= 1
        if self.left == 0:
            raise Killed


class ErasureLab(GarbageLab):
    def __init__(self, store: Any = None, objects: Any = None) -> None:
        super().__init__(store=store, objects=objects)
        self.erasures = Erasures(self.store, self.tables, self.objects, settle_s=0)

    async def fill(self, tenant: str = "acme") -> None:
        """Something in most families."""
        policy = PolicyName(tenant, "tone")
        await self.policy(policy, _request(tenant))
        for number in range(1, 4):
            await self.put(f"bytes {number}", tenant)
            await self.publish(f"bytes {number}", policy=policy)
        if tenant == "acme":
            await self.promote(2)
            await self.run("r1")
            await self.run("r2")
            claim, fence = await self.claimed()
            await self.rollouts.create(rollout(), fence)
            await self.queue.finish(claim.run.name, fence, Outcome(RunState.SUCCEEDED))
        await self.objects.put_bytes(f"tenants/{tenant}/states/tone/r1/00000001-7/state.json", b"{}")
        fleet = Fleet(self.store, self.tables)
        await fleet.create(
            TenantName(tenant), "op", FleetOperation(FleetOperationName(tenant, "op"), pause=FleetPause()), "ada"
        )

    async def begin(self) -> TenantErasure:
        return await self.erasures.begin(TENANT, "tenants/acme", "asked to", "ada")

    async def erase(self) -> TenantErasure:
        async with self.duties.hold("erasure") as duty:
            await self.erasures.erase(duty, "acme")
        return await self.erasures.get(ACME)

    async def names(self) -> set[bytes]:
        """Everything of the tenant: keys below the prefix, and object keys."""
        prefix = self.keys.prefix
        found = (await self.store.scan(prefix, prefix_end(prefix), limit=100_000)).values
        own = {kv.key[len(prefix) :] for kv in found if self.keys.tenant_of(kv.key) == "acme"}
        return own | {info.key.encode() async for info in self.objects.list("tenants/acme/")}


def _request(tenant: str) -> Request | None:
    return Request.of(
        tenant=tenant, principal="ada", method="m", request_id="6f1a7a52-65a0-4a3c-9df0-5a1a0f6c0001", payload=b"x"
    )


def _digest(names: set[bytes]) -> str:
    """As the contract says it."""
    total = sum(int.from_bytes(hashlib.shake_256(name).digest(256)) for name in names) % 2**2048
    return "sha256:" + hashlib.sha256(total.to_bytes(256)).hexdigest()


async def test_everything_of_the_tenant_goes_and_the_proof_stays() -> None:
    lab = ErasureLab()
    await lab.fill()
    await lab.fill("acme-2")
    await lab.fill("beta")
    began = await lab.begin()
    assert (began.state, began.principal, began.reason) == (TenantErasureState.RUNNING, "ada", "asked to")
    before = await lab.names()
    families = {name.partition(b"/")[0].decode() for name in before if not name.startswith(b"tenants/")}
    assert len(families) >= 12
    other = await _of_others(lab)
    done = await lab.erase()
    assert done.state is TenantErasureState.DONE
    assert await lab.names() == set()
    assert await _of_others(lab) == other
    assert set(done.num_records_deleted) == families
    num_objects = sum(name.startswith(b"tenants/") for name in before)
    assert sum(done.num_records_deleted.values()) + done.num_objects_deleted == len(before)
    assert done.num_objects_deleted == num_objects
    assert done.num_bytes_deleted > 0
    assert set(done.num_records_left.values()) == {0}
    assert families < set(done.num_records_left)
    assert done.num_objects_left == 0
    assert done.deleted_digest == _digest(before)
    assert await lab.erasures.pending() is False


async def _of_others(lab: ErasureLab) -> set[bytes]:
    prefix = lab.keys.prefix
    found = (await lab.store.scan(prefix, prefix_end(prefix), limit=100_000)).values
    fleeting = (b"duties/", b"erasing/", b"erasures/")
    own = {kv.key[len(prefix) :] for kv in found if lab.keys.tenant_of(kv.key) != "acme"}
    objects = {info.key.encode() async for info in lab.objects.list("") if not info.key.startswith("tenants/acme/")}
    return {name for name in own | objects if not name.startswith(fleeting)}


async def test_the_tenant_takes_no_writes_meanwhile_and_the_name_may_be_used_anew() -> None:
    lab = ErasureLab()
    await lab.fill()
    await lab.begin()
    for write in (
        lab.promote(3),
        lab.policies.delete(POLICY),
        lab.blobs.stage(BlobName("acme", digest_of("new")), 3),
        lab.policy(PolicyName("acme", "new")),
        lab.run("r9"),
    ):
        with pytest.raises(WrongState, match="being erased"):
            await write
    await lab.policy(PolicyName("beta", "tone"))
    assert (await lab.begin()).state is TenantErasureState.RUNNING
    first = await lab.erase()
    created = await lab.policy()
    assert created.record.next_revision_number == 1
    second = await lab.begin()
    assert second.state is TenantErasureState.RUNNING
    assert (await lab.erase()).start_time != first.start_time


async def test_what_cannot_be_asked_for() -> None:
    lab = ErasureLab()
    await lab.policy()
    with pytest.raises(InvalidArgument, match="confirm"):
        await lab.erasures.begin(TENANT, "tenants/acne", "", "ada")
    with pytest.raises(FailedPrecondition, match="no object store"):
        await Erasures(lab.store, lab.tables, None).begin(TENANT, "tenants/acme", "", "ada")
    with pytest.raises(NotFound, match="never erased"):
        await lab.erasures.get(ACME)
    fence = await lab.fence()
    with pytest.raises(LeaseHeld):
        await lab.begin()
    await lab.leases.release(POLICY, fence.token)
    await lab.begin()


@pytest.mark.parametrize("applied", [False, True], ids=["before the write", "after the write"])
async def test_killed_at_every_transaction_each_name_is_counted_once(applied: bool) -> None:
    number = 1
    while True:
        lab = ErasureLab(mortal := MortalStore(MemoryStore()))
        await lab.fill()
        await lab.begin()
        before = await lab.names()
        async with lab.duties.hold("erasure") as duty:
            mortal.kill_at(number, applied=applied)
            try:
                await lab.erasures.erase(duty, "acme")
                break
            except Killed:
                number += 1
            finally:
                mortal.revive()
        _check(await lab.erase(), before)
        assert await lab.names() == set()
    assert number > 12


@pytest.mark.parametrize("number", range(1, 5))
async def test_killed_between_objects_each_is_counted_once(number: int) -> None:
    lab = ErasureLab(objects=(objects := _MortalObjects()))
    await lab.fill()
    await lab.begin()
    before = await lab.names()
    async with lab.duties.hold("erasure") as duty:
        objects.left = number
        with pytest.raises(Killed):
            await lab.erasures.erase(duty, "acme")
    _check(await lab.erase(), before)


def _check(done: TenantErasure, before: set[bytes]) -> None:
    assert done.state is TenantErasureState.DONE
    assert sum(done.num_records_deleted.values()) + done.num_objects_deleted == len(before)
    assert done.deleted_digest == _digest(before)


async def test_an_upload_that_ends_late_is_found_by_the_next_look() -> None:
    lab = ErasureLab()
    await lab.fill()
    await lab.begin()
    before, num_lists = await lab.names(), 0
    original = lab.objects.list

    async def late(prefix: str) -> AsyncIterator[ObjectInfo]:
        nonlocal num_lists
        num_lists += 1
        async for info in original(prefix):
            yield info
        if num_lists == 1:
            await lab.objects.put_bytes("tenants/acme/blobs/late", b"late")

    lab.objects.list = late  # type: ignore[method-assign]
    _check(await lab.erase(), before | {b"tenants/acme/blobs/late"})
    assert num_lists == 4  # late, found, nothing, the proof's


async def test_no_proof_is_written_over_something_left() -> None:
    lab = ErasureLab()
    await lab.fill()
    await lab.begin()
    original, num_lists = lab.objects.list, 0

    async def late(prefix: str) -> AsyncIterator[ObjectInfo]:
        nonlocal num_lists
        num_lists += 1
        async for info in original(prefix):
            yield info
        if num_lists == 2:  # after the last pass, before the last look
            await lab.store.txn([], [Put(lab.keys.prefix + b"runs/acme/00/late", b"")])

    lab.objects.list = late  # type: ignore[method-assign]
    async with lab.duties.hold("erasure") as duty:
        with pytest.raises(Unavailable, match="last look"):
            await lab.erasures.erase(duty, "acme")
    assert await lab.erasures.pending()
    assert (await lab.erase()).num_records_deleted["runs"] == 3


async def test_no_lease_is_taken_and_no_run_claimed_meanwhile() -> None:
    lab = ErasureLab()
    await lab.policy()
    await lab.run("r1")
    await lab.begin()
    with pytest.raises(WrongState, match="being erased"):
        await lab.fence()
    assert await lab.claim() is None
