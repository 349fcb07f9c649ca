"""SHA-256 digests in MinT's spelling, ``sha256:`` and 64 lower-case hex digits."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from pathlib import Path

__all__ = ["digest_base64", "digest_bytes", "digest_file", "digest_file_sync", "digest_hex", "format_digest"]


def format_digest(raw: bytes) -> str:
    """The digest spelling of 32 raw bytes of SHA-256."""
    return f"sha256:{raw.hex()}"


def digest_hex(digest: str) -> str:
    """The 64 hex digits of ``digest``, which must have been checked before (``mint_core.names.check_digest``)."""
    return digest.removeprefix("sha256:")


def digest_base64(digest: str) -> str:
    """The base64 spelling that S3 uses in ``x-amz-checksum-sha256``."""
    return base64.b64encode(bytes.fromhex(digest_hex(digest))).decode("ascii")


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """Digest of bytes in memory."""
    return format_digest(hashlib.sha256(data).digest())


def digest_file_sync(path: Path) -> str:
    """Digest of a file, streamed; blocks the calling thread. Raises :class:`OSError`."""
    with path.open("rb") as file:
        return format_digest(hashlib.file_digest(file, "sha256").digest())


async def digest_file(path: Path) -> str:
    """Digest of a file, computed in a thread. Raises :class:`OSError`."""
    return await asyncio.to_thread(digest_file_sync, path)
