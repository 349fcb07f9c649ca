"""The files of the disk cache. Every method that touches them blocks; a name is given or taken by a rename only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mint_blobs.digests import digest_hex, format_digest
from mint_core import log
from mint_core.errors import FailedPrecondition, Internal, MintError, ResourceExhausted, Unavailable
from mint_core.files import atomic_file, fsync_dir, sweep_temp_files
from mint_loader.eviction import Seen

__all__ = ["CacheFolder", "Fingerprint", "Workspace", "disk_error", "remove_folder"]

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change of each file of an entry: whoever writes to a file changes it."""

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FAILING: Final = (errno.EIO, errno.EROFS)
"""A file system that met errors is often made read-only."""
_USES: Final = ".uses.json"
_SWEPT: Final = (".incoming", ".trash", ".quarantine")
_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Workspace:
    """A private place to make one entry in."""

    entry: Path
    """The folder to make: it becomes the entry."""

    @property
    def blob(self) -> Path:
        """Where to put the blob; removed at the end."""
        return self.entry.with_name(f"{self.entry.name}.blob")

    def clear(self) -> None:
        """Remove what is left in it."""
        with contextlib.suppress(OSError):
            self.blob.unlink(missing_ok=True)
        remove_folder(self.entry)


class CacheFolder:
    """One folder, owned by one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_file: int | None = None

    def open(self, policy_name: str) -> list[Seen]:
        """Take the folder, sweep what a killed predecessor left, and tell what is there.

        Raises :class:`FailedPrecondition` if another loader owns the folder or it cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for name in _SWEPT:
                shutil.rmtree(self.path / name, ignore_errors=True)
                (self.path / name).mkdir(exist_ok=True)
            sweep_temp_files(self.path)
            return self._scan(policy_name)
        except OSError as error:
            raise FailedPrecondition(
                f"cache_dir {self.path} cannot be used: {error}; name a folder the loader may write"
            ) from error

    def close(self) -> None:
        """Give the folder back."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def entry(self, digest: str) -> Path:
        """Where the entry of a digest stands."""
        return self.path / digest_hex(digest)

    def workspace(self, digest: str) -> Workspace:
        """A name for a new workspace; nothing is made yet."""
        return Workspace(self._aside(".incoming", digest))

    def seal(self, folder: Path) -> int:
        """Sync a folder's files and names; returns their size in bytes."""
        size_bytes = 0
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                size_bytes += os.fstat(file.fileno()).st_size
        fsync_dir(folder)
        return size_bytes

    def move_in(self, made: Path, digest: str) -> Fingerprint:
        """Give a sealed folder its name."""
        # There may be a folder of that name that somebody put there: ours is verified, it is not.
        aside = self.move_out(digest)
        made.rename(self.entry(digest))
        fsync_dir(self.path)
        if aside is not None:
            remove_folder(aside)
        return self.fingerprint(digest)

    def move_out(self, digest: str, *, to_quarantine: bool = False) -> Path | None:
        """Take an entry's name; returns where its bytes are now, None if there were none."""
        aside = self._aside(".quarantine" if to_quarantine else ".trash", digest)
        try:
            self.entry(digest).rename(aside)
        except FileNotFoundError:  # somebody tidied up by hand
            return None
        return aside

    def fingerprint(self, digest: str) -> Fingerprint:
        """Raises :class:`OSError` if the entry is gone."""
        stats = [(file.name, file.stat(follow_symlinks=False)) for file in os.scandir(self.entry(digest))]
        return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))

    def touch(self, digest: str, used_at_s: float) -> None:
        """Note the time of a use, for the order after a restart."""
        with contextlib.suppress(OSError):
            os.utime(self.entry(digest), (used_at_s, used_at_s))

    def free_bytes(self) -> int:
        """What this process may still write on the disk below."""
        stat = os.statvfs(self.path)
        return stat.f_frsize * (stat.f_bfree if os.geteuid() == 0 else stat.f_bavail)

    def write_uses(self, policy_name: str, uses: Mapping[str, tuple[int, float]]) -> None:
        """Keep uses and worth for the next process, which can do without. Raises :class:`OSError`."""
        known = {digest_hex(digest): list(each) for digest, each in uses.items()}
        with atomic_file(self.path / _USES) as file:
            file.write(json.dumps({"eviction": policy_name, "adapters": known}).encode())

    def _scan(self, policy_name: str) -> list[Seen]:
        uses = self._read_uses(policy_name)
        seen = []
        for entry in os.scandir(self.path):
            if _HEX.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                size_bytes = sum(file.stat().st_size for file in os.scandir(entry.path))
                digest = format_digest(bytes.fromhex(entry.name))
                num_uses, worth = uses.get(entry.name, (1, None))
                seen.append(Seen(digest, size_bytes, entry.stat().st_mtime, num_uses, worth))
            elif not entry.name.startswith("."):
                _log.warning("foreign name in the cache folder, left alone", extra={"fields": {"path": entry.path}})
        return seen

    def _read_uses(self, policy_name: str) -> dict[str, tuple[int, float | None]]:
        try:
            held = json.loads((self.path / _USES).read_bytes())
            is_ours = held["eviction"] == policy_name
            return {
                name: (int(num_uses), float(worth) if is_ours and math.isfinite(worth) else None)
                for name, (num_uses, worth) in held["adapters"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            # Only the order of eviction depends on it.
            _log.warning("uses of the cache are unreadable, forgotten", extra={"fields": {"error": str(error)}})
            return {}

    def _aside(self, place: str, digest: str) -> Path:
        return self.path / place / f"{digest_hex(digest)}-{secrets.token_hex(6)}"

    def _take_lock(self) -> None:
        self._lock_file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise FailedPrecondition(
                f"cache_dir {self.path} is in use by another loader; give each loader a folder of its own"
            ) from None


def remove_folder(path: Path) -> None:
    """Remove an entry, or what somebody made of it; as far as that goes."""
    try:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    except OSError:  # not what we made: with all care, which costs several times as much
        shutil.rmtree(path, ignore_errors=True)


def disk_error(error: OSError, path: Path) -> MintError:
    """What a failed write to the cache is called."""
    if error.errno in _FULL:
        return ResourceExhausted(
            f"cannot write {path}: {error.strerror}; make room on that disk or lower loader.max_cache_bytes",
            retry_after_s=1.0,
        )
    if error.errno in _FAILING:
        return Unavailable(f"cannot write {path}: {error.strerror}; the node's disk fails")
    return Internal(f"cannot write {path}: {error}")
