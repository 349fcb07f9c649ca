"""A catalog with an object store, and a garbage collector over both."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from unit.catalog.catalog_lab import Lab, digest_of

from mint_blobs.memory import MemoryObjectStore
from mint_catalog.model.records import BlobRecord, BlobState, RevisionState, now
from mint_catalog.storage.duty import Duties
from mint_catalog.storage.store import Put, prefix_end
from mint_catalog.upkeep.garbage import GarbageCollector, Grace, Report
from mint_core.names import BlobName

__all__ = ["NO_GRACE", "GarbageLab"]

NO_GRACE = Grace(unreferenced_s=0, condemned_s=0, undelete_s=0)


class GarbageLab(Lab):
    """What is put is uploaded too; ``grace`` counts."""

    def __init__(
        self, grace: Grace = NO_GRACE, *, store: Any = None, objects: Any = None, chunk: int = 100_000
    ) -> None:
        super().__init__(store)
        self.objects = MemoryObjectStore() if objects is None else objects
        self.duties = Duties(self.store, self.keys)
        self.garbage = GarbageCollector(self.store, self.tables, self.objects, self.duties, grace, chunk=chunk)

    async def put(self, text: str, tenant: str = "acme") -> BlobName:
        """Store a blob as the exporter does."""
        name = BlobName(tenant, digest_of(text))
        record = await self.blobs.stage(name, len(text))
        if record.state is not BlobState.VERIFIED:
            await self.objects.put_bytes(record.object_key, text.encode())
            await self.blobs.verify(name, record.object_key)
        return name

    async def collect(self, *, dry_run: bool = False) -> Report:
        """One whole collection."""
        last = Report()
        async for progress in self.garbage.collect(dry_run=dry_run):
            last = progress.report
        return last

    async def age(self, name: BlobName, by: timedelta) -> None:
        """Let a blob's record look older."""
        ref = self.tables.blob(name)
        (kv,) = (await self.store.get([ref.key])).values
        record = ref.codec.decode(kv)
        older = replace(record, update_time=(record.update_time or now()) - by)
        await self.store.txn([], [Put(ref.key, ref.codec.encode(older))])

    async def records(self) -> dict[str, BlobRecord]:
        """All blob records of the tenant acme by their digest."""
        prefix = self.keys.family("blobs", "acme")
        values = (await self.store.scan(prefix, prefix_end(prefix), limit=10_000)).values
        found = map(self.codecs.blob.decode, values)
        return {record.name.digest: record for record in found}

    async def object_keys(self) -> set[str]:
        return {info.key async for info in self.objects.list("")}

    async def check_revisions_have_blobs(self) -> int:
        """No revision that can be served lacks its bytes; returns how many there are."""
        prefix = self.keys.family("revisions")
        held = await self.object_keys()
        num_revisions = 0
        for kv in (await self.store.scan(prefix, prefix_end(prefix), limit=10_000)).values:
            revision = self.codecs.revision.decode(kv)
            if revision.state is RevisionState.DELETED:
                continue
            num_revisions += 1
            assert revision.blob is not None
            assert revision.object_key in held, f"{revision.name} lost its object"
            record = await self.blobs.get(BlobName(revision.name.tenant, revision.blob.digest))
            assert (record.state, record.object_key) == (BlobState.VERIFIED, revision.object_key)
        return num_revisions
