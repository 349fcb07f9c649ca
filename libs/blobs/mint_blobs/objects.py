"""The contract of the object store: what its callers may rely on, and what a crash or the cloud may do to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

__all__ = ["ObjectInfo", "ObjectStore", "PartUpload"]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What the store says about one object."""

    key: str
    """The whole key, without the bucket."""

    size_bytes: int
    """Length of the content."""

    digest: str | None
    """``sha256:<hex>`` of the content as recorded when it was put; ``None`` in lists and for foreign objects."""

    modified_at: datetime
    """When the store accepted the object, by the store's clock."""


@dataclass(frozen=True, slots=True)
class PartUpload:
    """An upload in parts that was begun and not completed: invisible, but it takes up space."""

    key: str
    """Where the object would be."""

    upload_id: str
    """The store's name for the upload."""

    started_at: datetime
    """By the store's clock."""


class ObjectStore(Protocol):
    """Bytes by key. No JSON, no tensors, no catalog: only whole objects that are there or not.

    **What may be relied on**

    - An object is visible whole or not at all. A put that was killed leaves nothing under its key (an unfinished
      multipart upload may still occupy space; it is never visible).
    - A put that returned is durable and is seen by every later head, get and list (read after write, as S3 promises
      since 2020).
    - ``if_absent`` is decided by the store in one step (``If-None-Match: *``). Of several writers of one key, one wins;
      those who put the same content also succeed, so that a put whose answer was lost may be repeated. Other content:
      ``AlreadyExists``.
    - Content is checked on both sides. The store refuses a put whose bytes do not have the SHA-256 that goes with it
      (``DigestMismatch``); a get that is given a digest checks what it received (``BlobCorrupt``).
    - ``get_file`` is atomic towards the disk: the path appears complete, verified and synced, or is untouched.

    **What may not be relied on**

    - A call that raised ``Unavailable`` or was cancelled may have happened: repeat it or look with ``head``.
    - ``modified_at`` is the store's clock, with a granularity of a second.
    - ``list`` gives no order and no snapshot: an object put or deleted meanwhile may or may not appear.
    - Keys are immutable by agreement only: ``if_absent=False`` overwrites.

    **Errors of every call**

    - ``Unavailable`` (with ``retry_after_s``): the store did not answer in time, or keeps failing, after the configured
      attempts.
    - ``Unauthenticated``, ``PermissionDenied``: the store refuses the credentials. Not retried.
    - ``FailedPrecondition``: the bucket does not exist.
    - ``InvalidArgument``: the key is malformed.

    Every call has a timeout of its own; a shorter deadline of the caller cancels it cleanly at any await.
    """

    async def ensure_bucket(self) -> None:
        """Create the bucket if it is absent; at start also the proof that address and credentials are right."""
        ...

    async def put_file(self, key: str, path: Path, *, digest: str, if_absent: bool = True) -> ObjectInfo:
        """Put the content of ``path``, in parallel parts where it is large.

        Errors: ``DigestMismatch`` if the file does not have ``digest``, ``AlreadyExists`` if ``if_absent`` and the key
        holds other content, ``InvalidArgument`` if the file cannot be read.
        """
        ...

    async def put_bytes(self, key: str, data: bytes, *, if_absent: bool = True) -> ObjectInfo:
        """Put ``data``. Errors: ``AlreadyExists`` as in :meth:`put_file`."""
        ...

    async def get_file(
        self, key: str, path: Path, *, digest: str, size_bytes: int | None = None, durable: bool = True
    ) -> None:
        """Bring the object to ``path``, by parallel ranges where it is large; the parent folder must exist.

        ``size_bytes`` saves one round trip where it is known. Without ``durable`` nothing is synced: for a file that
        somebody syncs before it counts. Errors: ``NotFound``; ``BlobCorrupt`` if size or digest
        differ, with nothing left on disk; ``ResourceExhausted`` if the disk is full.
        """
        ...

    async def get_bytes(self, key: str, *, digest: str | None = None, max_bytes: int) -> bytes:
        """The content, if it is at most ``max_bytes`` long.

        Errors: ``NotFound``; ``ResourceExhausted`` if it is longer (nothing is read then); ``BlobCorrupt`` if
        ``digest`` is given and differs.
        """
        ...

    async def verify(self, key: str, *, digest: str, size_bytes: int) -> None:
        """Read the whole stored object and check it, without keeping it.

        Errors: ``NotFound``; ``BlobCorrupt`` if size or digest differ.
        """
        ...

    async def head(self, key: str) -> ObjectInfo | None:
        """What the store knows about ``key``; ``None`` if it holds no such object."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (a plain string prefix), without digests."""
        ...

    def list_part_uploads(self, prefix: str) -> AsyncIterator[PartUpload]:
        """Uploads in parts below a key prefix that are not completed: under way, or left behind by a killed process."""
        ...

    async def abort_part_upload(self, upload: PartUpload) -> None:
        """Give the space of such an upload back; no error if it was completed or aborted."""
        ...
