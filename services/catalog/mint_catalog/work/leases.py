"""Leases: who may write to a policy or run now, and the fence that proves it.

A lease is a key under an etcd lease; its value names the holder, its create-revision is the fence token. A lease
alone is no mutual exclusion, since a holder may sleep through its end: the token is compared inside every write.
"""

from __future__ import annotations

import contextlib

from mint_catalog.model.checks import check_holder, live_policy, not_found
from mint_catalog.model.records import Fence, Holder
from mint_catalog.model.tables import Ref, Tables
from mint_catalog.storage.draft import Draft
from mint_catalog.storage.erasing import check_erasing, not_erasing
from mint_catalog.storage.paging import list_all
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, LeaseGone, Put, Store
from mint_catalog.trail.audit import audit_put
from mint_core.errors import Aborted, InvalidArgument, LeaseHeld, LeaseLost, Unavailable
from mint_core.names import PolicyName, ResourceName, RunName, TenantName

__all__ = ["DEFAULT_TTL_S", "LazyLease", "Leases", "lease_held", "lease_lost", "parse_resource", "require_fence"]

DEFAULT_TTL_S = 30
_MAX_ATTEMPTS = 10


def parse_resource(resource: str, *, field: str = "resource") -> PolicyName | RunName:
    """The policy or run that a lease guards. Raises ``InvalidArgument``."""
    if "/runs/" in resource:
        return RunName.parse(resource, field=field)
    return PolicyName.parse(resource, field=field)


def lease_lost(resource: ResourceName, token: int) -> LeaseLost:
    """The error for a fence that is not the present one."""
    return LeaseLost(
        f"the lease on {resource} with fence {token} has ended or was superseded: stop writing, acquire it again and "
        "reload the current state",
        metadata={"resource": str(resource), "fence": str(token)},
    )


def lease_held(resource: ResourceName) -> LeaseHeld:
    """The error for a lease that somebody else holds."""
    return LeaseHeld(
        f"{resource} is leased by another holder; wait until it is released or its time to live has passed",
        metadata={"resource": str(resource)},
    )


def require_fence(draft: Draft, lease_ref: Ref[Holder], resource: PolicyName | RunName, fence: Fence) -> None:
    """Let the draft commit only under this fence; raises ``LeaseLost`` when it is superseded already.

    The lease must have been fetched. Renewals do not matter: only the key's create-revision is compared.
    """
    if fence.resource != str(resource):
        raise InvalidArgument(
            f"fence.resource is {fence.resource[:120]!r}: expected the fence of {resource}", field="fence.resource"
        )
    if fence.token <= 0 or draft.create_revision(lease_ref) != fence.token:
        raise lease_lost(resource, fence.token)
    draft.require_created(lease_ref, fence.token)


class Leases:
    """Acquire, renew, release and list leases."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables

    async def acquire(self, resource: PolicyName | RunName, holder: str, ttl_s: int) -> Holder:
        """Acquire a lease. The same holder again gets the same fence, renewed; its first time to live stays.

        Raises ``InvalidArgument``, ``NotFound``, ``LeaseHeld``, ``WrongState`` (its tenant is being erased).
        """
        check_holder(holder)
        ref = self._tables.lease(resource)
        guarded = self._tables.policy(resource) if isinstance(resource, PolicyName) else self._tables.run(resource)
        for _ in range(_MAX_ATTEMPTS):
            guarded_kv, kv = (await self._store.get([guarded.key, ref.key])).values
            if guarded_kv is None:
                raise not_found(resource)
            if isinstance(resource, PolicyName):
                live_policy(self._tables.codecs.policy.decode(guarded_kv), resource)
            if kv is not None:
                held = ref.codec.decode(kv)
                if held.holder != holder:
                    raise lease_held(resource)
                if await self._store.keep_alive(held.lease):
                    return held
                continue
            guard = Compare(guarded.key, Field.MOD, guarded_kv.mod_revision)
            acquired = await self._put_new(ref, guard, resource.tenant, holder, ttl_s)
            if acquired is not None:
                return acquired
            await check_erasing(self._store, self._tables.keys, resource.tenant)
        raise Aborted(f"{resource} changed {_MAX_ATTEMPTS} times while its lease was acquired; retry")

    async def _put_new(self, ref: Ref[Holder], guard: Compare, tenant: str, holder: str, ttl_s: int) -> Holder | None:
        lease = await self._store.grant(ttl_s)
        applied = False
        try:
            record = Holder(holder, ttl_s, lease=lease)
            put = Put(ref.key, ref.codec.encode(record), lease)
            audit = audit_put(self._tables.keys, tenant, changes=[(put.key, None, put.value)])
            compares = [guard, Compare(ref.key, Field.CREATE, 0), not_erasing(self._tables.keys, tenant)]
            result = await self._store.txn(compares, [put, audit])
            applied = result.succeeded
        except LeaseGone:
            return None
        finally:
            if not applied:
                await self._store.revoke(lease)
        return Holder(holder, ttl_s, result.revision, lease) if applied else None

    async def renew(self, resource: PolicyName | RunName, token: int) -> Holder:
        """Renew a lease for another time to live. Raises ``LeaseLost``."""
        ref = self._tables.lease(resource)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None or kv.create_revision != token:
            raise lease_lost(resource, token)
        held = ref.codec.decode(kv)
        if not await self._store.keep_alive(held.lease):
            raise lease_lost(resource, token)
        return held

    async def release(self, resource: PolicyName | RunName, token: int) -> None:
        """Give a lease back; one that is lost already is a no-op."""
        ref = self._tables.lease(resource)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None or kv.create_revision != token:
            return
        audit = audit_put(self._tables.keys, resource.tenant, changes=[(kv.key, kv.value, None)])
        result = await self._store.txn([Compare(ref.key, Field.CREATE, token)], [Delete(ref.key), audit])
        if result.succeeded:
            await self._store.revoke(kv.lease)

    async def list(self, tenant: TenantName) -> list[tuple[PolicyName | RunName, Holder]]:
        """The leases of a tenant that live now."""
        prefix = self._tables.keys.family("leases", tenant.tenant)
        leases, _ = await list_all(self._store, prefix, _Keyed(self._tables))
        return leases


class LazyLease:
    """An etcd lease that is opened when the first claim is tried and revoked unless one was taken."""

    def __init__(self, store: Store, ttl_s: int) -> None:
        self._store = store
        self.ttl_s = ttl_s
        self._id = 0
        self.taken = False

    async def __aenter__(self) -> LazyLease:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._id and not self.taken:
            with contextlib.suppress(Unavailable):
                await self._store.revoke(self._id)

    async def id(self) -> int:
        if not self._id:
            self._id = await self._store.grant(self.ttl_s)
        return self._id

    def forget(self) -> None:
        self._id = 0


class _Keyed:
    """Decodes a lease together with the resource that its key names."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def encode(self, record: tuple[PolicyName | RunName, Holder]) -> bytes:
        return self._tables.codecs.holder.encode(record[1])

    def decode(self, kv: KeyValue) -> tuple[PolicyName | RunName, Holder]:
        return self._tables.keys.lease_resource(kv.key), self._tables.codecs.holder.decode(kv)
