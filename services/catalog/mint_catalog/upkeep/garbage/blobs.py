"""Blobs that nothing refers to: marked against all references, condemned by compare, deleted in a later collection.

A blob is referred to by every revision that is not DELETED, also those of a policy that can be undeleted, and by the
data of every run that has not ended, has FAILED (it can be retried), or ended within the grace period. An evaluation
names the digest of its data as a fact and holds nothing. A blob that a user uploaded is held by nothing until a run is
queued with it: the grace period is how long it waits for that.

No reference is overlooked, however writers race: the record's mod_revision is noted first; what referred to the blob
then, and still does when the references are read, is seen; and whoever begins to refer to it after that writes its
record in the same transaction, so that the condemnation, which compares the mod_revision, loses. The references are
read at one revision of the catalog, taken after the noting.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from mint_catalog.model.records import BlobRecord, BlobState, RevisionState, now
from mint_catalog.model.run_records import Run, RunState
from mint_catalog.storage.paging import scan_family, tenants_of
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, Put
from mint_catalog.upkeep.garbage.work import PAGE, Work, in_batches
from mint_catalog.work.recipes import data_blobs
from mint_core.errors import NotFound

__all__ = ["collect_blobs"]

_BATCH: Final = 50


@dataclass(frozen=True, slots=True)
class _Candidate:
    mod_revision: int
    size_bytes: int


_Candidates = dict[bytes, _Candidate]
"""By the digest's 32 bytes: a hundred thousand of them take about 20 MB."""


async def collect_blobs(work: Work) -> None:
    """Condemn what nothing refers to, delete what was condemned before, delete uploads that never finished."""
    async for tenant in tenants_of(work.store, work.keys, "blobs"):
        async for candidates in _candidates(work, tenant):
            await _mark(work, tenant, candidates)
            await _condemn(work, tenant, candidates)


async def _candidates(work: Work, tenant: str) -> AsyncIterator[_Candidates]:
    """The tenant's VERIFIED blobs past the grace period, in chunks; records in other states are dealt with at once."""
    codec = work.tables.codecs.blob
    candidates: _Candidates = {}
    async for page in work.walk(work.keys.family("blobs", tenant)):
        work.report.num_blobs += len(page)
        dead: list[tuple[KeyValue, BlobRecord]] = []
        for kv in page:
            record = codec.decode(kv)
            if record.update_time is None:
                await _stamp(work, kv, record)
            elif record.state is BlobState.CONDEMNED:
                if work.older_than(record.update_time, work.grace.condemned_s):
                    dead.append((kv, record))
            elif work.older_than(record.update_time, work.grace.unreferenced_s):
                if record.state is BlobState.VERIFIED:
                    size = record.blob.size_bytes if record.blob else 0
                    candidates[_digest_bytes(kv.key)] = _Candidate(kv.mod_revision, size)
                else:
                    await _give_up(work, kv, record)
        await work.each(dead, lambda item: _delete(work, *item))
        if len(candidates) + PAGE > work.chunk:
            yield candidates
            candidates = {}
    if candidates:
        yield candidates


def _digest_bytes(key: bytes) -> bytes:
    return bytes.fromhex(key[-64:].decode())


async def _stamp(work: Work, kv: KeyValue, record: BlobRecord) -> None:
    """A record of before there was garbage collection: its age begins now."""
    if not work.dry_run:
        value = work.tables.codecs.blob.encode(replace(record, update_time=now()))
        await work.commit([work.unchanged(kv)], [Put(kv.key, value)])


async def _give_up(work: Work, kv: KeyValue, record: BlobRecord) -> None:
    """An upload that never finished. Condemned first: a verification that comes now must not find it STAGED."""
    if not work.dry_run:
        dead = replace(record, state=BlobState.CONDEMNED, update_time=now())
        if not await work.commit([work.unchanged(kv)], [Put(kv.key, work.tables.codecs.blob.encode(dead))]):
            return
        stored = (await work.store.get([kv.key])).values[0]
        if stored is None or work.tables.codecs.blob.decode(stored).object_key != record.object_key:
            return  # staged anew meanwhile; the object, if there is one, is found by the listing of objects
        await work.objects.delete(record.object_key)
        await work.commit([work.unchanged(stored)], [Delete(kv.key)])
    work.report.num_uploads_deleted += 1
    work.report.example(record.name)


async def _delete(work: Work, kv: KeyValue, record: BlobRecord) -> None:
    """The object first and the record after it, so that a crash in between leaves what is deleted again."""
    if not work.dry_run:
        with suppress(NotFound):
            await work.objects.delete(record.object_key)
        # Whoever put the blob meanwhile has staged it under another object key: the record stays.
        await work.commit([work.unchanged(kv)], [Delete(kv.key)])
    work.report.num_blobs_deleted += 1
    work.report.example(record.object_key)


async def _mark(work: Work, tenant: str, candidates: _Candidates) -> None:
    """Take out of ``candidates`` what is referred to."""
    revision = (await work.store.get([work.keys.tick])).revision
    codecs = work.tables.codecs
    async for stretch in scan_family(work.store, work.keys, "revisions", tenant=tenant, revision=revision, limit=PAGE):
        for kv in stretch.values:
            held = codecs.revision.decode(kv)
            if held.blob is not None and held.state is not RevisionState.DELETED:
                candidates.pop(bytes.fromhex(held.blob.digest.removeprefix("sha256:")), None)
        if not candidates:
            return
    async for stretch in scan_family(work.store, work.keys, "runs", tenant=tenant, revision=revision, limit=PAGE):
        for kv in stretch.values:
            run = codecs.run.decode(kv)
            if _holds_data(work, run):
                for blob in data_blobs(run).values():
                    candidates.pop(bytes.fromhex(blob.digest.removeprefix("sha256:")), None)


def _holds_data(work: Work, run: Run) -> bool:
    if run.state in (RunState.SUCCEEDED, RunState.CANCELLED):
        return not work.older_than(run.end_time, work.grace.unreferenced_s)
    return True


async def _condemn(work: Work, tenant: str, candidates: _Candidates) -> None:
    prefix = work.keys.family("blobs", tenant)
    for batch in in_batches(list(candidates.items()), _BATCH):
        compares = {digest: Compare(prefix + digest.hex().encode(), Field.MOD, it.mod_revision) for digest, it in batch}
        values = await work.store.get([compare.key for compare in compares.values()])
        known = {kv.key: kv for kv in values.values if kv is not None}
        puts: dict[bytes, Put] = {}
        for digest, compare in compares.items():
            kv = known.get(compare.key)
            if kv is None or kv.mod_revision != compare.revision:
                work.report.num_races_lost += 1
                continue
            record = replace(work.tables.codecs.blob.decode(kv), state=BlobState.CONDEMNED, update_time=now())
            puts[digest] = Put(compare.key, work.tables.codecs.blob.encode(record))
        at_once = [compares[digest] for digest in puts]
        if work.dry_run or (puts and await work.commit(at_once, list(puts.values()))):
            condemned = set(puts)
        else:
            condemned = {digest for digest, put in puts.items() if await work.commit([compares[digest]], [put])}
            work.report.num_races_lost += len(puts) - len(condemned)
        for digest in condemned:
            work.report.num_blobs_condemned += 1
            work.report.num_bytes_condemned += candidates[digest].size_bytes
            work.report.example(f"tenants/{tenant}/blobs/sha256:{digest.hex()}")
