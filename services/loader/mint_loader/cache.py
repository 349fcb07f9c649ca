"""The node disk: a bounded, content-addressed folder of adapters that survives crashes and restarts.

::

    <folder>/<64 hex digits>/adapter_model.safetensors     one adapter, as the engine of this node reads it
                             adapter_config.json
    <folder>/.incoming/…                                   being written
    <folder>/.trash/…                                      being removed
    <folder>/.lock                                         held by the one loader that owns the folder

An entry is written elsewhere, synced, then renamed to its name: under its name it is whole or absent, also after a
crash. It is never changed in place and leaves by a rename too, so an engine that has mapped its file keeps the bytes
it saw. Evicting an adapter that is resident in the engine is allowed: the engine host never reads a folder again
after the load that named it.

What was found at a start is verified at its first use; what this process wrote was verified when it was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mint_blobs.digests import digest_hex, format_digest
from mint_core import clock, failpoints, log
from mint_core.errors import FailedPrecondition, Internal, MintError, ResourceExhausted, Unavailable
from mint_core.files import fsync_dir

__all__ = ["CacheStatus", "DiskCache", "Workspace"]

SEALED = failpoints.declare("loader.sealed", "an adapter is whole on the node's disk, not yet under its name")
PUBLISHED = failpoints.declare("loader.published", "an adapter stands under its name on the node's disk")
EVICTING = failpoints.declare("loader.evicting", "an evicted adapter left its name, its bytes are not removed yet")

_HEX = re.compile(r"[0-9a-f]{64}")
_OVERHEAD_BYTES = 16 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = log.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """How the cache stands; counts are since the start."""

    used_bytes: int
    max_bytes: int
    num_entries: int
    num_evictions: int
    num_quarantined: int
    """Entries whose bytes had gone bad on disk."""


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    used_at_s: float
    """Seconds since the epoch, so that the order survives a restart (kept as the folder's mtime)."""
    is_verified: bool
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Workspace:
    """A private place to make one entry in."""

    folder: Path
    """For anything; removed at the end."""

    @property
    def blob(self) -> Path:
        """Where to put the blob."""
        return self.folder / "blob"

    @property
    def entry(self) -> Path:
        """The folder to make: it becomes the entry."""
        return self.folder / "entry"


@dataclass(slots=True)
class _Reservation:
    size_bytes: int
    """0 once it was given back."""


class DiskCache:
    """Adapters by digest, at most ``max_bytes`` of them. One loop uses it; disk waits happen in threads."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        verify: Callable[[Path, str], bool],
        overhead_bytes: int = _OVERHEAD_BYTES,
    ) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._verify = verify
        self._overhead_bytes = overhead_bytes
        """Reserved beyond the blob for the configuration, while its real size is unknown."""
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By digest, least recently used first."""
        self._pins: Counter[str] = Counter()
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._leaving_bytes = 0
        """The part of the used bytes whose removal is under way."""
        self._room_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._removals: set[asyncio.Task[None]] = set()
        self._lock_file: int | None = None
        self._num_evictions = 0
        self._num_quarantined = 0

    async def open(self) -> None:
        """Take the folder, sweep what a killed predecessor left, and note what is there.

        Raises :class:`FailedPrecondition` if another loader owns the folder or it cannot be written.
        """
        try:
            found = await asyncio.to_thread(self._scan)
        except OSError as error:
            raise FailedPrecondition(
                f"cache_dir {self.folder} cannot be used: {error}; name a folder the loader may write"
            ) from error
        for digest, size_bytes, used_at_s in sorted(found, key=lambda each: each[2]):
            self._entries[digest] = _Entry(size_bytes, used_at_s, is_verified=False)
            self._used_bytes += size_bytes
        async with self._room_lock:
            await self._make_room(0)
        _log.info(
            "disk cache opened",
            extra={
                "fields": {"folder": str(self.folder), "num_entries": len(self._entries), "bytes": self._used_bytes}
            },
        )

    async def close(self) -> None:
        """Finish removals and give the folder back."""
        await asyncio.gather(*self._removals, return_exceptions=True)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    @property
    def status(self) -> CacheStatus:
        return CacheStatus(
            self._used_bytes, self._max_bytes, len(self._entries), self._num_evictions, self._num_quarantined
        )

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def used_within(self, digest: str, seconds: float) -> bool:
        """Whether the adapter is here and was used that recently."""
        entry = self._entries.get(digest)
        return entry is not None and clock.wall_s() - entry.used_at_s <= seconds

    def distrust(self, digest: str) -> None:
        """Have the adapter verified again at its next use."""
        if (entry := self._entries.get(digest)) is not None:
            entry.is_verified = False

    @contextlib.contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        """Inside the block the adapter, once here, is not evicted."""
        self._pins[digest] += 1
        try:
            yield
        finally:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]
                self._changed.set()

    @contextlib.asynccontextmanager
    async def using(self, digest: str) -> AsyncIterator[Path | None]:
        """The adapter's folder, verified and safe from eviction inside the block; None if it is not here.

        An entry whose bytes went bad is removed, and None given, so that it is fetched again.
        """
        with self.pinned(digest):
            entry = self._entries.get(digest)
            if entry is not None and not await self._is_good(digest, entry):
                entry = None
            if entry is None:
                yield None
                return
            entry.used_at_s = clock.wall_s()
            self._entries.move_to_end(digest)
            path = self._path(digest)
            with contextlib.suppress(OSError):  # only the order after a restart depends on it
                os.utime(path, (entry.used_at_s, entry.used_at_s))
            yield path

    @contextlib.asynccontextmanager
    async def filling(self, digest: str, size_bytes: int) -> AsyncIterator[Workspace]:
        """A place to make the adapter's folder in; at the end of the block that is the entry, on an error nothing is
        left.

        Waits for room. Raises :class:`ResourceExhausted` if the adapter is larger than the cache, or the disk is full.
        """
        needed = size_bytes + self._overhead_bytes
        if needed > self._max_bytes:
            raise ResourceExhausted(
                f"adapter {digest} needs {needed} bytes of disk, the loader's cache may hold {self._max_bytes}; "
                "raise loader.max_cache_bytes",
                metadata={"digest": digest, "max_cache_bytes": str(self._max_bytes)},
            )
        async with self._room_lock:
            await self._make_room(needed)
            reservation = _Reservation(needed)
            self._reserved_bytes += needed
        workspace = Workspace(self.folder / ".incoming" / f"{digest_hex(digest)}-{secrets.token_hex(6)}")
        try:
            await asyncio.to_thread(workspace.folder.mkdir)
            yield workspace
            size_bytes = await _to_the_end(asyncio.to_thread(_seal, workspace.entry))
            await SEALED.reached()
            await _to_the_end(self._admit(workspace.entry, digest, size_bytes, reservation))
        except BaseException as error:
            await _to_the_end(asyncio.to_thread(shutil.rmtree, workspace.folder, ignore_errors=True))
            if isinstance(error, OSError):
                raise _disk_error(error, workspace.folder) from error
            raise
        else:
            self._remove(workspace.folder, 0)
        finally:
            self._release(reservation)
        await PUBLISHED.reached()

    async def _admit(self, made: Path, digest: str, size_bytes: int, reservation: _Reservation) -> None:
        await asyncio.to_thread(self._move_in, made, self._path(digest))
        self._entries[digest] = _Entry(size_bytes, clock.wall_s(), is_verified=True)
        self._used_bytes += size_bytes
        self._release(reservation)  # in the same step, or the bytes would count twice and push another entry out

    def _release(self, reservation: _Reservation) -> None:
        self._reserved_bytes -= reservation.size_bytes
        reservation.size_bytes = 0
        self._changed.set()

    async def _is_good(self, digest: str, entry: _Entry) -> bool:
        async with entry.lock:
            if entry.is_verified:
                return True
            if self._entries.get(digest) is not entry:
                return False
            try:
                entry.is_verified = await asyncio.to_thread(self._verify, self._path(digest), digest)
            except OSError as error:
                _log.warning("cached adapter is unreadable", extra={"fields": {"digest": digest, "error": str(error)}})
            if not entry.is_verified:
                self._num_quarantined += 1
                _log.error("cached adapter lost its digest: removed", extra={"fields": {"digest": digest}})
                self._drop(digest)
            return entry.is_verified

    async def _make_room(self, needed: int) -> None:
        """Evict, least recently used first, until ``needed`` bytes fit; waits while everything left is in use."""
        while self._used_bytes + self._reserved_bytes + needed > self._max_bytes:
            self._changed.clear()
            missing = self._used_bytes + self._reserved_bytes + needed - self._leaving_bytes - self._max_bytes
            if missing > 0:
                victim = next((digest for digest in self._entries if digest not in self._pins), None)
                if victim is not None:
                    self._num_evictions += 1
                    self._drop(victim)
                    continue
            await self._changed.wait()

    def _drop(self, digest: str) -> None:
        """Take an entry from its name at once, and its bytes from the disk soon."""
        entry = self._entries.pop(digest)
        trash = self.folder / ".trash" / f"{digest_hex(digest)}-{secrets.token_hex(6)}"
        try:
            self._path(digest).rename(trash)
        except FileNotFoundError:  # somebody tidied up by hand
            self._used_bytes -= entry.size_bytes
            self._changed.set()
            return
        self._remove(trash, entry.size_bytes)

    def _remove(self, path: Path, size_bytes: int) -> None:
        self._leaving_bytes += size_bytes

        async def remove() -> None:
            if size_bytes:
                await EVICTING.reached()
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            self._leaving_bytes -= size_bytes
            self._used_bytes -= size_bytes
            self._changed.set()

        task = asyncio.get_running_loop().create_task(remove())
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def _path(self, digest: str) -> Path:
        return self.folder / digest_hex(digest)

    def _scan(self) -> list[tuple[str, int, float]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for name in (".incoming", ".trash"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(exist_ok=True)
        found = []
        for entry in os.scandir(self.folder):
            if _HEX.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                sizes = [file.stat().st_size for file in Path(entry.path).iterdir()]
                found.append((format_digest(bytes.fromhex(entry.name)), sum(sizes), entry.stat().st_mtime))
            elif not entry.name.startswith("."):
                _log.warning("foreign name in the cache folder, left alone", extra={"fields": {"path": entry.path}})
        return found

    def _take_lock(self) -> None:
        self._lock_file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            self._lock_file = None
            raise FailedPrecondition(
                f"cache_dir {self.folder} is in use by another loader; give each loader a folder of its own"
            ) from None

    def _move_in(self, made: Path, target: Path) -> None:
        if target.exists():  # an unknown folder of that name: ours is verified, it is not
            target.rename(self.folder / ".trash" / f"{target.name}-{secrets.token_hex(6)}")
        made.rename(target)
        fsync_dir(self.folder)


def _seal(folder: Path) -> int:
    """Sync a folder's files and names; returns their size in bytes."""
    size_bytes = 0
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            size_bytes += os.fstat(file.fileno()).st_size
    fsync_dir(folder)
    return size_bytes


def _disk_error(error: OSError, path: Path) -> MintError:
    if error.errno in _FULL:
        return ResourceExhausted(
            f"cannot write {path}: {error.strerror}; make room on that disk or lower loader.max_cache_bytes"
        )
    if error.errno == errno.EIO:
        return Unavailable(f"cannot write {path}: {error.strerror}; the node's disk fails")
    return Internal(f"cannot write {path}: {error}")


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; a cancelled caller waits for its end too, so that nothing happens behind its back."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen, so that it is not reported as forgotten
        raise
