"""What a base model's folder tells: its digest, which makes "the same base" a fact and not a path, and its routing.

The digest is the SHA-256 of a manifest, one line ``<sha256>  <size>  <relative path>`` for each file in path order.
Files are hashed in parallel; a file's hash is cached beside the user's other caches under its device, inode, size and
mtime, so a resident base of hundreds of gigabytes is read once and not at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_core.files import atomic_file

__all__ = ["FolderDigest", "cache_folder", "digest_of_folder", "routed_top_k"]

_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FolderDigest:
    """What identifies a folder's content."""

    digest: str
    """``sha256:`` and 64 hex digits."""
    size_bytes: int
    """Sum of the files' sizes."""


def cache_folder() -> Path:
    """Where MinT keeps what can be made again: ``$MINT_CACHE``, else ``~/.cache/mint``."""
    return Path(os.environ.get("MINT_CACHE") or Path.home() / ".cache" / "mint")


def digest_of_folder(folder: Path, *, num_threads: int = 4, use_cache: bool = True) -> FolderDigest:
    """Digest every regular file below ``folder``; names starting with a dot are left out.

    Raises :class:`InvalidArgument` if there is no such folder or no ``config.json`` in it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidArgument(f"base model folder is {str(folder)!r}: expected a Hugging Face folder with config.json")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    with ThreadPoolExecutor(num_threads) as pool:
        hashes = list(pool.map(lambda path: _file_sha256(path, use_cache), paths))
    manifest = hashlib.sha256()
    size_bytes = 0
    for path, file_hash in zip(paths, hashes, strict=True):
        size = path.stat().st_size
        size_bytes += size
        manifest.update(f"{file_hash}  {size}  {path.relative_to(folder).as_posix()}\n".encode())
    return FolderDigest(f"sha256:{manifest.hexdigest()}", size_bytes)


def routed_top_k(folder: Path) -> int:
    """Experts that each layer of the base chooses for a token, by its ``config.json``; 0 if it routes nothing.

    Raises :class:`FailedPrecondition` if that file is absent or unreadable.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # Models that see and hear keep their language model's figures apart.
        top_k = config.get("text_config", config).get("num_experts_per_tok")
        return int(top_k or 0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}; name a complete Hugging Face folder") from error


def _file_sha256(path: Path, use_cache: bool) -> str:
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
    entry = cache_folder() / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if use_cache:
        with contextlib.suppress(OSError, ValueError, KeyError):
            cached = json.loads(entry.read_text())
            if cached["key"] == key:
                return str(cached["sha256"])
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if use_cache:
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(entry) as out:
                out.write(json.dumps({"key": key, "sha256": digest.hexdigest()}).encode())
    return digest.hexdigest()
