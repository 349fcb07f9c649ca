"""The way of one export: fetch a training state's weights, then pack, sign, keep and publish them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mint_blobs import ObjectStore
from mint_core import failpoints
from mint_core.errors import InvalidArgument, NotFound, ResourceExhausted
from mint_core.names import PolicyName
from mint_core.threads import run_to_end
from mint_exporter.keeping import store_trouble
from mint_exporter.model import Catalog, Exported, Fence, Limits, Lineage, SavedWeights
from mint_exporter.publishing import Publisher, timed
from mint_exporter.scratch import Scratch
from mint_lora import AdapterConfig, read_header

__all__ = ["Exporter"]

_FETCHED = failpoints.declare("exporter.fetched", "the state's weights are on the exporter's disk")


class Exporter:
    """Exports training states."""

    def __init__(
        self,
        catalog: Catalog,
        store: ObjectStore,
        scratch: Scratch,
        publisher: Publisher,
        limits: Limits,
        working: asyncio.Semaphore,
    ) -> None:
        """``working`` bounds what is packed and stored at one time, with whoever shares it."""
        self._catalog = catalog
        self._store = store
        self._scratch = scratch
        self._publisher = publisher
        self._limits = limits
        self._working = working

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
        if weights.size_bytes > self._limits.max_adapter_bytes:
            raise ResourceExhausted(
                f"the weights have {weights.size_bytes} bytes, allowed are {self._limits.max_adapter_bytes} "
                "(max_adapter_bytes)"
            )
        base = await self._catalog.policy_base(policy)
        # Unequal ranks are padded, so before the header is read the blob's size has no other bound.
        room = await self._scratch.room(weights.size_bytes + self._limits.max_adapter_bytes)
        async with room as folder, self._working:
            source = folder / "weights"
            try:
                _, fetch_ms = await timed(self._fetch(weights, source))
            except NotFound:
                # Who lost the lease is told so first: its states may have been collected since.
                await self._publisher.require_lease(policy, fence)
                raise
            await _FETCHED.reached()
            config = await run_to_end(_own_config, source)
            return await self._publisher.publish(
                policy, source, config, base, lineage, fence, request_id, fetch_ms=fetch_ms, fetched=weights
            )

    async def _fetch(self, weights: SavedWeights, path: Path) -> None:
        with store_trouble():
            await self._store.get_file(
                weights.key, path, digest=weights.digest, size_bytes=weights.size_bytes, durable=False
            )


def _own_config(source: Path) -> AdapterConfig:
    return AdapterConfig.from_metadata(read_header(source).metadata, file_name=source.name)
