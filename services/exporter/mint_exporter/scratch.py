"""Disk space for work in progress: bounded, owned by one process, empty at start."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
from pathlib import Path
from typing import Self

from mint_core.errors import FailedPrecondition, ResourceExhausted

__all__ = ["Room", "Scratch"]

_MAX_SLOTS = 64


class Room:
    """A folder with so many bytes set aside for it; give it back with :meth:`release` or leave it as a context."""

    def __init__(self, scratch: Scratch, folder: Path, size_bytes: int) -> None:
        self._scratch = scratch
        self.folder = folder
        self.size_bytes = size_bytes

    async def __aenter__(self) -> Path:
        return self.folder

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove the folder and give the bytes back; again is a no-op."""
        self._scratch._release(self)


class Scratch:
    """At most ``max_bytes`` under one folder.

    Several exporters of a machine may name the same folder: each takes a numbered part of it, held by a file lock that
    ends with the process, and sweeps what the part's last owner left.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._parent = folder
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._rooms: set[Room] = set()
        self._freed = asyncio.Event()
        self._lock = -1
        self._part = folder

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for room in list(self._rooms):
            room.release()
        os.close(self._lock)

    def _open(self) -> None:
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            for number in range(_MAX_SLOTS):
                lock = os.open(self._parent / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                self._lock, self._part = lock, self._parent / str(number)
                shutil.rmtree(self._part, ignore_errors=True)
                self._part.mkdir()
                return
        except OSError as error:
            raise FailedPrecondition(
                f"scratch_dir {self._parent} cannot be used: {error.strerror}; name a writable folder"
            ) from error
        raise FailedPrecondition(f"scratch_dir {self._parent} is in use by {_MAX_SLOTS} processes: name another folder")

    @property
    def used_bytes(self) -> int:
        """Bytes set aside now."""
        return self._used_bytes

    async def room(self, size_bytes: int) -> Room:
        """Set ``size_bytes`` aside, waiting until others have given enough back.

        Raises :class:`ResourceExhausted` if there never can be so much.
        """
        self._check_possible(size_bytes)
        while self._used_bytes + size_bytes > self._max_bytes:
            self._freed.clear()
            await self._freed.wait()
        return self._take(size_bytes)

    def room_now(self, size_bytes: int) -> Room:
        """Set ``size_bytes`` aside at once. Raises :class:`ResourceExhausted` if they are not free."""
        self._check_possible(size_bytes)
        if self._used_bytes + size_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"{size_bytes} bytes are wanted, {self._max_bytes - self._used_bytes} are free: retry when other "
                "uploads have ended",
                retry_after_s=5.0,
            )
        return self._take(size_bytes)

    def _check_possible(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"{size_bytes} bytes are wanted, this exporter works with at most {self._max_bytes} (max_scratch_bytes)"
            )

    def _take(self, size_bytes: int) -> Room:
        room = Room(self, self._part / secrets.token_hex(8), size_bytes)
        room.folder.mkdir()
        self._rooms.add(room)
        self._used_bytes += size_bytes
        return room

    def _release(self, room: Room) -> None:
        if room in self._rooms:
            self._rooms.remove(room)
            self._used_bytes -= room.size_bytes
            shutil.rmtree(room.folder, ignore_errors=True)
            self._freed.set()
