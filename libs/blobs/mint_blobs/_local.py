"""The disk side of transfers: reading what goes up, writing what comes down, with the room's errors."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

from mint_core.errors import Internal, InvalidArgument, MintError, ResourceExhausted
from mint_core.files import atomic_file
from mint_core.threads import run_to_end

__all__ = ["opening_source", "read_source", "write_at", "writing_target"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.EISDIR)


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
async def writing_target(path: Path) -> AsyncIterator[BufferedRandom]:
    """:func:`mint_core.files.atomic_file` with its disk waits in a thread, a full disk told as
    :class:`ResourceExhausted`."""
    try:
        target = atomic_file(path)
        file = await run_to_end(target.__enter__)
        try:
            yield file
        except BaseException:  # cancelled or failed: clean up, then pass it on
            await run_to_end(target.__exit__, *sys.exc_info())
            raise
        await run_to_end(target.__exit__, None, None, None)
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


def _disk_error(error: OSError, path: Path) -> MintError:
    if error.errno in _FULL:
        return ResourceExhausted(f"cannot write {path}: {error.strerror}; make room on that disk")
    if error.errno in _BAD_PATH:
        return InvalidArgument(f"cannot write {path}: {error.strerror}", field="path")
    return Internal(f"cannot write {path}: {error}")
