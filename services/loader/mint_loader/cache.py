"""The node disk: a bounded, content-addressed folder of adapters that survives crashes and restarts.

::

    <folder>/<64 hex digits>/adapter_model.safetensors     one adapter, as the engine of this node reads it
                             adapter_config.json
    <folder>/.incoming/…                                   being written
    <folder>/.trash/…                                      being removed
    <folder>/.quarantine/…                                 found damaged: to be looked at, gone when room is needed
    <folder>/.uses.json                                    how often each was used, as of a while ago
    <folder>/.lock                                         held by the one loader that owns the folder

An entry is written elsewhere, synced, then renamed to its name: under its name it is whole or absent, also after a
crash. It is never changed in place and leaves by a rename too, so an engine that has mapped its file keeps the bytes
it saw. Evicting an adapter that is resident in the engine is allowed: the engine host never reads a folder again
after the load that named it.

What this process wrote was verified when it was written; what was found at a start, what somebody else has written to
since, and what was verified long ago is verified at its next use. What leaves first is decided by
:mod:`mint_loader.eviction`, never among what is in use or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from mint_core import clock, failpoints, log
from mint_core.errors import ResourceExhausted
from mint_loader.cache_folder import CacheFolder, Fingerprint, Workspace, disk_error, remove_folder
from mint_loader.eviction import EvictionOrder, EvictionPolicy, Gdsf

__all__ = ["CacheStatus", "DiskCache", "Workspace"]

SEALED = failpoints.declare("loader.sealed", "an adapter is whole on the node's disk, not yet under its name")
PUBLISHED = failpoints.declare("loader.published", "an adapter stands under its name on the node's disk")
EVICTING = failpoints.declare("loader.evicting", "an evicted adapter left its name, its bytes are not removed yet")

_OVERHEAD_BYTES: Final = 16 * 1024
_MAX_QUARANTINED: Final = 4
_log = log.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """How the cache stands; counts are since the start."""

    used_bytes: int
    """With what is being removed and what is in quarantine."""
    max_bytes: int
    num_entries: int
    num_evictions: int
    num_quarantined: int
    """Entries whose bytes had gone bad on disk."""
    num_full: int
    """Fills that met a full disk."""
    num_kept: int
    """Of the digests to be kept, those that are here."""
    kept_bytes: int
    eviction: str
    """Name of the policy."""


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    used_at_s: float
    """Seconds since the epoch, so that the order survives a restart (kept as the folder's mtime)."""
    verified_as: Fingerprint | None = None
    """None while it is not verified."""
    verified_at_s: float = 0.0
    """Monotonic."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        eviction: EvictionPolicy | None = None,
        overhead_bytes: int = _OVERHEAD_BYTES,
        verify_again_s: float = 86400.0,
        save_uses_s: float = 30.0,
    ) -> None:
        """``eviction`` is :class:`~mint_loader.eviction.Gdsf` if none is given."""
        self.folder = folder
        self._files = CacheFolder(folder)
        self._max_bytes = max_bytes
        self._verify = verify
        self._overhead_bytes = overhead_bytes
        """Reserved beyond the blob for the configuration, while its real size is unknown."""
        self._verify_again_s = verify_again_s
        self._save_uses_s = save_uses_s
        self._entries: dict[str, _Entry] = {}
        self._order = EvictionOrder(eviction or Gdsf())
        self._pins: Counter[str] = Counter()
        self._kept: frozenset[str] = frozenset()
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._leaving_bytes = 0
        """The part of the used bytes whose removal is under way."""
        self._quarantined: deque[tuple[Path, int]] = deque()
        self._room_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()
        self._uses_saved_at_s = float("-inf")
        self._num_evictions = 0
        self._num_quarantined = 0
        self._num_full = 0

    async def open(self) -> None:
        """Take the folder, sweep what a killed predecessor left, and note what is there.

        Raises :class:`FailedPrecondition` if another loader owns the folder or it cannot be written.
        """
        found = await asyncio.to_thread(self._files.open, self._order.policy_name)
        for each in found:
            self._entries[each.digest] = _Entry(each.size_bytes, each.used_at_s)
            self._used_bytes += each.size_bytes
        self._order.restore(found)
        self._uses_saved_at_s = clock.monotonic_s()
        async with self._room_lock:
            await self._make_room(0)
        fields = {"folder": str(self.folder), "num_entries": len(self._entries), "bytes": self._used_bytes}
        _log.info("disk cache opened", extra={"fields": fields})

    async def close(self) -> None:
        """Finish removals, write the uses down and give the folder back."""
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self._uses_saved_at_s > float("-inf"):
            await self._save_uses()
        self._files.close()

    @property
    def status(self) -> CacheStatus:
        kept = [entry.size_bytes for digest in self._kept if (entry := self._entries.get(digest)) is not None]
        return CacheStatus(
            used_bytes=self._used_bytes,
            max_bytes=self._max_bytes,
            num_entries=len(self._entries),
            num_evictions=self._num_evictions,
            num_quarantined=self._num_quarantined,
            num_full=self._num_full,
            num_kept=len(kept),
            kept_bytes=sum(kept),
            eviction=self._order.policy_name,
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
            entry.verified_as = None

    @property
    def kept(self) -> frozenset[str]:
        """The digests given to :meth:`keep`."""
        return self._kept

    def keep(self, digests: frozenset[str]) -> None:
        """Never evict these from now on, whether they are here yet or not, and no others for that reason."""
        self._kept = digests
        self._changed.set()

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

        An entry whose bytes went bad is put in quarantine, and None given, so that it is fetched again.
        """
        with self.pinned(digest):
            entry = self._entries.get(digest)
            if entry is not None and not await self._is_good(digest, entry):
                entry = None
            if entry is None:
                yield None
                return
            entry.used_at_s = clock.wall_s()
            self._order.use(digest, entry.size_bytes, entry.used_at_s)
            self._files.touch(digest, entry.used_at_s)
            self._save_uses_soon()
            yield self._files.entry(digest)

    @contextlib.asynccontextmanager
    async def filling(
        self, digest: str, size_bytes: int, make: Callable[[Workspace], None] | None = None
    ) -> AsyncIterator[Workspace]:
        """A place to make the adapter's folder in; at the end of the block that is the entry, on an error nothing is
        left. What blocks is left to ``make``, which runs after the block in the thread that syncs and renames.

        Waits for room. Raises :class:`ResourceExhausted` if the adapter is larger than the cache or than what is not
        kept of it, or the disk is full.
        """
        needed = size_bytes + self._overhead_bytes
        if needed > self._max_bytes:
            raise ResourceExhausted(
                f"adapter {digest} needs {needed} bytes of disk, the loader's cache may hold {self._max_bytes}; "
                "raise loader.max_cache_bytes",
                metadata={"digest": digest, "max_cache_bytes": str(self._max_bytes)},
            )
        reservation = await self._reserve(needed)
        workspace = self._files.workspace(digest)
        try:
            yield workspace
            await _to_the_end(self._admit(workspace, make, digest, reservation))
        except BaseException as error:
            await _to_the_end(asyncio.to_thread(workspace.clear))
            if isinstance(error, OSError):
                told = disk_error(error, workspace.entry)
                self._num_full += isinstance(told, ResourceExhausted)
                raise told from error
            self._num_full += isinstance(error, ResourceExhausted)
            raise
        finally:
            self._release(reservation)
        await PUBLISHED.reached()

    async def _admit(
        self,
        workspace: Workspace,
        make: Callable[[Workspace], None] | None,
        digest: str,
        reservation: _Reservation,
    ) -> None:
        def publish() -> tuple[int, Fingerprint]:
            if make is not None:
                make(workspace)
            workspace.blob.unlink(missing_ok=True)
            size_bytes = self._files.seal(workspace.entry)
            SEALED()
            return size_bytes, self._files.move_in(workspace.entry, digest)

        # One thread for all of it: each would cost a small adapter more than what is done in it.
        size_bytes, fingerprint = await asyncio.to_thread(publish)
        if (replaced := self._entries.get(digest)) is not None:
            self._used_bytes -= replaced.size_bytes
        now_s = clock.wall_s()
        self._entries[digest] = _Entry(size_bytes, now_s, fingerprint, clock.monotonic_s())
        self._order.use(digest, size_bytes, now_s)
        self._used_bytes += size_bytes
        self._release(reservation)  # in the same step, or the bytes would count twice and push another entry out
        self._save_uses_soon()

    def _release(self, reservation: _Reservation) -> None:
        self._reserved_bytes -= reservation.size_bytes
        reservation.size_bytes = 0
        self._changed.set()

    # Verification

    async def _is_good(self, digest: str, entry: _Entry) -> bool:
        async with entry.lock:
            if self._entries.get(digest) is not entry:
                return False
            if self._is_verified(digest, entry):
                return True
            entry.verified_as = None
            try:
                # Taken before: what is written while the bytes are looked at is noticed at the next use.
                fingerprint = self._files.fingerprint(digest)
                if await asyncio.to_thread(self._verify, self._files.entry(digest), digest):
                    entry.verified_as, entry.verified_at_s = fingerprint, clock.monotonic_s()
                    return True
            except OSError as error:
                _log.warning("cached adapter is unreadable", extra={"fields": {"digest": digest, "error": str(error)}})
            self._quarantine(digest)
            return False

    def _is_verified(self, digest: str, entry: _Entry) -> bool:
        if entry.verified_as is None or clock.monotonic_s() - entry.verified_at_s > self._verify_again_s:
            return False
        try:
            return self._files.fingerprint(digest) == entry.verified_as
        except OSError:  # somebody tidied up by hand
            return False

    def _quarantine(self, digest: str) -> None:
        self._num_quarantined += 1
        entry = self._entries.pop(digest)
        self._order.discard(digest)
        aside = self._files.move_out(digest, to_quarantine=True)
        fields = {"digest": digest, "moved_to": str(aside)}
        _log.error("cached adapter lost its digest: in quarantine", extra={"fields": fields})
        if aside is None:
            self._forget_bytes(entry.size_bytes)
            return
        self._quarantined.append((aside, entry.size_bytes))
        if len(self._quarantined) > _MAX_QUARANTINED:
            self._remove(*self._quarantined.popleft())

    # Room

    async def _reserve(self, needed: int) -> _Reservation:
        """Wait for room in order of arrival; who waits for what is in use lets others pass who fit."""
        while True:
            async with self._room_lock:
                if await self._make_room(needed):
                    await self._make_room_on_disk(needed)
                    self._reserved_bytes += needed
                    return _Reservation(needed)
            await self._changed.wait()

    async def _make_room(self, needed: int) -> bool:
        """Evict until ``needed`` bytes fit; False if that must wait for what is in use."""
        while (excess := self._used_bytes + self._reserved_bytes + needed - self._max_bytes) > 0:
            self._changed.clear()
            if excess <= self._leaving_bytes:
                await self._changed.wait()
            elif excess <= self._used_bytes - self._held_bytes():
                self._evict_one()
            elif self._reserved_bytes or any(each in self._entries and each not in self._kept for each in self._pins):
                return False  # and nothing was evicted for it in vain
            else:
                raise ResourceExhausted(
                    f"{needed} bytes of disk are needed, all but {self._max_bytes - self._used_bytes} of "
                    f"{self._max_bytes} hold adapters that are kept; unpin some or raise loader.max_cache_bytes",
                    retry_after_s=10.0,
                )
        return True

    async def _make_room_on_disk(self, needed: int) -> None:
        """Evict for a disk that is smaller or fuller than the cache's bound says; as far as that goes."""
        missing = needed + self._reserved_bytes - self._files.free_bytes()
        while missing > self._leaving_bytes and self._evict_one():
            pass
        if missing > 0 and self._chores:
            await asyncio.wait(set(self._chores))

    def _held_bytes(self) -> int:
        """Of what may not be evicted now."""
        held = (self._entries.get(digest) for digest in self._kept.union(self._pins))
        return sum(entry.size_bytes for entry in held if entry is not None)

    def _evict_one(self) -> bool:
        """Begin to remove the adapter of least worth, or something from quarantine before it."""
        if self._quarantined:
            self._remove(*self._quarantined.popleft())
            return True
        digest = self._order.take_least(lambda each: each not in self._pins and each not in self._kept)
        if digest is None:
            return False
        self._num_evictions += 1
        entry = self._entries.pop(digest)
        aside = self._files.move_out(digest)
        if aside is None:
            self._forget_bytes(entry.size_bytes)
        else:
            self._remove(aside, entry.size_bytes)
        return True

    def _forget_bytes(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._changed.set()

    def _remove(self, path: Path, size_bytes: int) -> None:
        self._leaving_bytes += size_bytes

        async def remove() -> None:
            if size_bytes:
                await EVICTING.reached()
            await asyncio.to_thread(remove_folder, path)
            self._leaving_bytes -= size_bytes
            self._forget_bytes(size_bytes)

        self._in_background(remove())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    # Uses

    def _save_uses_soon(self) -> None:
        if clock.monotonic_s() - self._uses_saved_at_s >= self._save_uses_s:
            self._uses_saved_at_s = clock.monotonic_s()
            self._in_background(self._save_uses())

    async def _save_uses(self) -> None:
        try:
            await asyncio.to_thread(self._files.write_uses, self._order.policy_name, self._order.snapshot())
        except OSError as error:  # only the order after a restart depends on it
            _log.warning("uses of the cache cannot be written", extra={"fields": {"error": str(error)}})


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
