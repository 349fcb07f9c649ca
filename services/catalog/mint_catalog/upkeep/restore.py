"""Restore: a backup into an empty catalog, whole or not at all.

While it is under way the key ``restoring`` is there. A restore that fails takes back what it wrote; one whose catalog
was killed is taken back by the next one, which finds the key. The catalog must not be used before the restore has
answered: what workers act on is written last, and garbage is not collected meanwhile.

The key's mod-revision is the fence of one attempt: every write compares it, and taking back begins with writing the
key again. For a write that was cancelled, or whose outcome is unknown, may reach etcd after the deletes: it fails then.

Revision numbers, uids and digests are those of the backup. Etags, catalog revisions and fences are new: a token or a
watch of a client from before is refused or begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from mint_blobs import ObjectStore
from mint_catalog.fleet.erasure import ERASURE_DUTY
from mint_catalog.fleet.work import FLEET_DUTY
from mint_catalog.model.keys import FLEETING_FAMILIES
from mint_catalog.model.tables import Tables
from mint_catalog.storage.duty import Duties, Duty
from mint_catalog.storage.store import Compare, Delete, Field, Operation, Put, Store, prefix_end
from mint_catalog.storage.walk import clear, walk
from mint_catalog.upkeep.backup import (
    FORMAT,
    BackupHeader,
    BackupPart,
    BackupRecord,
    BackupTrailer,
    RecordDigest,
    is_fleeting,
    order_of,
)
from mint_catalog.upkeep.garbage import DUTY as GARBAGE_DUTY
from mint_catalog.upkeep.missing import MissingBlobs, stage_missing
from mint_core import calls
from mint_core.clock import wall_s
from mint_core.errors import DataLoss, InvalidArgument, LeaseLost, MintError, Unavailable, WrongState
from mint_core.log import get_logger

__all__ = ["Restore", "RestoreReport"]

_logger = get_logger(__name__)
_MAX_PUTS: Final = 100
_MAX_TXN_BYTES: Final = 1 << 20
_NUM_IN_FLIGHT: Final = 8
_NUM_ATTEMPTS: Final = 6
_FIRST_BACKOFF_S: Final = 0.1
_HELD_DUTIES: Final = (GARBAGE_DUTY, ERASURE_DUTY, FLEET_DUTY)
"""What must not act on a catalog that is there in part only."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    num_records: int
    missing: MissingBlobs


class Restore:
    """Writes backups back."""

    def __init__(self, store: Store, tables: Tables, duties: Duties, objects: ObjectStore | None) -> None:
        self._store = store
        self._tables = tables
        self._keys = tables.keys
        self._duties = duties
        self._objects = objects

    async def restore(self, parts: AsyncIterator[BackupPart]) -> RestoreReport:
        """Write the stream into the empty catalog and look for its blobs.

        Raises ``InvalidArgument`` (not a backup, or of a newer format), ``WrongState`` (not empty), ``DataLoss`` (the
        stream ends early, is out of order or has another digest), ``LeaseHeld`` (another restore or garbage
        collection is under way), ``Unavailable``. Whatever it raises, what was written is taken back.
        """
        with calls.inbound_call(calls.principal(), None):  # taking back must not end with the caller's deadline
            restoring = asyncio.create_task(self._restore(parts), name="restore")
        try:
            return await asyncio.shield(restoring)
        except asyncio.CancelledError:
            restoring.cancel()
            await asyncio.wait([restoring])
            raise

    async def _restore(self, parts: AsyncIterator[BackupPart]) -> RestoreReport:
        async with contextlib.AsyncExitStack() as stack:
            duty = await stack.enter_async_context(self._duties.hold("restore"))
            for name in _HELD_DUTIES:
                await stack.enter_async_context(self._duties.hold(name))
            await _check_header(parts)
            await self._prepare(duty)
            try:
                fence = await self._mark(duty)
                num_records = await _Writing(self._store, self._keys.prefix, duty, fence).write(parts)
                missing = await stage_missing(self._store, self._tables, self._objects)
            except BaseException:  # also when the caller went away: half a catalog must not stay
                # The stream's own end and the end of the call may both cancel; neither must stop this.
                taking_back = asyncio.create_task(self._take_back(duty), name="take back")
                while not taking_back.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([taking_back])
                taking_back.result()
                raise
            await self._finish(duty)
        _logger.info("restored", extra={"fields": {"num_records": num_records, "num_missing_blobs": missing.num}})
        return RestoreReport(num_records, missing)

    async def _prepare(self, duty: Duty) -> None:
        if (await self._store.get([self._keys.restoring])).values[0] is not None:
            _logger.warning("taking back a restore that was not finished")
            await self._clear(duty)
        else:
            await self._check_empty()

    async def _mark(self, duty: Duty) -> Compare:
        """Write the marker; from now on no write with an earlier fence is applied. The new fence."""
        marker = self._keys.restoring
        while True:
            known, holder = (await self._store.get([marker, duty.key])).values
            if holder is None or holder.create_revision != duty.token:
                raise duty.lost()
            # Compared, so that of several attempts whose outcome is unknown none is applied after another.
            before = Compare(marker, Field.MOD, known.mod_revision if known else 0)
            result = await self._store.txn([duty.compare, before], [Put(marker, str(int(wall_s())).encode())])
            if result.succeeded:
                return Compare(marker, Field.MOD, result.revision)

    async def _check_empty(self) -> None:
        prefix = self._keys.prefix
        async with contextlib.aclosing(walk(self._store, prefix, prefix_end(prefix), keys_only=True)) as pages:
            async for page in pages:
                found = next((kv.key for kv in page if not is_fleeting(kv.key[len(prefix) :])), None)
                if found is not None:
                    raise WrongState(
                        f"the catalog is not empty, it holds {found.decode(errors='replace')!r}: restore into an etcd "
                        "or a prefix that nothing was written to yet",
                        metadata={"resource": "catalog", "state": "not empty"},
                    )

    async def _take_back(self, duty: Duty) -> None:
        for attempt in range(_NUM_ATTEMPTS):
            try:
                await self._mark(duty)
                await self._clear(duty)
                await self._finish(duty)
            except LeaseLost:
                break
            except MintError:
                await asyncio.sleep(_FIRST_BACKOFF_S * 2**attempt)
            else:
                return
        _logger.warning("an unfinished restore could not be taken back; the next one does it")

    async def _clear(self, duty: Duty) -> None:
        """Delete everything but what is fleeting, the tick and the marker."""
        prefix = self._keys.prefix
        start = prefix
        for family in sorted(each.encode() + b"/" for each in FLEETING_FAMILIES):
            await self._clear_range(start, prefix + family, duty)
            start = prefix_end(prefix + family)
        await self._clear_range(start, prefix_end(prefix), duty)

    async def _clear_range(self, start: bytes, end: bytes, duty: Duty) -> None:
        for each in sorted((self._keys.restoring, self._keys.tick)):
            if start <= each < end:
                await clear(self._store, start, each, compares=[duty.compare])
                start = each + b"\0"
        await clear(self._store, start, end, compares=[duty.compare])

    async def _finish(self, duty: Duty) -> None:
        await self._store.txn([duty.compare], [Delete(self._keys.restoring)])


