"""Where a backup lies: a file, standard input or output (``-``), or an object in S3.

The form is gzip over the messages of the backup, each with its length as 4 bytes, big endian, before it. gzip's own
checksum tells damage on the way; the trailer's digest tells it from end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from google.protobuf.message import DecodeError

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_blobs.settings import ObjectStoreSettings
from mint_core.errors import DataLoss, FailedPrecondition, InvalidArgument
from mint_core.files import atomic_file
from mint_core.threads import run_to_end

__all__ = ["BackupPlace", "BackupReader", "write_backup"]

_LENGTH_BYTES: Final = 4
_MAX_MESSAGE: Final = 64 << 20
_CHUNK: Final = 1 << 20
_GZIP: Final = 31  # zlib's window bits for a gzip stream
_LEVEL: Final = 1  # digests do not shrink further, and more effort would be slower than the catalog
_MODE: Final = 0o600  # it holds the records of all tenants


@dataclass(frozen=True, slots=True)
class BackupPlace:
    """A file (``path``), ``-``, or an object (``bucket`` and ``key``)."""

    text: str
    path: Path | None = None
    bucket: str = ""
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of a path, ``-`` or ``s3://BUCKET/KEY``. Raises ``InvalidArgument``."""
        if text == "-":
            return cls(text)
        if text.startswith("s3://"):
            bucket, slash, key = text.removeprefix("s3://").partition("/")
            if not (bucket and slash and key):
                raise InvalidArgument(f"the place is {text!r}: expected s3://BUCKET/KEY", field="place")
            return cls(text, None, bucket, key)
        return cls(text, Path(text))

    @property
    def is_standard_stream(self) -> bool:
        return self.text == "-"

    @contextlib.asynccontextmanager
    async def writing(self, store: ObjectStoreSettings) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
        """Gives what appends bytes. The file or object appears, whole and durable, when the block ends well."""
        if self.key:
            from mint_blobs.streams import writing_stream

            async with writing_stream(store.model_copy(update={"bucket": self.bucket}), self.key) as stream:
                yield stream.write
        elif self.path is None:
            yield _appending(sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            if not self.path.parent.is_dir():
                raise InvalidArgument(f"the folder {self.path.parent} does not exist: make it first", field="place")
            with atomic_file(self.path) as file:
                os.fchmod(file.fileno(), _MODE)
                yield _appending(file)

    async def reading(self, store: ObjectStoreSettings) -> AsyncGenerator[bytes, None]:
        """The bytes that lie there. Raises ``NotFound``, ``InvalidArgument``, ``Unavailable``."""
        if self.key:
            from mint_blobs.streams import read_stream

            stream = read_stream(store.model_copy(update={"bucket": self.bucket}), self.key)
            async with contextlib.aclosing(stream):
                async for data in stream:
                    yield data
        elif self.path is None:
            while data := await asyncio.to_thread(sys.stdin.buffer.read, _CHUNK):
                yield data
        else:
            try:
                file = self.path.open("rb")
            except OSError as error:
                raise InvalidArgument(f"cannot read {self.path}: {error.strerror}", field="place") from error
            with file:
                while data := await asyncio.to_thread(file.read, _CHUNK):
                    yield data


def _appending(file: BinaryIO | Any) -> Callable[[bytes], Awaitable[None]]:
    async def write(data: bytes) -> None:
        try:
            await run_to_end(file.write, data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise FailedPrecondition(f"cannot write the backup: {error.strerror}; make room or name a place") from error

    return write


async def write_backup(
    parts: AsyncIterator[pb.BackupResponse], write: Callable[[bytes], Awaitable[None]], progress: Callable[[int], None]
) -> pb.BackupTrailer:
    """Write the parts down; ``progress`` is told the number of records so far.

    Raises ``DataLoss`` when the stream ends without a trailer or has another number of records than it says.
    """
    packing = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    num_records = 0
    trailer: pb.BackupTrailer | None = None
    async for part in parts:
        message = part.SerializeToString()
        data = await asyncio.to_thread(packing.compress, len(message).to_bytes(_LENGTH_BYTES) + message)
        if data:
            await write(data)
        num_records += len(part.records.records)
        progress(num_records)
        if part.HasField("trailer"):
            trailer = part.trailer
    await write(packing.flush())
    if trailer is None or trailer.num_records != num_records:
        told = "none" if trailer is None else str(trailer.num_records)
        raise DataLoss(f"the backup ended after {num_records} records, its trailer tells {told}: make it again")
    return trailer


class BackupReader:
    """Reads the parts of a backup. A damaged one ends the stream early, which the catalog refuses; ``failure`` says why
    here."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], place: str, progress: Callable[[int], None]) -> None:
        self._chunks = chunks
        self._place = place
        self._progress = progress
        self.failure: Exception | None = None

    async def parts(self) -> AsyncIterator[pb.RestoreRequest]:
        """The messages, of the same form as a backup's; ends at the first failure."""
        num_records = 0
        try:
            async with contextlib.aclosing(self._messages()) as messages:
                async for message in messages:
                    part = self._parsed(message)
                    num_records += len(part.records.records)
                    self._progress(num_records)
                    yield part
        except Exception as error:  # noqa: BLE001 - the catalog must see an end, not a call that was cut off
            self.failure = error

    def _parsed(self, message: bytes) -> pb.RestoreRequest:
        try:
            return pb.RestoreRequest.FromString(message)
        except DecodeError as error:
            raise self._damaged("something else than messages of a backup") from error

    async def _messages(self) -> AsyncGenerator[bytes, None]:
        pending = bytearray()
        async with contextlib.aclosing(self._unpacked()) as unpacked:
            async for data in unpacked:
                pending += data
                while len(pending) >= _LENGTH_BYTES:
                    end = _LENGTH_BYTES + int.from_bytes(pending[:_LENGTH_BYTES])
                    if end > _MAX_MESSAGE:
                        raise self._damaged("a message of an impossible length")
                    if len(pending) < end:
                        break
                    yield bytes(pending[_LENGTH_BYTES:end])
                    del pending[:end]
        if pending:
            raise self._damaged("half a message at its end")

    async def _unpacked(self) -> AsyncGenerator[bytes, None]:
        unpacking = zlib.decompressobj(_GZIP)
        async with contextlib.aclosing(self._chunks):
            async for chunk in self._chunks:
                data = chunk
                while data and not unpacking.eof:
                    try:
                        plain = await asyncio.to_thread(unpacking.decompress, data, _CHUNK)
                    except zlib.error as error:
                        raise self._damaged(f"bytes that do not unpack ({error})") from error
                    if plain:
                        yield plain
                    data = unpacking.unconsumed_tail
        if not unpacking.eof:
            raise self._damaged("an early end")

    def _damaged(self, what: str) -> DataLoss:
        return DataLoss(f"{self._place} is no whole backup, it has {what}: use another one; nothing was restored")
