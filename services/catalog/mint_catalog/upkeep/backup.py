"""Backup: everything that outlives a process, as of one catalog revision.

Records come in order of their keys, but for the families on which somebody acts at once (the queue, claims, fleet
operations and erasures under way): those come last, so that a restore never shows a worker a run whose policy is not
there yet. Leases, engine registrations and duties are left out. A claim comes without its lease, so after a restore
the reaper takes it back and the run goes to the queue again, as after the death of its worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

from mint_catalog.model.keys import FLEETING_FAMILIES, Keys
from mint_catalog.model.records import now
from mint_catalog.storage.store import KeyValue, LeaseGone, Put, Store, prefix_end
from mint_catalog.storage.walk import walk
from mint_core import calls
from mint_core.errors import Unavailable, WrongState

__all__ = [
    "FORMAT",
    "Backup",
    "BackupHeader",
    "BackupPart",
    "BackupRecord",
    "BackupTrailer",
    "RecordDigest",
    "held_revision",
    "is_fleeting",
    "order_of",
]

FORMAT: Final = 1
_PART_BYTES: Final = 1 << 20
_LATE: Final = (b"claims/", b"delayed/", b"erasing/", b"fleetOpen/", b"lanes/", b"queue/")
_HOLD_TTL_S: Final = 60
_HOLD_RENEWAL_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class BackupHeader:
    format: int = FORMAT
    catalog_revision: int = 0
    create_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class BackupRecord:
    key: bytes
    """Below the catalog's prefix."""
    value: bytes


@dataclass(frozen=True, slots=True)
class BackupTrailer:
    num_records: int = 0
    digest: str = ""


BackupPart: TypeAlias = BackupHeader | Sequence[BackupRecord] | BackupTrailer


class RecordDigest:
    """Count and SHA-256 of records, each key and value with its length as 8 bytes, big endian, before it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._num_records = 0

    def add(self, records: Sequence[BackupRecord]) -> None:
        parts: list[bytes] = []
        for record in records:
            parts += (len(record.key).to_bytes(8), record.key, len(record.value).to_bytes(8), record.value)
        self._hash.update(b"".join(parts))
        self._num_records += len(records)

    def trailer(self) -> BackupTrailer:
        return BackupTrailer(self._num_records, f"sha256:{self._hash.hexdigest()}")


def order_of(key: bytes) -> tuple[bool, bytes]:
    """What the keys of a backup (below the prefix) are sorted by."""
    return key.startswith(_LATE), key


def is_fleeting(key: bytes) -> bool:
    """Whether a key (below the prefix) is left out of backups."""
    family, slash, _ = key.partition(b"/")
    return not slash or family.decode() in FLEETING_FAMILIES


class Backup:
    """Streams a backup."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def stream(self) -> AsyncGenerator[BackupPart, None]:
        """Header, records in parts of about 1 MiB, trailer.

        Raises ``WrongState`` while a restore is not through, ``RevisionCompacted`` when history was compacted under
        the backup all the same, ``Unavailable``.
        """
        async with self._held() as revision:
            yield BackupHeader(FORMAT, revision, now())
            digest = RecordDigest()
            records: list[BackupRecord] = []
            num_bytes = 0
            async with contextlib.aclosing(self._pages(revision)) as pages:
                async for page in pages:
                    for kv in page:
                        record = BackupRecord(kv.key[len(self._keys.prefix) :], kv.value)
                        records.append(record)
                        num_bytes += len(record.key) + len(record.value)
                        if num_bytes >= _PART_BYTES:
                            digest.add(records)
                            yield records
                            records, num_bytes = [], 0
            if records:
                digest.add(records)
                yield records
            yield digest.trailer()

    async def _pages(self, revision: int) -> AsyncGenerator[Sequence[KeyValue], None]:
        prefix = self._keys.prefix
        left_out = sorted([*(family.encode() + b"/" for family in FLEETING_FAMILIES), *_LATE])
        start = prefix
        for each in left_out:  # what lies between two of them, be it known or not
            async for page in self._range(start, prefix + each, revision):
                yield page
            start = prefix_end(prefix + each)
        async for page in self._range(start, prefix_end(prefix), revision):
            yield page
        for each in _LATE:
            async for page in self._range(prefix + each, prefix_end(prefix + each), revision):
                yield page

    async def _range(self, start: bytes, end: bytes, revision: int) -> AsyncGenerator[Sequence[KeyValue], None]:
        length = len(self._keys.prefix)
        async with contextlib.aclosing(walk(self._store, start, end, revision=revision)) as pages:
            async for page in pages:
                kept = [kv for kv in page if b"/" in kv.key[length:]]  # the tick has no family
                if kept:
                    yield kept

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[int]:
        """The head's revision, whose history no catalog compacts while the backup lives."""
        lease = await self._store.grant(_HOLD_TTL_S)
        try:
            restoring, _ = (result := await self._store.get([self._keys.restoring, self._keys.tick])).values
            if restoring is not None:
                raise WrongState(
                    "a restore into this catalog is not through: a backup of it would be of a part",
                    metadata={"resource": "restoring"},
                )
            hold = Put(self._keys.hold(secrets.token_hex(8)), str(result.revision).encode(), lease)
            try:
                await self._store.txn([], [hold])
            except LeaseGone as error:
                raise Unavailable("the backup's hold on history ended before it was made; retry") from error
            with calls.inbound_call(calls.principal(), None):
                renewing = asyncio.create_task(self._renew(lease), name="backup's hold")
            try:
                yield result.revision
            finally:
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)
        finally:
            with calls.inbound_call(calls.principal(), None):  # the hold must not outlive a caller's deadline
                revoking = asyncio.create_task(self._store.revoke(lease))
            await asyncio.gather(revoking, return_exceptions=True)

    async def _renew(self, lease: int) -> None:
        while True:
            await asyncio.sleep(_HOLD_RENEWAL_S)
            with contextlib.suppress(Unavailable):
                if not await self._store.keep_alive(lease):
                    return  # history is kept for keep_history_s all the same; if that is too short, reading says so


async def held_revision(store: Store, keys: Keys) -> int | None:
    """The oldest revision that a backup under way reads at; history from there on must not be compacted."""
    prefix = keys.family("holds")
    held = (await store.scan(prefix, prefix_end(prefix), limit=1000)).values
    return min((int(kv.value) for kv in held), default=None)
