"""A catalog in memory for the exporter's unit tests: the same promises as the real one, without etcd."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

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
from mint_core.names import BlobName, PolicyName
from mint_exporter.model import BlobRecord, Fence, PolicyBase, Publication, Published
from support.adapters import BASE_DIGEST

__all__ = ["MemoryCatalog", "MemoryRevision"]


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
