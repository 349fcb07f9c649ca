"""How bytes become a verified blob: stage, upload, read back, mark verified. Any step may be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mint_blobs import ObjectStore
from mint_core import failpoints, log
from mint_core.errors import (
    Aborted,
    AlreadyExists,
    BlobCorrupt,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from mint_core.names import BlobName
from mint_exporter.model import BlobRecord, Catalog

__all__ = ["BlobKeeper", "store_trouble"]

_STAGED = failpoints.declare("exporter.staged", "an object key was given out, no bytes are stored")
_UPLOADED = failpoints.declare("exporter.uploaded", "the blob's bytes are stored, not yet read back")
_READ_BACK = failpoints.declare("exporter.read_back", "the stored bytes have the digest, the catalog does not know yet")
_VERIFIED = failpoints.declare("exporter.verified", "the catalog knows the blob as verified, nothing names it")

_MAX_STAGES = 4

_log = log.get_logger(__name__)


@contextlib.contextmanager
def store_trouble() -> Iterator[None]:
    """The object store's refusal of *our* credentials or bucket is no fault of the caller: for it, we are away."""
    try:
        yield
    except (Unauthenticated, PermissionDenied, FailedPrecondition) as error:
        _log.error("the object store refuses this exporter", extra={"fields": {"error": error.message}})
        raise Unavailable(
            "the object store refuses this exporter; its operator finds the reason in the log", retry_after_s=30.0
        ) from error


@contextlib.contextmanager
def verified_bytes(digest: str) -> Iterator[None]:
    """Inside, an object that is not there is lost: the catalog has it as verified."""
    try:
        yield
    except NotFound as error:
        raise BlobCorrupt(
            f"the stored bytes of {digest} are gone: upload them again or restore the object",
            metadata={"digest": digest},
        ) from error


class BlobKeeper:
    """Keeps files in the object store under records of the catalog."""

    def __init__(self, catalog: Catalog, store: ObjectStore) -> None:
        self._catalog = catalog
        self._store = store

    async def keep(self, name: BlobName, path: Path, size_bytes: int, *, read_from: str = "") -> BlobRecord:
        """Store ``path``, whose digest is ``name.digest``, unless it is stored and verified already.

        ``read_from`` is the object key from which ``path`` was just brought and found to have the digest: if that is
        where the catalog wants the blob, the trainer has stored it there and it has been read back.

        Raises ``DigestMismatch`` if the file has another digest, ``BlobCorrupt`` if the store does not give back what
        it was given, ``Unavailable`` if store or catalog are away.
        """
        for _ in range(_MAX_STAGES):
            record = await self._catalog.stage_blob(name, size_bytes)
            if record.is_verified:
                return record
            await _STAGED.reached()
            if record.object_key != read_from:
                await self._store_and_read_back(record, path)
            await _READ_BACK.reached()
            try:
                verified = await self._catalog.verify_blob(name, record.object_key)
            except (Aborted, NotFound):
                continue  # staged anew meanwhile, by garbage collection or another writer: upload there
            await _VERIFIED.reached()
            return verified
        raise Aborted(f"{name} was staged anew {_MAX_STAGES} times while it was stored; retry")

    async def _store_and_read_back(self, record: BlobRecord, path: Path) -> None:
        name = record.name
        with store_trouble():
            try:
                await self._store.put_file(record.object_key, path, digest=name.digest)
            except AlreadyExists as error:
                raise BlobCorrupt(
                    f"the object key staged for {name} holds other bytes: delete that object and retry",
                    metadata={"resource": str(name), "key": record.object_key},
                ) from error
            await _UPLOADED.reached()
            await self._store.verify(record.object_key, digest=name.digest, size_bytes=record.size_bytes)
