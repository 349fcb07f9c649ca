"""The in-memory twin of the S3 store: same contract, asked by the same tests. It keeps nothing beyond its own life."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mint_blobs._local import read_source, writing_target
from mint_blobs.digests import digest_bytes
from mint_blobs.keys import check_key
from mint_blobs.objects import ObjectInfo, PartUpload
from mint_core.errors import AlreadyExists, BlobCorrupt, DigestMismatch, NotFound, ResourceExhausted
from mint_core.names import check_digest

__all__ = ["MemoryObjectStore"]


@dataclass(frozen=True, slots=True)
class _Stored:
    data: bytes
    info: ObjectInfo


class MemoryObjectStore:
    """An :class:`~mint_blobs.objects.ObjectStore` in a dictionary."""

    def __init__(self) -> None:
        self._objects: dict[str, _Stored] = {}
        self.part_uploads: builtins.list[PartUpload] = []
        """Uploads in parts under way; this store makes none itself."""

    async def __aenter__(self) -> MemoryObjectStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def ensure_bucket(self) -> None:
        await asyncio.sleep(0)

    async def put_file(self, key: str, path: Path, *, digest: str, if_absent: bool = True) -> ObjectInfo:
        check_digest(digest, field="digest")
        data = await asyncio.to_thread(read_source, path)
        actual = digest_bytes(data)
        if actual != digest:
            raise DigestMismatch(
                f"{path} has digest {actual}, announced was {digest}: nothing was stored", field="digest"
            )
        return await self.put_bytes(key, data, if_absent=if_absent)

    async def put_bytes(self, key: str, data: bytes, *, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        # Every call gives way once: code that forgets to await, or that races, is to fail here as it would on S3.
        await asyncio.sleep(0)
        digest = digest_bytes(data)
        held = self._objects.get(key)
        if if_absent and held is not None:
            if held.info.digest != digest:
                raise AlreadyExists(
                    f"key {key} already holds other content ({held.info.digest}, {held.info.size_bytes} bytes)",
                    metadata={"key": key},
                )
            return held.info
        info = ObjectInfo(key=key, size_bytes=len(data), digest=digest, modified_at=datetime.now(UTC))
        self._objects[key] = _Stored(bytes(data), info)
        return info

    async def get_file(
        self, key: str, path: Path, *, digest: str, size_bytes: int | None = None, durable: bool = True
    ) -> None:
        check_digest(digest, field="digest")
        stored = await self._get(key)
        _check(key, stored.data, digest, size_bytes)
        async with writing_target(path, durable=durable) as file:
            file.write(stored.data)

    async def get_bytes(self, key: str, *, digest: str | None = None, max_bytes: int) -> bytes:
        stored = await self._get(key)
        if len(stored.data) > max_bytes:
            raise ResourceExhausted(
                f"object {key} has {len(stored.data)} bytes, allowed are {max_bytes}", metadata={"key": key}
            )
        if digest is not None:
            _check(key, stored.data, check_digest(digest, field="digest"))
        return stored.data

    async def verify(self, key: str, *, digest: str, size_bytes: int) -> None:
        check_digest(digest, field="digest")
        _check(key, (await self._get(key)).data, digest, size_bytes)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        await asyncio.sleep(0)
        stored = self._objects.get(key)
        return None if stored is None else stored.info

    async def delete(self, key: str) -> None:
        check_key(key)
        await asyncio.sleep(0)
        self._objects.pop(key, None)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await asyncio.sleep(0)
        for key, stored in list(self._objects.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, stored.info.size_bytes, None, stored.info.modified_at)

    async def list_part_uploads(self, prefix: str) -> AsyncIterator[PartUpload]:
        await asyncio.sleep(0)
        for upload in list(self.part_uploads):
            if upload.key.startswith(prefix):
                yield upload

    async def abort_part_upload(self, upload: PartUpload) -> None:
        await asyncio.sleep(0)
        if upload in self.part_uploads:
            self.part_uploads.remove(upload)

    async def _get(self, key: str) -> _Stored:
        check_key(key)
        await asyncio.sleep(0)
        stored = self._objects.get(key)
        if stored is None:
            raise NotFound(f"the object store holds no object {key}", metadata={"key": key})
        return stored


def _check(key: str, data: bytes, digest: str, size_bytes: int | None = None) -> None:
    if size_bytes is not None and size_bytes != len(data):
        raise BlobCorrupt(
            f"object {key} has {len(data)} bytes, expected {size_bytes}: restore it or upload it again",
            metadata={"key": key},
        )
    actual = digest_bytes(data)
    if actual != digest:
        raise BlobCorrupt(
            f"object {key} has digest {actual}, expected {digest}: restore it or upload it again",
            metadata={"key": key, "expected_digest": digest, "actual_digest": actual},
        )
