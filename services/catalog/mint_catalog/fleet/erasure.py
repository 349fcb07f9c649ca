"""A tenant's erasure: everything of it goes, and a proof stays.

From the moment the key ``erasing/{t}`` is there, no transaction of the tenant commits. Then its records are deleted,
family by family and page by page, then its objects; then everything is looked through again, until nothing is found.
The proof ``erasures/{t}`` lies outside of the tenant's families and stays; the name may be used anew.

A page of records, its count and its digest are one transaction. Objects cannot be part of one: the names of a page are
written down before they are deleted and counted when they are gone, so that a catalog that takes over after a crash
deletes those first, and counts each name once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mint_blobs import ObjectStore
from mint_catalog.model.checks import check_text, not_found
from mint_catalog.model.fleet_records import TenantErasure, TenantErasureState
from mint_catalog.model.keys import TENANT_PART
from mint_catalog.model.records import now
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Answer, Draft, Transactions
from mint_catalog.storage.duty import Duty
from mint_catalog.storage.paging import tenants_of
from mint_catalog.storage.store import Compare, Delete, DeleteRange, Field, KeyValue, Operation, Put, Store, prefix_end
from mint_catalog.storage.walk import PAGE, walk
from mint_catalog.work.leases import lease_held
from mint_core import failpoints
from mint_core.errors import FailedPrecondition, InvalidArgument, MintError, Unavailable
from mint_core.log import get_logger
from mint_core.names import TenantErasureName, TenantName

__all__ = ["ERASURE_DUTY", "Erasures", "NameDigest"]

ERASURE_DUTY: Final = "erasure"

_logger = get_logger(__name__)
_DIGEST_BYTES: Final = 256
_MODULUS: Final = 1 << (8 * _DIGEST_BYTES)
_MAX_OPERATIONS: Final = 100
_NUM_DELETIONS: Final = 16
_OBJECT_PAGE: Final = 1000
_DELETED = failpoints.declare("catalog.erasure.deleted", "some of a tenant's records or objects are deleted")


class NameDigest:
    """A digest over a set of names, whatever their order: it can be gone on with after a crash, at any name.

    The sum, modulo 2^2048, of SHAKE-256 of each name with 2048 bits of output (AdHash of Bellare and Micciancio,
    1997).
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def add(self, name: bytes) -> None:
        self.total = (self.total + int.from_bytes(hashlib.shake_256(name).digest(_DIGEST_BYTES))) % _MODULUS

    def digest(self) -> str:
        """SHA-256 of the sum as 256 bytes, big endian."""
        return f"sha256:{hashlib.sha256(self.total.to_bytes(_DIGEST_BYTES)).hexdigest()}"


@dataclass(frozen=True, slots=True)
class _Progress:
    """What ``erasing/{t}`` holds."""

    total: int = 0
    doomed: tuple[tuple[str, int], ...] = ()
    """Objects that are being deleted: key and size."""

    def encode(self) -> bytes:
        return json.dumps({"total": f"{self.total:x}", "doomed": self.doomed}).encode()

    @classmethod
    def decode(cls, value: bytes) -> _Progress:
        plain = json.loads(value)
        return cls(int(plain["total"], 16), tuple((key, size) for key, size in plain["doomed"]))


@dataclass(slots=True)
class _State:
    """One erasure as it is being worked on."""

    record: TenantErasure
    progress: _Progress
    mod_revision: int
    """Of ``erasing/{t}``."""
    num_found: int = field(default=0)
    """In the pass under way."""


