"""The disk side of transfers: reading what goes up, writing what comes down, with the room's errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

from mint_blobs.digests import format_digest
from mint_core.errors import Internal, InvalidArgument, MintError, ResourceExhausted, Unavailable
from mint_core.files import atomic_file
from mint_core.threads import run_to_end

__all__ = ["ArrivalDigest", "opening_source", "read_source", "write_at", "write_whole", "writing_target"]

_READ_BYTES = 1 << 20
_SYNC_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EISDIR)
_FAILING = (errno.EIO, errno.EROFS)
"""A file system that met errors is often made read-only."""


@contextlib.contextmanager
def opening_source(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is to be uploaded."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}", field="path") from error
    with file:
        yield file


def read_source(path: Path) -> bytes:
    """The whole content of a file that is to be uploaded."""
    with opening_source(path) as file:
        return file.read()


@contextlib.asynccontextmanager
async def writing_target(path: Path, *, durable: bool = True) -> AsyncIterator[BufferedRandom]:
    """:func:`mint_core.files.atomic_file` with its disk waits in a thread, a full disk told as
    :class:`ResourceExhausted`."""
    try:
        target = atomic_file(path, durable=durable)
        file = await run_to_end(target.__enter__)
        try:
            yield file
        except BaseException:  # cancelled or failed: clean up, then pass it on
            await run_to_end(target.__exit__, *sys.exc_info())
            raise
        await run_to_end(target.__exit__, None, None, None)
    except OSError as error:
        raise _disk_error(error, path) from error


def write_whole(path: Path, data: bytes, *, durable: bool) -> None:
    """As :func:`writing_target`, for bytes that are all there; blocks."""
    try:
        with atomic_file(path, durable=durable) as file:
            file.write(data)
    except OSError as error:
        raise _disk_error(error, path) from error


def write_at(file: BufferedRandom, data: bytes, at: int) -> None:
    """Write ``data`` at offset ``at``; its errors are told as this room's, so that a disk failure is not taken for a
    network failure."""
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(file.fileno(), view, at)
            view, at = view[written:], at + written
    except OSError as error:
        raise _disk_error(error, Path(file.name)) from error


class ArrivalDigest:
    """SHA-256 of a file that arrives in ranges, in any order: each is added as soon as all before it are there.

    Its bytes are read back out of the page cache, and the disk is made to write while the rest is still on its way, so
    that little is left to do after the last range.
    """

    def __init__(self, file: BufferedRandom, size_bytes: int, range_size_bytes: int) -> None:
        self.ranges = [
            (start, min(range_size_bytes, size_bytes - start))
            for start in range(0, max(size_bytes, 1), range_size_bytes)
        ]
        """Start and length of each."""
        self._file = file
        self._has_arrived = {start: asyncio.Event() for start, _ in self.ranges}
        self._sha256 = hashlib.sha256()
        self._num_unsynced = 0

    def arrived(self, start: int) -> None:
        """The range that begins at ``start`` is written."""
        self._has_arrived[start].set()

    async def follow(self) -> str:
        """Returns the digest once everything has arrived."""
        for start, length in self.ranges:
            await self._has_arrived[start].wait()
            await run_to_end(self._add, start, length)
        return format_digest(self._sha256.digest())

    def _add(self, start: int, length: int) -> None:
        try:
            buffer = bytearray(min(length, _READ_BYTES))
            while length:
                num_read = os.preadv(self._file.fileno(), [memoryview(buffer)[:length]], start)
                if num_read == 0:
                    raise Internal(f"{self._file.name} ends at byte {start}, {length} bytes too early")
                self._sha256.update(memoryview(buffer)[:num_read])
                start, length = start + num_read, length - num_read
                self._num_unsynced += num_read
            if self._num_unsynced >= _SYNC_BYTES:
                os.fdatasync(self._file.fileno())
                self._num_unsynced = 0
        except OSError as error:
            raise _disk_error(error, Path(self._file.name)) from error


def _disk_error(error: OSError, path: Path) -> MintError:
    if error.errno in _FULL:
        return ResourceExhausted(f"cannot write {path}: {error.strerror}; make room on that disk", retry_after_s=1.0)
    if error.errno in _FAILING:
        return Unavailable(f"cannot write {path}: {error.strerror}; the disk fails or is read-only")
    if error.errno in _BAD_PATH:
        return InvalidArgument(f"cannot write {path}: {error.strerror}", field="path")
    return Internal(f"cannot write {path}: {error}")
