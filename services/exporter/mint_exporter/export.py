"""The way of one export: fetch, pack, keep, publish.

Nothing before the publication is visible, and the publication is one transaction of the catalog, idempotent by
(policy, run, step) and by request id. So an export may be killed anywhere and repeated: there is nothing, or exactly
one revision.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mint_blobs import ObjectStore
from mint_core import failpoints
from mint_core.clock import monotonic_s
from mint_core.errors import BaseModelMismatch, BlobMissing, InvalidArgument, LeaseLost, NotFound, ResourceExhausted
from mint_core.names import BlobName, PolicyName, check_digest
from mint_core.threads import run_to_end
from mint_exporter.keeping import BlobKeeper, store_trouble, verified_bytes
from mint_exporter.model import (
    Catalog,
    Exported,
    Fence,
    Lineage,
    PolicyBase,
    Publication,
    Published,
    SavedWeights,
    Timings,
)
from mint_exporter.scratch import Scratch
from mint_lora import AdapterConfig, PackedAdapter, config_from_peft, pack, read_header

__all__ = ["Exporter", "Limits"]

_FETCHED = failpoints.declare("exporter.fetched", "the state's weights are on the exporter's disk")
_PACKED = failpoints.declare("exporter.packed", "the blob is packed on the exporter's disk, nothing is stored")
_PUBLISHED = failpoints.declare("exporter.published", "the revision is published, the answer is not sent yet")

_MAX_PUBLICATIONS = 3
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one exporter."""

    max_adapter_bytes: int
    max_rank: int
    max_exports: int
    """Exports worked on at one time."""


