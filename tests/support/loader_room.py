"""The loader's domain without servers: a store in memory that can be slow, an engine that keeps what it loads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import (
    BaseModelMismatch,
    DeadlineExceeded,
    DigestMismatch,
    InvalidArgument,
    MintError,
    Unavailable,
)
from mint_loader.cache import DiskCache
from mint_loader.loading import Limits, Loading
from mint_loader.model import AdapterRef, EngineLoad, Resident, SignatureCheck, Tier

__all__ = ["BASE", "OTHER_BASE", "FakeEngine", "RoomNode", "SlowStore", "room_node", "until"]

BASE = f"sha256:{'b' * 64}"
OTHER_BASE = f"sha256:{'c' * 64}"


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.002)


class FakeEngine:
    """Keeps what it loads; refuses a folder whose weights are not the digest."""

    def __init__(self, cache_folder: Path) -> None:
        self.cache_folder = cache_folder
        self.digests: set[str] = set()
        self.pinned: set[str] = set()
        self.num_loads = 0
        self.num_looks = 0
        self.order: list[str] = []
        self.error: MintError | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.base_digest = BASE

    async def load(self, digest: str, folder: str, *, into_slot: bool, pinned: bool, timeout_s: float) -> EngineLoad:
        self.num_loads += 1
        self.order.append(digest)
        try:
            async with asyncio.timeout(timeout_s):
                await self.go.wait()
        except TimeoutError:
            raise DeadlineExceeded("engine") from None
        if self.error is not None:
            raise self.error
        weights = (self.cache_folder / folder / "adapter_model.safetensors").read_bytes()
        if f"sha256:{hashlib.sha256(weights).hexdigest()}" != digest:
            raise DigestMismatch("other bytes", field="digest")
        was_resident = digest in self.digests
        self.digests.add(digest)
        if pinned:
            self.pinned.add(digest)
        return EngineLoad(was_resident, 1.0)

    async def unpin(self, digest: str, *, timeout_s: float) -> None:
        self.pinned.discard(digest)

    async def resident(self, *, timeout_s: float) -> Resident:
        self.num_looks += 1
        if isinstance(self.error, Unavailable):
            raise self.error
        return Resident(self.base_digest, frozenset(self.digests), (), frozenset(self.pinned))


class SlowStore(MemoryObjectStore):
    """Counts reads, and lets them wait."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.num_running = 0
        self.peak = 0
        self.order: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: MintError | None = None

    async def get_file(
        self, key: str, path: Path, *, digest: str, size_bytes: int | None = None, durable: bool = True
    ) -> None:
        self.num_reads += 1
        self.order.append(digest)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            await super().get_file(key, path, digest=digest, size_bytes=size_bytes, durable=durable)
        finally:
            self.num_running -= 1

    def flip(self, key: str) -> None:
        stored = self._objects[key]
        self._objects[key] = type(stored)(bytes([stored.data[0] ^ 1]) + stored.data[1:], stored.info)


def write_folder(blob: Path, folder: Path, *, base_digest: str) -> None:
    if blob.read_bytes().startswith(b"pickle"):
        raise InvalidArgument("not an adapter", field="weights")
    if base_digest != BASE:
        raise BaseModelMismatch("another base")
    folder.mkdir()
    shutil.copy(blob, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(b"{}")


def verify(folder: Path, digest: str) -> bool:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return f"sha256:{hashlib.sha256(weights).hexdigest()}" == digest


@dataclass
class RoomNode:
    """One node's loader with its surroundings."""

    cache: DiskCache
    store: SlowStore
    engine: FakeEngine
    loading: Loading
    refs: list[AdapterRef] = field(default_factory=list)

    async def adapter(self, data: bytes, *, tenant: str = "acme", base_digest: str = BASE) -> AdapterRef:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        key = f"tenants/{tenant}/blobs/{digest.removeprefix('sha256:')}/stage-1"
        await self.store.put_bytes(key, data)
        return AdapterRef.checked(
            tenant=f"tenants/{tenant}", digest=digest, size_bytes=len(data), object_key=key, base_digest=base_digest
        )

    def ensure(self, ref: AdapterRef, tier: Tier = Tier.HOST, priority: int = 0, timeout_s: float = 5.0):  # type: ignore[no-untyped-def]
        return self.loading.ensure(ref, tier, priority=priority, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def room_node(
    folder: Path,
    *,
    max_bytes: int = 10_000,
    limits: Limits | None = None,
    check_signature: SignatureCheck | None = None,
) -> AsyncIterator[RoomNode]:
    cache = DiskCache(folder, max_bytes, verify=verify, overhead_bytes=10)
    await cache.open()
    store, engine = SlowStore(), FakeEngine(folder)
    loading = Loading(cache, store, engine, write_folder, limits or Limits(), check_signature=check_signature)
    try:
        yield RoomNode(cache, store, engine, loading)
    finally:
        await loading.close()
        await cache.close()
