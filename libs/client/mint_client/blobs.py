"""Bytes in and out through the exporter, for clients without access to the object store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from mint_api.v1 import blob_service_pb2, blob_service_pb2_grpc, common_pb2
from mint_client._calling import Connection
from mint_core.channel import call, stream
from mint_core.errors import BlobCorrupt, DeadlineExceeded, InvalidArgument, Unavailable
from mint_core.files import atomic_file
from mint_core.names import BlobName

__all__ = ["CHUNK_BYTES", "Blobs"]

CHUNK_BYTES = 1 << 20
"""Size of one chunk; the most the contract allows."""

_MIN_BYTES_PER_S = 1 << 20
_MAX_ATTEMPTS = 5


class Blobs:
    """Upload and download by digest."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    @property
    def _stub(self) -> Any:
        return self._connection.stub(blob_service_pb2_grpc.BlobServiceStub)

    async def upload(self, tenant: str, path: Path) -> common_pb2.BlobRef:
        """Upload the file for ``tenant``; what had arrived before is not sent again.

        Raises :class:`InvalidArgument` if the file cannot be read, and the errors of ``UploadBlob``. An upload
        that breaks is resumed from where the server says it stands, a few times.
        """
        try:
            with path.open("rb") as file:
                digest, size_bytes = await asyncio.to_thread(_digest, file)
                name = str(BlobName(tenant, digest))
                for attempt in range(1, _MAX_ATTEMPTS + 1):
                    try:
                        return await self._upload_rest(name, file, digest, size_bytes)
                    except (Unavailable, DeadlineExceeded) as error:
                        if attempt == _MAX_ATTEMPTS:
                            raise
                        await asyncio.sleep(error.retry_after_s or 1.0)
        except OSError as error:
            raise InvalidArgument(f"cannot read {str(path)!r}: {error.strerror}", field="path") from error
        raise AssertionError("the last attempt returns or raises")

    async def get_upload(self, name: str) -> blob_service_pb2.GetUploadResponse:
        """How much of the upload of ``tenants/{t}/blobs/{digest}`` has arrived."""
        request = blob_service_pb2.GetUploadRequest(name=name)
        response: blob_service_pb2.GetUploadResponse = await call(
            self._stub.GetUpload, request, timeout_s=self._timeout_s
        )
        return response

    async def download(self, name: str, path: Path) -> common_pb2.BlobRef:
        """Bring ``tenants/{t}/blobs/{digest}`` to ``path``, which appears only whole and with the right digest."""
        expected = BlobName.parse(name).digest
        hashed = hashlib.sha256()
        request = blob_service_pb2.DownloadBlobRequest(name=name)
        size_bytes = 0
        with atomic_file(path) as file:
            async for response in stream(self._stub.DownloadBlob, request, timeout_s=3600.0):
                file.write(response.chunk.data)
                hashed.update(response.chunk.data)
                size_bytes += len(response.chunk.data)
            actual = f"sha256:{hashed.hexdigest()}"
            if actual != expected:
                raise BlobCorrupt(
                    f"{name} arrived with digest {actual}; nothing was kept, download again",
                    metadata={"expected": expected, "actual": actual},
                )
        return common_pb2.BlobRef(digest=expected, size_bytes=size_bytes)

    async def _upload_rest(self, name: str, file: BinaryIO, digest: str, size_bytes: int) -> common_pb2.BlobRef:
        progress = await self.get_upload(name)
        if progress.verified:
            return common_pb2.BlobRef(digest=digest, size_bytes=size_bytes)
        requests = _requests(name, file, size_bytes, progress.committed_bytes)
        timeout_s = self._timeout_s + (size_bytes - progress.committed_bytes) / _MIN_BYTES_PER_S
        response = await call(self._stub.UploadBlob, requests, timeout_s=timeout_s)
        return response.blob


def _digest(file: BufferedReader) -> tuple[str, int]:
    hashed = hashlib.file_digest(file, "sha256")
    return f"sha256:{hashed.hexdigest()}", file.tell()


async def _requests(
    name: str, file: BinaryIO, size_bytes: int, offset: int
) -> AsyncIterator[blob_service_pb2.UploadBlobRequest]:
    """The announcement, then the chunks from ``offset``."""
    announcement = blob_service_pb2.UploadAnnouncement(name=name, size_bytes=size_bytes)
    yield blob_service_pb2.UploadBlobRequest(announcement=announcement)
    file.seek(offset)
    while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
        yield blob_service_pb2.UploadBlobRequest(chunk=blob_service_pb2.BlobChunk(offset=offset, data=data))
        offset += len(data)
