"""PEFT adapters from elsewhere become revisions: uploaded weights, uploaded archives, objects already in the store."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mint_blobs import ObjectStore
from mint_blobs.keys import check_key, import_prefix
from mint_core import failpoints
from mint_core.errors import BlobCorrupt, BlobMissing, DigestMismatch, InvalidArgument, NotFound, ResourceExhausted
from mint_core.names import BlobName, PolicyName, check_digest
from mint_core.threads import run_to_end
from mint_exporter.archives import CONFIG_NAME, WEIGHTS_NAME, extract_adapter, is_archive
from mint_exporter.keeping import store_trouble, verified_bytes
from mint_exporter.model import Catalog, Exported, ImportSource, Limits, Lineage, PolicyBase
from mint_exporter.publishing import Publisher, timed
from mint_exporter.scratch import Scratch
from mint_lora import AdapterConfig, read_peft_folder

__all__ = ["Importer"]

_FETCHED = failpoints.declare("exporter.import.fetched", "what is imported is on the exporter's disk, checked")
_EXTRACTED = failpoints.declare("exporter.import.extracted", "the adapter is a folder on the exporter's disk")

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Object:
    """What is fetched: bytes by key and digest."""

    key: str
    digest: str
    size_bytes: int
    blob: BlobName | None
    """Set if it is a verified blob, so that its absence is a loss."""


class Importer:
    """Imports PEFT adapters."""

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

    async def import_revision(
        self, policy: PolicyName, source: ImportSource, lineage: Lineage, request_id: str
    ) -> Exported:
        """Publish an adapter. Errors as documented at ``ExporterService.ImportRevision``."""
        source.check()
        if lineage.run or lineage.step:
            raise InvalidArgument(
                "lineage.run and lineage.step are of trainings that MinT did itself: leave them out", field="lineage"
            )
        base = await self._catalog.policy_base(policy)
        architecture = await self._catalog.architecture(base.base_model)
        found = await self._find(policy.tenant, source)
        bound = self._limits.max_adapter_bytes if source.weights_digest else self._limits.max_archive_bytes
        if found.size_bytes > bound:
            raise ResourceExhausted(
                f"what is imported has {found.size_bytes} bytes, allowed are {bound} "
                f"({'max_adapter_bytes' if source.weights_digest else 'max_blob_bytes'})"
            )
        # As fetched, as an extracted folder, as packed.
        num_copies = 1 if source.weights_digest else 2
        room = await self._scratch.room(found.size_bytes + num_copies * self._limits.max_adapter_bytes)
        async with room as scratch, self._working:
            folder = scratch / "peft"
            folder.mkdir()
            _, fetch_ms = await timed(self._bring(policy.tenant, found, source, folder))
            weights, config = await run_to_end(_read_folder, folder, base, architecture)
            return await self._publisher.publish(
                policy, weights, config, base, lineage, None, request_id, fetch_ms=fetch_ms
            )

    async def _find(self, tenant: str, source: ImportSource) -> _Object:
        if source.object_key:
            return await self._find_object(tenant, source)
        field = "weights" if source.weights_digest else "archive"
        digest = check_digest(source.weights_digest or source.archive_digest, field=f"{field}.digest")
        name = BlobName(tenant, digest)
        record = await self._catalog.get_blob(name)
        if record is None or not record.is_verified:
            raise BlobMissing(f"{name} is not stored: upload it first", metadata={"resource": str(name)})
        return _Object(record.object_key, digest, record.size_bytes, name)

    async def _find_object(self, tenant: str, source: ImportSource) -> _Object:
        key = check_key(source.object_key, field="object.key")
        # Keys are believed only under the caller's own tenant: the store itself knows no tenants.
        if not key.startswith(import_prefix(tenant)):
            raise InvalidArgument(
                f"object.key is {key[:120]!r}: expected a key below {import_prefix(tenant)}", field="object.key"
            )
        if source.object_digest:
            check_digest(source.object_digest, field="object.blob.digest")
        with store_trouble():
            info = await self._store.head(key)
        if info is None:
            raise NotFound(f"the object store holds no object {key}", metadata={"resource": key})
        digest = source.object_digest or info.digest
        if not digest:
            raise InvalidArgument(
                f"the store has no digest recorded for {key}: give it as sha256:<hex>, as sha256sum prints it",
                field="object.blob.digest",
            )
        return _Object(key, digest, info.size_bytes, None)

    async def _bring(self, tenant: str, found: _Object, source: ImportSource, folder: Path) -> None:
        """Fill ``folder`` with the two files of a PEFT adapter."""
        fetched = folder.with_name("fetched")
        await self._fetch(found, fetched)
        await _FETCHED.reached()
        if source.archive_digest or (bool(source.object_key) and await run_to_end(is_archive, fetched)):
            limits = self._limits
            await run_to_end(extract_adapter, fetched, folder, max_weights_bytes=limits.max_adapter_bytes)
            fetched.unlink()
        else:
            if found.size_bytes > self._limits.max_adapter_bytes:
                raise ResourceExhausted(
                    f"the weights have {found.size_bytes} bytes, allowed are {self._limits.max_adapter_bytes} "
                    "(max_adapter_bytes)"
                )
            text = source.adapter_config_json.encode()
            if source.object_key and not text:
                text = await self._config_beside(tenant, found.key)
            fetched.rename(folder / WEIGHTS_NAME)
            (folder / CONFIG_NAME).write_bytes(text)
        await _EXTRACTED.reached()

    async def _fetch(self, found: _Object, path: Path) -> None:
        lost = verified_bytes(found.digest) if found.blob is not None else contextlib.nullcontext()
        try:
            with store_trouble(), lost:
                await self._store.get_file(found.key, path, digest=found.digest, size_bytes=found.size_bytes)
        except BlobCorrupt as error:
            if found.blob is not None:
                raise
            # Whose bytes these are said their digest: one of the two is wrong, nothing of ours is damaged.
            raise DigestMismatch(
                f"object {found.key} does not have digest {found.digest}: give its own, or put the object again",
                field="object.blob.digest",
                metadata={"key": found.key, "expected": found.digest},
            ) from error

    async def _config_beside(self, tenant: str, key: str) -> bytes:
        beside = str(PurePosixPath(key).with_name(CONFIG_NAME))
        if not beside.startswith(import_prefix(tenant)):
            raise InvalidArgument(f"object.key is {key[:120]!r}: expected an object, not a folder", field="object.key")
        try:
            with store_trouble():
                return await self._store.get_bytes(beside, max_bytes=_MAX_CONFIG_BYTES)
        except NotFound:
            raise InvalidArgument(
                f"there is no object {beside}, and no adapter_config_json is given: put or give one",
                field="adapter_config_json",
            ) from None


def _read_folder(folder: Path, base: PolicyBase, architecture: str) -> tuple[Path, AdapterConfig]:
    return read_peft_folder(folder, base_model=base.base_model, base_digest=base.base_digest, architecture=architecture)
