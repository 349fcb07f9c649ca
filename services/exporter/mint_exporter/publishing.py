"""The second half of every export and import: pack, sign, keep, publish.

Nothing before the publication is visible, and the publication is one transaction of the catalog, idempotent by
(policy, run, step) and by request id. So an export may be killed anywhere and repeated: there is nothing, or exactly
one revision.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from mint_blobs import ObjectStore
from mint_core import failpoints
from mint_core.clock import monotonic_s
from mint_core.errors import BaseModelMismatch, BlobMissing, LeaseLost, ResourceExhausted
from mint_core.names import BlobName, PolicyName
from mint_core.signing import Signer
from mint_core.threads import run_to_end
from mint_exporter.keeping import BlobKeeper
from mint_exporter.model import (
    Catalog,
    Exported,
    Fence,
    Limits,
    Lineage,
    PolicyBase,
    Publication,
    Published,
    SavedWeights,
    Timings,
)
from mint_lora import AdapterConfig, PackedAdapter, pack

__all__ = ["Publisher", "timed"]

_PACKED = failpoints.declare("exporter.packed", "the blob is packed on the exporter's disk, nothing is stored")
_PUBLISHED = failpoints.declare("exporter.published", "the revision is published, the answer is not sent yet")

_MAX_PUBLICATIONS = 3
_T = TypeVar("_T")


class Publisher:
    """Makes revisions out of adapters on this exporter's disk."""

    def __init__(self, catalog: Catalog, store: ObjectStore, limits: Limits, signer: Signer | None = None) -> None:
        """``signer`` vouches for everything that is published from here."""
        self._catalog = catalog
        self._limits = limits
        self._signer = signer
        self._keeper = BlobKeeper(catalog, store)

    async def publish(
        self,
        policy: PolicyName,
        source: Path,
        config: AdapterConfig,
        base: PolicyBase,
        lineage: Lineage,
        fence: Fence | None,
        request_id: str,
        *,
        fetch_ms: float,
        fetched: SavedWeights | None = None,
    ) -> Exported:
        """Publish the adapter in ``source``; the blob is written beside it.

        ``fetched`` says which object ``source`` is a checked copy of: one that is a packed blob already is not packed
        again, nor stored again if it lies where the catalog wants it.

        Raises ``BaseModelMismatch``, ``InvalidArgument``, ``ResourceExhausted``, ``LeaseLost``, and the errors of
        ``BlobKeeper.keep`` and ``Catalog.publish``.
        """
        blob = source.with_name("packed")
        digest = fetched.digest if fetched is not None else None
        packed, pack_ms = await timed(run_to_end(self._pack, source, blob, config, base, digest))
        await _PACKED.reached()
        read_from = fetched.key if fetched is not None and packed.path == source else ""
        published, upload_ms, publish_ms = await self._keep_and_publish(
            policy, packed, lineage, fence, request_id, read_from
        )
        await _PUBLISHED.reached()
        return Exported(published, Timings(fetch_ms, pack_ms, upload_ms, publish_ms))

    async def require_lease(self, policy: PolicyName, fence: Fence) -> None:
        """Raise :class:`LeaseLost` unless ``fence`` is the policy's present one."""
        if not await self._catalog.holds(policy, fence):
            raise LeaseLost(
                f"the lease on {policy} with fence {fence.token} has ended or was superseded: nothing was published",
                metadata={"resource": str(policy), "fence": str(fence.token)},
            )

    def _pack(
        self, source: Path, blob: Path, config: AdapterConfig, base: PolicyBase, source_digest: str | None
    ) -> PackedAdapter:
        if config.base_digest != base.base_digest:
            raise BaseModelMismatch(
                f"the weights were trained on base {config.base_model} ({config.base_digest}), the policy's base is "
                f"{base.base_model} ({base.base_digest}): export them to a policy of their own base",
                metadata={"adapter_base_digest": config.base_digest, "base_digest": base.base_digest},
            )
        packed = pack(
            source,
            blob,
            config,
            max_size_bytes=self._limits.max_adapter_bytes,
            source_digest=source_digest,
            durable=False,
        )
        if packed.config.rank > self._limits.max_rank:
            raise ResourceExhausted(
                f"the adapter has rank {packed.config.rank}, allowed is {self._limits.max_rank} (max_rank)"
            )
        return packed

    async def _keep_and_publish(
        self,
        policy: PolicyName,
        packed: PackedAdapter,
        lineage: Lineage,
        fence: Fence | None,
        request_id: str,
        read_from: str,
    ) -> tuple[Published, float, float]:
        name, config = BlobName(policy.tenant, packed.digest), packed.config
        signature = self._signer.sign(policy.tenant, packed.digest, config.base_digest) if self._signer else None
        publication = Publication(name, packed.size_bytes, packed.num_tensors, config, lineage, signature)
        known = await self._catalog.get_blob(name)
        if fence is not None and (known is None or not known.is_verified):
            # Nothing is stored for a superseded holder. A repeated export finds its blob verified and asks the catalog,
            # which answers what it published even after the lease was given back.
            await self.require_lease(policy, fence)
        for attempt in range(1, _MAX_PUBLICATIONS + 1):
            _, upload_ms = await timed(self._keeper.keep(name, packed.path, packed.size_bytes, read_from=read_from))
            try:
                published, publish_ms = await timed(self._catalog.publish(policy, publication, fence, request_id))
            except BlobMissing:
                # Garbage collection condemned the blob between the two calls; it is staged anew.
                if attempt == _MAX_PUBLICATIONS:
                    raise
                continue
            return published, upload_ms, publish_ms
        raise AssertionError("the last attempt returns or raises")


async def timed(work: Awaitable[_T]) -> tuple[_T, float]:
    """The result and the milliseconds it took."""
    began_s = monotonic_s()
    result = await work
    return result, (monotonic_s() - began_s) * 1000
