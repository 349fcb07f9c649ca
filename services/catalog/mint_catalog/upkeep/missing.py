"""After a restore: which blobs that the catalog calls VERIFIED are not in the object store.

A listing answers a thousand objects in one call, so blobs are compared with listings, a sixteenth of a tenant's at a
time to bound memory; only where few are asked for is each looked up by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Final

from mint_blobs import ObjectStore
from mint_blobs.keys import blob_prefix
from mint_catalog.model.records import BlobRecord, BlobState, now
from mint_catalog.model.tables import Tables
from mint_catalog.storage.store import Compare, Field, Put, Store, prefix_end
from mint_catalog.storage.walk import walk

__all__ = ["MAX_NAMES", "MissingBlobs", "stage_missing"]

MAX_NAMES: Final = 1000
_FEW: Final = 8
_NUM_LOOKUPS: Final = 8


@dataclass(slots=True)
class MissingBlobs:
    num_checked: int = 0
    num: int = 0
    names: list[str] = field(default_factory=list)
    """At most 1000."""


async def stage_missing(store: Store, tables: Tables, objects: ObjectStore | None) -> MissingBlobs:
    """Set VERIFIED records whose object is missing, or has another size, to STAGED, and tell which.

    Without an object store nothing is checked. Raises ``Unavailable``.
    """
    found = MissingBlobs()
    if objects is None:
        return found
    async with contextlib.aclosing(_groups(store, tables)) as groups:
        async for records in groups:
            found.num_checked += len(records)
            for record in await _missing_of(objects, records):
                found.num += 1
                if len(found.names) < MAX_NAMES:
                    found.names.append(str(record.name))
                ref = tables.blob(record.name)
                put = Put(ref.key, ref.codec.encode(replace(record, state=BlobState.STAGED, update_time=now())))
                await store.txn([Compare(ref.key, Field.MOD, record.mod_revision)], [put])
    return found


async def _groups(store: Store, tables: Tables) -> AsyncGenerator[list[BlobRecord], None]:
    """VERIFIED records of one tenant whose digests begin with one hex digit."""
    prefix = tables.keys.family("blobs")
    group: list[BlobRecord] = []
    async with contextlib.aclosing(walk(store, prefix, prefix_end(prefix))) as pages:
        async for page in pages:
            records = [tables.codecs.blob.decode(kv) for kv in page]
            verified = (record for record in records if record.state is BlobState.VERIFIED)
            for group_key, members in groupby(verified, key=_group_of):
                if group and _group_of(group[0]) != group_key:
                    yield group
                    group = []
                group.extend(members)
    if group:
        yield group


def _group_of(record: BlobRecord) -> tuple[str, str]:
    return record.name.tenant, record.name.digest.removeprefix("sha256:")[0]


async def _missing_of(objects: ObjectStore, records: list[BlobRecord]) -> list[BlobRecord]:
    tenant, digit = _group_of(records[0])
    sizes: dict[str, int] = {}
    if len(records) > _FEW:
        wanted = {record.object_key for record in records}
        async for info in objects.list(blob_prefix(tenant) + digit):
            if info.key in wanted:
                sizes[info.key] = info.size_bytes
    slots = asyncio.Semaphore(_NUM_LOOKUPS)

    async def is_missing(record: BlobRecord) -> bool:
        size_bytes = sizes.get(record.object_key)
        if size_bytes is None:  # not asked for, or put elsewhere by an older version
            async with slots:
                info = await objects.head(record.object_key)
            size_bytes = None if info is None else info.size_bytes
        return record.blob is None or size_bytes != record.blob.size_bytes

    missing = await asyncio.gather(*map(is_missing, records))
    return [record for record, absent in zip(records, missing, strict=True) if absent]