class Exporter:
    """Exports training states and imports PEFT adapters."""

    def __init__(self, catalog: Catalog, store: ObjectStore, scratch: Scratch, limits: Limits) -> None:
        self._catalog = catalog
        self._store = store
        self._scratch = scratch
        self._limits = limits
        self._keeper = BlobKeeper(catalog, store)
        self._working = asyncio.Semaphore(limits.max_exports)

    async def export(
        self, policy: PolicyName, weights: SavedWeights, fence: Fence, lineage: Lineage, request_id: str
    ) -> Exported:
        """Pack a state's weights, keep the blob, publish it. Errors as documented at ``ExporterService.Export``."""
        weights.check(policy.tenant)
        lineage.check(policy.tenant)
        if fence.resource != str(policy):
            raise InvalidArgument(
                f"fence.resource is {fence.resource[:120]!r}: expected the fence of {policy}", field="fence.resource"
            )
        base = await self._catalog.policy_base(policy)
        try:
            return await self._publish_weights(policy, weights, base, None, lineage, fence, request_id)
        except NotFound:
            # Who lost the lease is told so first: its states may have been collected since.
            await self._require_lease(policy, fence)
            raise

    async def import_revision(
        self, policy: PolicyName, digest: str, adapter_config_json: str, request_id: str
    ) -> Exported:
        """Publish an uploaded PEFT adapter. Errors as documented at ``ExporterService.ImportRevision``."""
        name = BlobName(policy.tenant, check_digest(digest, field="weights.digest"))
        base = await self._catalog.policy_base(policy)
        record = await self._catalog.get_blob(name)
        if record is None or not record.is_verified:
            raise BlobMissing(f"{name} is not stored: upload it first", metadata={"resource": str(name)})
        weights = SavedWeights(record.object_key, name.digest, record.size_bytes)
        return await self._publish_weights(policy, weights, base, adapter_config_json, Lineage(), None, request_id)

    async def _publish_weights(
        self,
        policy: PolicyName,
        weights: SavedWeights,
        base: PolicyBase,
        adapter_config_json: str | None,
        lineage: Lineage,
        fence: Fence | None,
        request_id: str,
    ) -> Exported:
        if weights.size_bytes > self._limits.max_adapter_bytes:
            raise ResourceExhausted(
                f"the weights have {weights.size_bytes} bytes, allowed are {self._limits.max_adapter_bytes} "
                "(max_adapter_bytes)"
            )
        # Unequal ranks are padded, so before the header is read the blob's size has no other bound.
        room = await self._scratch.room(weights.size_bytes + self._limits.max_adapter_bytes)
        async with room as folder, self._working:
            source, blob = folder / "weights", folder / "blob"
            _, fetch_ms = await _timed(self._fetch(weights, source, is_blob=adapter_config_json is not None))
            await _FETCHED.reached()
            packed, pack_ms = await _timed(run_to_end(self._pack, source, blob, base, adapter_config_json))
            await _PACKED.reached()
            published, upload_ms, publish_ms = await self._keep_and_publish(policy, packed, lineage, fence, request_id)
        await _PUBLISHED.reached()
        return Exported(published, Timings(fetch_ms, pack_ms, upload_ms, publish_ms))

    async def _fetch(self, weights: SavedWeights, path: Path, *, is_blob: bool) -> None:
        with store_trouble(), verified_bytes(weights.digest) if is_blob else contextlib.nullcontext():
            await self._store.get_file(weights.key, path, digest=weights.digest, size_bytes=weights.size_bytes)

    def _pack(self, source: Path, blob: Path, base: PolicyBase, adapter_config_json: str | None) -> PackedAdapter:
        header = read_header(source)
        if adapter_config_json is None:
            config = AdapterConfig.from_metadata(header.metadata, file_name=source.name)
        else:
            config = config_from_peft(
                adapter_config_json, header, base_model=base.base_model, base_digest=base.base_digest
            )
        if config.base_digest != base.base_digest:
            raise BaseModelMismatch(
                f"the weights were trained on base {config.base_model} ({config.base_digest}), the policy's base is "
                f"{base.base_model} ({base.base_digest}): export them to a policy of their own base",
                metadata={"adapter_base_digest": config.base_digest, "base_digest": base.base_digest},
            )
        packed = pack(source, blob, config, max_size_bytes=self._limits.max_adapter_bytes)
        if packed.config.rank > self._limits.max_rank:
            raise ResourceExhausted(
                f"the adapter has rank {packed.config.rank}, allowed is {self._limits.max_rank} (max_rank)"
            )
        return packed

    async def _keep_and_publish(
        self, policy: PolicyName, packed: PackedAdapter, lineage: Lineage, fence: Fence | None, request_id: str
    ) -> tuple[Published, float, float]:
        name = BlobName(policy.tenant, packed.digest)
        publication = Publication(name, packed.size_bytes, packed.num_tensors, packed.config, lineage)
        known = await self._catalog.get_blob(name)
        if fence is not None and (known is None or not known.is_verified):
            # Nothing is stored for a superseded holder. A repeated export finds its blob verified and asks the catalog,
            # which answers what it published even after the lease was given back.
            await self._require_lease(policy, fence)
        for attempt in range(1, _MAX_PUBLICATIONS + 1):
            _, upload_ms = await _timed(self._keeper.keep(name, packed.path, packed.size_bytes))
            try:
                published, publish_ms = await _timed(self._catalog.publish(policy, publication, fence, request_id))
            except BlobMissing:
                # Garbage collection condemned the blob between the two calls; it is staged anew.
                if attempt == _MAX_PUBLICATIONS:
                    raise
                continue
            return published, upload_ms, publish_ms
        raise AssertionError("the last attempt returns or raises")

    async def _require_lease(self, policy: PolicyName, fence: Fence) -> None:
        if not await self._catalog.holds(policy, fence):
            raise LeaseLost(
                f"the lease on {policy} with fence {fence.token} has ended or was superseded: nothing was published",
                metadata={"resource": str(policy), "fence": str(fence.token)},
            )


async def _timed(work: Awaitable[_T]) -> tuple[_T, float]:
    """The result and the milliseconds it took."""
    began_s = monotonic_s()
    result = await work
    return result, (monotonic_s() - began_s) * 1000
