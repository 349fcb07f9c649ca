"""An exporter for unit tests, over a catalog in memory that makes the promises of the real one without etcd."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mint_blobs.digests import digest_bytes, digest_file_sync
from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import (
    Aborted,
    AlreadyExists,
    BaseModelMismatch,
    BlobMissing,
    DigestMismatch,
    LeaseHeld,
    LeaseLost,
    NotFound,
)
from mint_core.names import BlobName, PolicyName, RevisionName
from mint_core.signing import Signer
from mint_exporter.export import Exporter
from mint_exporter.imports import Importer
from mint_exporter.model import (
    BlobRecord,
    Exported,
    Fence,
    Limits,
    Lineage,
    PolicyBase,
    Publication,
    Published,
    RevisionBlob,
    SavedWeights,
)
from mint_exporter.publishing import Publisher
from mint_exporter.reading import Reader
from mint_exporter.scratch import Scratch
from mint_lora import pack
from support.adapters import BASE_DIGEST, config_for, moe_shapes, write_adapter

__all__ = ["FENCE", "MIB", "POLICY", "RUN", "Bench", "MemoryCatalog", "MemoryRevision", "exporter_bench"]

POLICY = PolicyName("acme", "support")
FENCE = Fence(str(POLICY), 7)
RUN = Lineage(run="tenants/acme/runs/r1", step=20)
MIB = 1 << 20


@dataclass(frozen=True)
class MemoryRevision:
    """A published revision."""

    number: int
    publication: Publication


@dataclass
class MemoryCatalog:
    """A :class:`mint_exporter.model.Catalog` over dictionaries."""

    policies: dict[PolicyName, PolicyBase] = field(default_factory=dict)
    fences: dict[PolicyName, int] = field(default_factory=dict)
    blobs: dict[BlobName, BlobRecord] = field(default_factory=dict)
    revisions: dict[PolicyName, list[MemoryRevision]] = field(default_factory=dict)
    architectures: dict[str, str] = field(default_factory=dict)
    num_stagings: int = 0
    num_condemnations: int = 0
    """How many times garbage collection condemns a blob just before it would be published."""

    def add(self, policy: PolicyName, *, fence: int | None = 7, base_digest: str = BASE_DIGEST) -> PolicyName:
        self.policies[policy] = PolicyBase("tiny", base_digest)
        self.revisions[policy] = []
        if fence is not None:
            self.fences[policy] = fence
        return policy

    async def policy_base(self, policy: PolicyName) -> PolicyBase:
        if policy not in self.policies:
            raise NotFound(f"there is no policy {policy}")
        return self.policies[policy]

    async def architecture(self, base_model: str) -> str:
        return self.architectures.get(base_model, "")

    async def revision_blob(self, name: RevisionName) -> RevisionBlob:
        history = self.revisions.get(name.parent, [])
        if not 0 < name.number <= len(history):
            raise NotFound(f"there is no {name}")
        record = self.blobs[history[name.number - 1].publication.blob]
        return RevisionBlob(name, record.name.digest, record.size_bytes, record.object_key)

    async def holds(self, policy: PolicyName, fence: Fence) -> bool:
        return self.fences.get(policy) == fence.token

    async def get_blob(self, name: BlobName) -> BlobRecord | None:
        return self.blobs.get(name)

    async def stage_blob(self, name: BlobName, size_bytes: int) -> BlobRecord:
        known = self.blobs.get(name)
        if known is None:
            key = f"tenants/{name.tenant}/blobs/{name.digest.removeprefix('sha256:')}/{secrets.token_hex(8)}"
            known = self.blobs[name] = BlobRecord(name, size_bytes, key, is_verified=False)
            self.num_stagings += 1
        if known.size_bytes != size_bytes:
            raise DigestMismatch(f"{name} is stored with {known.size_bytes} bytes")
        return known

    async def verify_blob(self, name: BlobName, object_key: str) -> BlobRecord:
        known = self.blobs.get(name)
        if known is None:
            raise NotFound(f"there is no blob {name}")
        if known.object_key != object_key:
            raise Aborted(f"{name} is not staged under {object_key} any more")
        self.blobs[name] = replace(known, is_verified=True)
        return self.blobs[name]

    async def publish(
        self, policy: PolicyName, publication: Publication, fence: Fence | None, request_id: str
    ) -> Published:
        if self.num_condemnations:
            self.num_condemnations -= 1
            del self.blobs[publication.blob]
        history = self.revisions[policy]
        lineage = publication.lineage
        for known in history:
            same = known.publication.lineage
            if lineage.run and (same.run, same.step) == (lineage.run, lineage.step):
                if known.publication.blob != publication.blob:
                    raise AlreadyExists(f"step {lineage.step} was published with another digest")
                return Published(known, 1)
        if fence is None and policy in self.fences:
            raise LeaseHeld(f"{policy} is leased")
        if fence is not None and self.fences.get(policy) != fence.token:
            raise LeaseLost(f"fence {fence.token} was superseded")
        record = self.blobs.get(publication.blob)
        if record is None or not record.is_verified:
            raise BlobMissing(f"{publication.blob} is not verified")
        if publication.config.base_digest != self.policies[policy].base_digest:
            raise BaseModelMismatch("another base")
        history.append(MemoryRevision(len(history) + 1, publication))
        return Published(history[-1], 1)


@dataclass
class Bench:
    """Everything an exporter does, over a catalog and a store in memory."""

    catalog: MemoryCatalog
    store: MemoryObjectStore
    scratch: Scratch
    exporter: Exporter
    importer: Importer
    reader: Reader
    work: Path

    async def save(self, *, seed: int = 0, tenant: str = "acme", **changes: object) -> SavedWeights:
        shapes = moe_shapes()
        path = self.work / secrets.token_hex(4)
        write_adapter(path, shapes, config_for(shapes, **changes), seed=seed)
        digest = digest_file_sync(path)
        key = f"tenants/{tenant}/states/support/r1/{seed:08d}-7/weights.safetensors"
        info = await self.store.put_file(key, path, digest=digest)
        return SavedWeights(key, digest, info.size_bytes)

    async def save_for_export(self, *, seed: int = 0) -> SavedWeights:
        """As the trainer does: the blob itself, where the catalog wants it."""
        shapes = moe_shapes()
        path = self.work / secrets.token_hex(4)
        write_adapter(path, shapes, config_for(shapes), seed=seed)
        packed = pack(path, path.with_suffix(".packed"))
        record = await self.catalog.stage_blob(BlobName("acme", packed.digest), packed.size_bytes)
        await self.store.put_file(record.object_key, packed.path, digest=packed.digest)
        return SavedWeights(record.object_key, packed.digest, packed.size_bytes)

    async def upload(self, data: bytes, *, tenant: str = "acme") -> BlobName:
        """A verified blob."""
        name = BlobName(tenant, digest_bytes(data))
        record = await self.catalog.stage_blob(name, len(data))
        await self.store.put_bytes(record.object_key, data)
        await self.catalog.verify_blob(name, record.object_key)
        return name

    async def export(self, weights: SavedWeights, fence: Fence = FENCE, lineage: Lineage = RUN) -> Exported:
        return await self.exporter.export(POLICY, weights, fence, lineage, "")

    @property
    def revisions(self) -> list[MemoryRevision]:
        return self.catalog.revisions[POLICY]

    def limit(self, **changes: int) -> None:
        """Other limits than the bench began with."""
        for part in (self.exporter, self.importer, self.exporter._publisher):
            part._limits = replace(part._limits, **changes)

    def assert_sound(self) -> None:
        """No revision names bytes that are not there, and nothing is left on disk."""
        for revision in self.revisions:
            record = self.catalog.blobs[revision.publication.blob]
            assert record.is_verified
            assert self.store._objects[record.object_key].info.digest == record.name.digest
        assert self.scratch.used_bytes == 0
        assert list(self.scratch._part.iterdir()) == []


@contextlib.asynccontextmanager
async def exporter_bench(folder: Path, signer: Signer | None = None) -> AsyncIterator[Bench]:
    """One policy, whose fence is 7; at most 8 MiB and rank 16."""
    catalog, store = MemoryCatalog(), MemoryObjectStore()
    catalog.add(POLICY)
    limits = Limits(max_adapter_bytes=8 * MIB, max_rank=16, max_exports=2, max_archive_bytes=16 * MIB)
    publisher = Publisher(catalog, store, limits, signer)
    working = asyncio.Semaphore(2)
    async with Scratch(folder / "scratch", 64 * MIB) as scratch:
        yield Bench(
            catalog,
            store,
            scratch,
            Exporter(catalog, store, scratch, publisher, limits, working),
            Importer(catalog, store, scratch, publisher, limits, working),
            Reader(catalog, store, scratch),
            folder,
        )