class _Writing:
    """Checks records and writes them, some transactions at a time."""

    def __init__(self, store: Store, prefix: bytes, duty: Duty, fence: Compare) -> None:
        self._store = store
        self._prefix = prefix
        self._duty = duty
        self._compares = (duty.compare, fence)
        self._digest = RecordDigest()
        self._last = (False, b"")
        self._slots = asyncio.Semaphore(_NUM_IN_FLIGHT)

    async def write(self, parts: AsyncIterator[BackupPart]) -> int:
        """Number of records; the stream was whole and had its digest."""
        try:
            async with asyncio.TaskGroup() as group:
                trailer = await self._write_records(parts, group)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        actual = self._digest.trailer()
        if actual != trailer:
            raise DataLoss(
                f"the backup has {actual.num_records} records with digest {actual.digest}, its trailer names "
                f"{trailer.num_records} with {trailer.digest}: it is damaged, use another one; what was written is "
                "taken back",
                metadata={"expected": trailer.digest, "actual": actual.digest},
            )
        return actual.num_records

    async def _write_records(self, parts: AsyncIterator[BackupPart], group: asyncio.TaskGroup) -> BackupTrailer:
        async for part in parts:
            if isinstance(part, BackupTrailer):
                return part
            if isinstance(part, BackupHeader):
                raise _damaged("a second header")
            self._check(part)
            self._digest.add(part)
            for puts in self._batches(part):
                await self._slots.acquire()
                group.create_task(self._put(puts)).add_done_callback(lambda _: self._slots.release())
        raise _damaged("an early end: there is no trailer")

    def _check(self, records: Sequence[BackupRecord]) -> None:
        for record in records:
            order = order_of(record.key)
            if order <= self._last:
                raise _damaged(f"key {record.key[:80]!r} after {self._last[1][:80]!r}")
            if is_fleeting(record.key) or not record.key.isascii():
                raise _damaged(f"key {record.key[:80]!r}, which no backup holds")
            self._last = order

    def _batches(self, records: Sequence[BackupRecord]) -> list[list[Operation]]:
        batches: list[list[Operation]] = []
        num_bytes = 0
        for record in records:
            size = len(record.key) + len(record.value)
            if not batches or len(batches[-1]) == _MAX_PUTS or num_bytes + size > _MAX_TXN_BYTES:
                batches.append([])
                num_bytes = 0
            batches[-1].append(Put(self._prefix + record.key, record.value))
            num_bytes += size
        return batches

    async def _put(self, puts: list[Operation]) -> None:
        # Written again after an unknown outcome: the same bytes under the same keys.
        for attempt in range(_NUM_ATTEMPTS):
            try:
                result = await self._store.txn(self._compares, puts)
            except Unavailable:
                if attempt == _NUM_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(_FIRST_BACKOFF_S * 2**attempt)
            else:
                if not result.succeeded:
                    raise self._duty.lost()
                return


async def _check_header(parts: AsyncIterator[BackupPart]) -> None:
    async for part in parts:
        if not isinstance(part, BackupHeader):
            raise InvalidArgument("the stream does not begin with a header: it is not a backup", field="header")
        if part.format != FORMAT:
            raise InvalidArgument(
                f"header.format is {part.format}: this catalog reads format {FORMAT}; restore with the version that "
                "made the backup",
                field="header.format",
            )
        return
    raise InvalidArgument("the stream is empty: it is not a backup", field="header")


def _damaged(what: str) -> DataLoss:
    return DataLoss(f"the backup has {what}: it is damaged, use another one; what was written is taken back")
