"""Files that are either whole or absent: written beside their place, synced, then renamed into it.

A reader of the final path never sees half a file, also after a power cut. What a killed process leaves are temporary
files whose names end in :data:`TEMP_SUFFIX`; the owner of a folder removes them at start with :func:`sweep_temp_files`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path

__all__ = ["TEMP_SUFFIX", "atomic_file", "atomic_folder", "fsync_dir", "sweep_temp_files"]

TEMP_SUFFIX = ".mint-tmp"
"""How the name of every unfinished file ends."""


def fsync_dir(folder: Path) -> None:
    """Make the names in ``folder`` durable; a rename alone may be lost by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BufferedRandom]:
    """Open a temporary file beside ``path`` for reading and writing; it becomes ``path`` when the block ends well.

    If the block raises, nothing is left. An existing ``path`` is replaced in one step. Without ``durable`` nothing is
    synced: for a file whose folder somebody syncs as a whole before it counts.
    """
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # also when interrupted, no half file stays
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if durable:
        fsync_dir(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that becomes ``path`` when the block ends well; whoever fills it syncs its files.

    If the block raises, nothing is left. Raises :class:`FileExistsError` if ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        fsync_dir(temporary)
        # Renaming onto a folder that somebody made meanwhile works only while that is empty, which is as good as none.
        temporary.rename(path)
    except BaseException:  # also when interrupted, no half folder stays
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(path.parent)


def sweep_temp_files(folder: Path) -> int:
    """Remove what killed writers left directly in ``folder``, files and folders; returns how many that were.

    Only for the single owner of a folder, at its start: a file still being written looks the same.
    """
    num_removed = 0
    for entry in folder.iterdir():
        if entry.name.endswith(TEMP_SUFFIX):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
            num_removed += 1
    return num_removed
