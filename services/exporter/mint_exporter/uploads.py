"""Bytes in and out for clients without access to the object store: resumable uploads, verified downloads."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mint_blobs import ObjectStore
from mint_core.clock import monotonic_s
from mint_core.errors import Aborted, DigestMismatch, InvalidArgument, NotFound, ResourceExhausted
from mint_core.names import BlobName
from mint_core.threads import run_to_end
from mint_exporter.keeping import BlobKeeper, store_trouble, verified_bytes
from mint_exporter.model import Catalog
from mint_exporter.scratch import Room, Scratch

__all__ = ["MAX_CHUNK_BYTES", "Chunk", "Uploads"]

MAX_CHUNK_BYTES = 1 << 20
"""Most bytes in one message."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a blob."""

    offset: int
    data: bytes


class _Upload:
    """What has arrived of one blob."""

    def __init__(self, room: Room, size_bytes: int) -> None:
        self.room = room
        self.size_bytes = size_bytes
        self.num_committed = 0
        self.stream = 0
        """Counts the streams that carried it; only the latest may go on."""
        self.touched_s = monotonic_s()
        self.finishing = asyncio.Lock()
        self.is_dropped = False
        self._lock = threading.Lock()
        self._hasher = hashlib.sha256()
        self._file = FileIO(self.path, "xb")

    @property
    def path(self) -> Path:
        return self.room.folder / "upload"

    @property
    def digest(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"

    def append(self, stream: int, chunk: Chunk) -> None:
        """Write and count a chunk, all of it or nothing. Threads of a stream and of its successor may meet here."""
        with self._lock:
            if stream != self.stream or self.is_dropped:
                raise Aborted("a newer stream carries this upload on; ask GetUpload how far it is")
            _check_chunk(chunk, self)
            self._write(chunk.data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._file.truncate(self.num_committed)
            self._file.seek(self.num_committed)
            raise ResourceExhausted(f"the exporter's disk takes no more: {error.strerror}; retry later") from error
        self._hasher.update(data)
        self.num_committed += len(data)
        self.touched_s = monotonic_s()

    def drop(self) -> None:
        """Forget what has arrived."""
        with self._lock:
            self.is_dropped = True
            self._file.close()
        self.room.release()


class Uploads:
    """Uploads in progress, by blob. They end with the process; the client then begins anew."""

    def __init__(
        self, catalog: Catalog, store: ObjectStore, scratch: Scratch, *, max_bytes: int, idle_timeout_s: float
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._idle_timeout_s = idle_timeout_s
        self._keeper = BlobKeeper(catalog, store)
        self._uploads: dict[BlobName, _Upload] = {}

    async def progress(self, name: BlobName) -> tuple[int, bool]:
        """Bytes that have arrived, and whether the blob is stored and verified."""
        record = await self._catalog.get_blob(name)
        if record is not None and record.is_verified:
            return record.size_bytes, True
        upload = self._uploads.get(name)
        return (upload.num_committed if upload else 0), False

    async def receive(self, name: BlobName, size_bytes: int, chunks: AsyncIterator[Chunk]) -> int:
        """Take the rest of a blob and keep it; returns its size once it is stored and verified.

        Errors as documented at ``BlobService.UploadBlob``, and ``Aborted`` when a newer stream carries it on.
        """
        if not 0 < size_bytes <= self._max_bytes:
            if size_bytes > 0:
                raise ResourceExhausted(
                    f"{name} has {size_bytes} bytes, allowed are {self._max_bytes} (max_blob_bytes)"
                )
            raise InvalidArgument(
                f"announcement.size_bytes is {size_bytes}: must be positive", field="announcement.size_bytes"
            )
        record = await self._catalog.get_blob(name)
        if record is not None and record.is_verified:
            return record.size_bytes
        upload = self._begin(name, size_bytes)
        upload.stream += 1
        upload.touched_s = monotonic_s()
        stream = upload.stream
        async for chunk in chunks:
            await run_to_end(upload.append, stream, chunk)
        async with upload.finishing:
            if upload.is_dropped:
                raise Aborted(f"another stream has ended the upload of {name}; ask GetUpload")
            await self._finish(name, upload)
        return size_bytes

    async def download(self, name: BlobName) -> AsyncGenerator[Chunk, None]:
        """The blob in order. It is checked before its first byte is given out: ``NotFound``, ``BlobCorrupt``."""
        record = await self._catalog.get_blob(name)
        if record is None or not record.is_verified:
            raise NotFound(f"there is no blob {name}", metadata={"resource": str(name)})
        async with await self._scratch.room(record.size_bytes) as folder:
            path = folder / "download"
            with store_trouble(), verified_bytes(name.digest):
                await self._store.get_file(
                    record.object_key, path, digest=name.digest, size_bytes=record.size_bytes, durable=False
                )
            with FileIO(path, "rb") as file:
                offset = 0
                while data := await run_to_end(file.read, MAX_CHUNK_BYTES):
                    yield Chunk(offset, data)
                    offset += len(data)

    def drop_idle(self) -> int:
        """Give up uploads that nobody has carried on for long; returns how many."""
        now_s = monotonic_s()
        idle = [
            name
            for name, upload in self._uploads.items()
            if now_s - upload.touched_s > self._idle_timeout_s and not upload.finishing.locked()
        ]
        for name in idle:
            self._uploads.pop(name).drop()
        return len(idle)

    def close(self) -> None:
        """Give up all uploads."""
        while self._uploads:
            self._uploads.popitem()[1].drop()

    def _begin(self, name: BlobName, size_bytes: int) -> _Upload:
        upload = self._uploads.get(name)
        if upload is not None and upload.size_bytes == size_bytes:
            return upload
        if upload is not None:
            self._uploads.pop(name).drop()
        upload = self._uploads[name] = _Upload(self._scratch.room_now(size_bytes), size_bytes)
        return upload

    async def _finish(self, name: BlobName, upload: _Upload) -> None:
        if upload.num_committed < upload.size_bytes:
            raise InvalidArgument(
                f"the upload of {name} ended after {upload.num_committed} of {upload.size_bytes} bytes: carry it on "
                "from there",
                field="chunk",
            )
        if upload.digest != name.digest:
            self._end(name, upload)
            raise DigestMismatch(
                f"the bytes uploaded as {name} have digest {upload.digest}; nothing was kept, upload them again",
                field="announcement.name",
                metadata={"expected": name.digest, "actual": upload.digest},
            )
        # If store or catalog are away now, the bytes stay here and the next stream needs to send none.
        await self._keeper.keep(name, upload.path, upload.size_bytes)
        self._end(name, upload)

    def _end(self, name: BlobName, upload: _Upload) -> None:
        if self._uploads.get(name) is upload:
            del self._uploads[name]
        upload.drop()


def _check_chunk(chunk: Chunk, upload: _Upload) -> None:
    if len(chunk.data) > MAX_CHUNK_BYTES:
        raise InvalidArgument(
            f"chunk.data has {len(chunk.data)} bytes, allowed are {MAX_CHUNK_BYTES}", field="chunk.data"
        )
    if chunk.offset != upload.num_committed:
        raise InvalidArgument(
            f"chunk.offset is {chunk.offset}: expected {upload.num_committed}, the bytes that have arrived",
            field="chunk.offset",
        )
    if chunk.offset + len(chunk.data) > upload.size_bytes:
        raise InvalidArgument(
            f"the chunk ends at {chunk.offset + len(chunk.data)}, announced were {upload.size_bytes} bytes",
            field="chunk.data",
        )
