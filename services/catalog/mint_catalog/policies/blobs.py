"""Blob records: what the catalog knows of stored bytes.

STAGED: an object key was given out. VERIFIED: the bytes were read back and have the digest. CONDEMNED: to be deleted;
the next put stages anew. An object key is never given out for a second life of a digest, so a deletion that arrives
late cannot hit newer bytes. Publish touches the record it refers to, so a condemnation that raced with it loses.

A record's ``update_time`` is what garbage collection counts its age from: it moves when the blob is staged, verified or
asked for, and when a revision that referred to it is deleted.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import timedelta
from typing import Final

from mint_blobs.keys import blob_key
from mint_catalog.model.checks import check_range, not_found
from mint_catalog.model.records import BlobRecord, BlobRef, BlobState, now
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Answer, Draft, Transactions
from mint_catalog.storage.store import Store
from mint_core.errors import Aborted, BlobMissing, DigestMismatch
from mint_core.names import BlobName

__all__ = ["Blobs", "release_blob", "verified_blob"]

_RENEWED_AFTER: Final = timedelta(hours=1)
"""A record is written again for being asked for, no more often than this."""


class Blobs:
    """Stage, verify and read blob records."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def stage(self, name: BlobName, size_bytes: int) -> BlobRecord:
        """Give out an object key; a VERIFIED record is returned, with nothing to upload, and counts as new again.

        Raises ``InvalidArgument``, ``DigestMismatch`` when the digest is known with another size.
        """
        check_range(size_bytes, field="size_bytes", least=1)
        ref = self._tables.blob(name)

        async def body(draft: Draft) -> Answer[BlobRecord]:
            await draft.fetch(ref)
            known = draft.get(ref)
            same_size = known is not None and known.blob is not None and known.blob.size_bytes == size_bytes
            if known is not None and known.state is BlobState.VERIFIED and not same_size:
                raise DigestMismatch(
                    f"{name} is stored with {known.blob and known.blob.size_bytes} bytes, not {size_bytes}: bytes of "
                    "another length cannot have this digest",
                    field="size_bytes",
                    metadata={"resource": str(name)},
                )
            time = now()
            if known is not None and same_size and known.state in (BlobState.STAGED, BlobState.VERIFIED):
                if known.update_time is not None and time - known.update_time < _RENEWED_AFTER:
                    return Answer(ref, known)
                return draft.put(ref, replace(known, update_time=time))
            key = blob_key(name.tenant, name.digest, uuid.uuid4().hex)
            record = BlobRecord(name, BlobRef(name.digest, size_bytes), key, BlobState.STAGED, time)
            return draft.put(ref, record)

        return (await self._transactions.run(body, self._tables.codecs.blob)).record

    async def verify(self, name: BlobName, object_key: str) -> BlobRecord:
        """Mark bytes as verified after they were read back from ``object_key``.

        Raises ``NotFound``, and ``Aborted`` when the digest lives under another object key by now.
        """
        ref = self._tables.blob(name)

        async def body(draft: Draft) -> Answer[BlobRecord]:
            await draft.fetch(ref)
            known = draft.get(ref)
            if known is None:
                raise not_found(name, "stage it first")
            if known.object_key != object_key or known.state is BlobState.CONDEMNED:
                raise Aborted(
                    f"{name} is not staged under object key {object_key[:200]!r} any more; stage it anew",
                    metadata={"resource": str(name), "state": known.state.name},
                )
            if known.state is BlobState.VERIFIED:
                return Answer(ref, known)
            return draft.put(ref, replace(known, state=BlobState.VERIFIED, update_time=now()))

        return (await self._transactions.run(body, self._tables.codecs.blob)).record

    async def get(self, name: BlobName) -> BlobRecord:
        """Read a record. Raises ``NotFound``."""
        ref = self._tables.blob(name)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)


def release_blob(draft: Draft, tables: Tables, name: BlobName) -> None:
    """Let a fetched blob's grace period begin anew, because something that referred to it goes away in this draft."""
    ref = tables.blob(name)
    known = draft.get(ref)
    if known is not None and known.state is BlobState.VERIFIED:
        draft.put(ref, replace(known, update_time=now()))


def verified_blob(record: BlobRecord | None, name: BlobName) -> BlobRecord:
    """The record, unless its bytes are absent or unverified: then ``BlobMissing``."""
    if record is None or record.state is not BlobState.VERIFIED:
        state = record.state.name if record else "absent"
        raise BlobMissing(
            f"blob {name} is {state}: stage it, upload its bytes and verify them first",
            metadata={"digest": name.digest, "state": state},
        )
    return record