class Erasures:
    """Begins erasures, reads them and works on them."""

    def __init__(self, store: Store, tables: Tables, objects: ObjectStore | None, *, settle_s: float = 5.0) -> None:
        """``settle_s`` is how long uploads that were under way get to end before the last look."""
        self._store = store
        self._tables = tables
        self._keys = tables.keys
        self._objects = objects
        self._settle_s = settle_s
        self._transactions = Transactions(store, tables.keys)

    async def begin(self, tenant: TenantName, confirm: str, reason: str, principal: str) -> TenantErasure:
        """Begin to erase a tenant, or answer the erasure under way.

        Raises ``InvalidArgument``, ``FailedPrecondition`` (no object store), ``LeaseHeld``.
        """
        if confirm != str(tenant):
            raise InvalidArgument(
                f"confirm is {confirm[:120]!r}: give the tenant's name again, {tenant}", field="confirm"
            )
        check_text(reason, field="reason", max_chars=1024)
        if self._objects is None:
            raise FailedPrecondition(
                "this catalog knows no object store, so the tenant's blobs could not be erased: set "
                "catalog.object_store and ask again"
            )
        ref = self._tables.erasure(tenant.tenant)
        erasing = self._tables.raw(self._keys.erasing(tenant.tenant))

        async def body(draft: Draft) -> Answer[TenantErasure]:
            await draft.fetch(ref, erasing)
            known = draft.get(ref)
            if draft.get(erasing) is not None and known is not None:
                return Answer(ref, known)
            await self._check_leases(tenant.tenant)
            draft.put_bytes(erasing.key, _Progress().encode())
            erasure = TenantErasure(
                TenantErasureName(tenant.tenant),
                TenantErasureState.RUNNING,
                principal=principal,
                reason=reason,
                start_time=now(),
            )
            return draft.put(ref, erasure)

        return (await self._transactions.run(body, self._tables.codecs.erasure)).record

    async def _check_leases(self, tenant: str) -> None:
        prefix = self._keys.family("leases", tenant)
        for kv in (await self._store.scan(prefix, prefix_end(prefix), limit=1)).values:
            raise lease_held(self._keys.lease_resource(kv.key))

    async def get(self, name: TenantErasureName) -> TenantErasure:
        """The erasure under way, or the proof of the last one. Raises ``NotFound``."""
        ref = self._tables.erasure(name.tenant)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name, "the tenant was never erased")
        return ref.codec.decode(kv)

    # The work

    async def _under_way(self, limit: int) -> list[str]:
        prefix = self._keys.family("erasing")
        found = (await self._store.scan(prefix, prefix_end(prefix), limit=limit, keys_only=True)).values
        return [self._keys.parts(kv.key)[-1] for kv in found]

    async def pending(self) -> bool:
        """Whether an erasure is under way."""
        return bool(await self._under_way(1))

    async def work(self, duty: Duty) -> None:
        """Work on every erasure under way, one after another."""
        for tenant in await self._under_way(100):
            try:
                await self.erase(duty, tenant)
            except MintError as error:
                fields = {"tenant": tenant, "reason": error.reason, "error": error.message}
                _logger.warning("an erasure was interrupted", extra={"fields": fields})

    async def erase(self, duty: Duty, tenant: str) -> None:
        """Delete everything of the tenant and write the proof. Raises ``Unavailable``; call it again then."""
        assert self._objects is not None, "the loop runs only where there is a store"
        ref, key = self._tables.erasure(tenant), self._keys.erasing(tenant)
        kv, erasing = (await self._store.get([ref.key, key])).values
        if kv is None or erasing is None:
            return
        state = _State(ref.codec.decode(kv), _Progress.decode(erasing.value), erasing.mod_revision)
        await self._delete_doomed(duty, state)
        await self._delete_all(duty, state)
        state.num_found = 1
        while state.num_found:
            await asyncio.sleep(self._settle_s)
            state.num_found = 0
            await self._delete_all(duty, state)
        await self._finish(duty, state)

    async def _delete_all(self, duty: Duty, state: _State) -> None:
        for family in _TENANT_FAMILIES:
            await self._delete_records(duty, state, family)
        await self._delete_objects(duty, state)

    async def _delete_records(self, duty: Duty, state: _State, family: str) -> None:
        tenant = state.record.name.tenant
        async with contextlib.aclosing(self._chunks(family, tenant)) as chunks:
            async for names in chunks:
                digest = NameDigest(state.progress.total)
                for name in names:
                    digest.add(name[len(self._keys.prefix) :])
                counts = dict(state.record.num_records_deleted)
                counts[family] = counts.get(family, 0) + len(names)
                state.num_found += len(names)
                record = replace(state.record, num_records_deleted=counts)
                deletions = _deletions(names, whole=TENANT_PART[family] < 3)
                await self._write(duty, state, record, replace(state.progress, total=digest.total), deletions)
                await _DELETED.reached()

    async def _chunks(self, family: str, tenant: str) -> AsyncGenerator[list[bytes], None]:
        """As many of the tenant's keys as can be deleted in one transaction."""
        most = PAGE if TENANT_PART[family] < 3 else _MAX_OPERATIONS
        async with contextlib.aclosing(self._pages(family, tenant)) as pages:
            async for page in pages:
                for first in range(0, len(page), most):
                    yield [kv.key for kv in page[first : first + most]]

    async def _pages(self, family: str, tenant: str) -> AsyncGenerator[Sequence[KeyValue], None]:
        """The tenant's keys of a family."""
        match TENANT_PART[family]:
            case 1:
                prefixes = [self._keys.family(family, tenant)]
            case 2:
                firsts = [first async for first in tenants_of(self._store, self._keys, family)]
                prefixes = [self._keys.family(family, first, tenant) for first in firsts]
            case _:  # the queue: a few thousand runs of all tenants
                prefixes = [self._keys.family(family)]
        for prefix in prefixes:
            async with contextlib.aclosing(walk(self._store, prefix, prefix_end(prefix), keys_only=True)) as pages:
                async for page in pages:
                    own = [kv for kv in page if self._keys.tenant_of(kv.key) == tenant]
                    if own:
                        yield own

    async def _delete_objects(self, duty: Duty, state: _State) -> None:
        assert self._objects is not None
        prefix = _object_prefix(state.record.name.tenant)
        async for upload in self._objects.list_part_uploads(prefix):
            await self._objects.abort_part_upload(upload)
        page: list[tuple[str, int]] = []
        async for info in self._objects.list(prefix):
            page.append((info.key, info.size_bytes))
            if len(page) == _OBJECT_PAGE:
                await self._delete_page(duty, state, page)
                page = []
        if page:
            await self._delete_page(duty, state, page)

    async def _delete_page(self, duty: Duty, state: _State, page: Sequence[tuple[str, int]]) -> None:
        state.num_found += len(page)
        await self._write(duty, state, state.record, replace(state.progress, doomed=tuple(page)), [])
        await self._delete_doomed(duty, state)

    async def _delete_doomed(self, duty: Duty, state: _State) -> None:
        objects, doomed = self._objects, state.progress.doomed
        assert objects is not None
        if not doomed:
            return
        slots = asyncio.Semaphore(_NUM_DELETIONS)

        async def delete(key: str) -> None:
            async with slots:
                await objects.delete(key)

        for outcome in await asyncio.gather(*(delete(key) for key, _ in doomed), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await _DELETED.reached()
        digest = NameDigest(state.progress.total)
        for key, _ in doomed:
            digest.add(key.encode())
        record = replace(
            state.record,
            num_objects_deleted=state.record.num_objects_deleted + len(doomed),
            num_bytes_deleted=state.record.num_bytes_deleted + sum(size for _, size in doomed),
        )
        await self._write(duty, state, record, _Progress(digest.total), [])

    async def _write(
        self, duty: Duty, state: _State, record: TenantErasure, progress: _Progress, operations: Sequence[Operation]
    ) -> None:
        ref, key = self._tables.erasure(record.name.tenant), self._keys.erasing(record.name.tenant)
        record = replace(record, deleted_digest=NameDigest(progress.total).digest())
        puts = [Put(ref.key, ref.codec.encode(record)), Put(key, progress.encode())]
        compares = [duty.compare, Compare(key, Field.MOD, state.mod_revision)]
        result = await self._store.txn(compares, [*puts, *operations])
        if not result.succeeded:
            raise Unavailable(f"the erasure of tenants/{record.name.tenant} goes on in another catalog")
        state.record, state.progress, state.mod_revision = record, progress, result.revision

    async def _finish(self, duty: Duty, state: _State) -> None:
        """The proof: what a last look at everything finds."""
        assert self._objects is not None
        tenant = state.record.name.tenant
        left = dict.fromkeys(_TENANT_FAMILIES, 0)
        for family in left:
            async with contextlib.aclosing(self._pages(family, tenant)) as pages:
                async for page in pages:
                    left[family] += len(page)
        num_objects = 0
        async for _ in self._objects.list(_object_prefix(tenant)):
            num_objects += 1
        if any(left.values()) or num_objects:
            raise Unavailable(f"tenants/{tenant} still had records or objects at the last look; erasing goes on")
        ref, key = self._tables.erasure(tenant), self._keys.erasing(tenant)
        done = replace(
            state.record,
            state=TenantErasureState.DONE,
            num_records_left=left,
            num_objects_left=num_objects,
            deleted_digest=NameDigest(state.progress.total).digest(),
            end_time=now(),
        )
        compares = [duty.compare, Compare(key, Field.MOD, state.mod_revision)]
        result = await self._store.txn(compares, [Put(ref.key, ref.codec.encode(done)), Delete(key)])
        if not result.succeeded:
            raise Unavailable(f"the erasure of tenants/{tenant} goes on in another catalog")
        _logger.info("tenant erased", extra={"fields": {"tenant": tenant, "digest": done.deleted_digest}})


_ACTED_ON: Final = frozenset({"claims", "delayed", "fleetOpen", "lanes", "leases", "queue"})
_TENANT_FAMILIES: Final = sorted(
    (family for family, part in TENANT_PART.items() if part), key=lambda family: (family not in _ACTED_ON, family)
)
"""What workers and jobs act on goes first, so that they do not try in vain as long as the rest takes."""


def _object_prefix(tenant: str) -> str:
    return f"tenants/{tenant}/"


def _deletions(names: Sequence[bytes], *, whole: bool) -> list[Operation]:
    """``whole``: nothing of another tenant lies between two of the keys."""
    if whole:
        return [DeleteRange(names[0], names[-1] + b"\0")]
    return [Delete(name) for name in names]
