"""What a cold request is made of: each of its steps by itself, with nobody else there, one adapter after the other.

What the parts are for adapters whose parts are taken, the whole is for as many others.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench.support.population import BASE, alias_name
from bench.support.serving import Serving
from bench.support.sweeping import Sweeper
from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as loader_grpc
from mint_api.v1 import alias_service_pb2, alias_service_pb2_grpc
from mint_blobs.s3 import S3ObjectStore
from mint_client import MintClient
from mint_core.channel import call, connect

__all__ = ["ColdSteps", "loader_status"]


async def loader_status(serving: Serving) -> loader_pb.GetLoaderStatusResponse:
    """What the node's loader says of itself."""
    async with connect(serving.runtime_address("loader")) as channel:
        stub = loader_grpc.LoaderServiceStub(channel)
        status: loader_pb.GetLoaderStatusResponse = await call(stub.GetLoaderStatus, loader_pb.GetLoaderStatusRequest())
        return status


class ColdSteps:
    """Medians over some adapters that nobody asked for yet."""

    def __init__(self, serving: Serving, client: MintClient, sweeper: Sweeper) -> None:
        self._serving = serving
        self._client = client
        self._sweeper = sweeper
        self._taken_s: dict[str, list[float]] = {}

    async def measured(self, first: int, num: int) -> dict[str, float]:
        """Milliseconds of each step, and of the whole; ``2 * num`` adapters from ``first`` on are used up."""
        with tempfile.TemporaryDirectory(dir=self._serving.folder) as folder:
            async with (
                connect(self._serving.catalog.public) as catalog,
                connect(self._serving.runtime_address("loader")) as loader,
                S3ObjectStore(self._serving.store_settings) as store,
            ):
                aliases: Any = alias_service_pb2_grpc.AliasServiceStub(catalog)
                loads: Any = loader_grpc.LoaderServiceStub(loader)
                for number in range(first, first + num):
                    await self._apart(number, aliases, loads, store, Path(folder))
                    await self._timed("cold_request", lambda number=number + num: self._sweeper.one(number))
                    await self._timed("base_request", self._base)
        return {name: statistics.median(values) * 1e3 for name, values in self._taken_s.items()}

    async def _apart(self, number: int, aliases: Any, loads: Any, store: S3ObjectStore, folder: Path) -> None:
        request = alias_service_pb2.ResolveRequest(name=alias_name(number))
        answer = await self._timed("resolve", lambda: call(aliases.Resolve, request))
        found = answer.resolution
        ref = loader_pb.AdapterRef(
            tenant=alias_name(number).partition("/policies/")[0],
            blob=found.blob,
            object_key=found.object_key,
            base_digest=found.base_digest,
        )
        size_bytes = found.blob.size_bytes
        data = await self._timed("get_bytes", lambda: store.get_bytes(found.object_key, max_bytes=size_bytes))
        target = folder / "file"
        await self._timed(
            "get_file",
            lambda: store.get_file(found.object_key, target, digest=found.blob.digest, size_bytes=size_bytes),
        )
        await self._timed("write_and_sync", lambda: asyncio.to_thread(_write_and_sync, folder, data))
        for tier, name in ((loader_pb.TIER_DISK, "to_disk"), (loader_pb.TIER_HOST, "to_engine")):
            wanted = loader_pb.EnsureLoadedRequest(adapter=ref, tier=tier)
            done = await self._timed(name, lambda wanted=wanted: call(loads.EnsureLoaded, wanted))
            self._taken_s.setdefault(f"{name}_of_it", []).append((done.fetch_ms or done.load_ms) / 1e3)
        await self._timed("resident_request", lambda: self._sweeper.one(number))

    async def _base(self) -> object:
        return await self._client.generate_text(
            BASE, self._sweeper.prompt, sampling=self._sweeper.sampling, return_logprobs=True, tenant="tenants/bench"
        )

    async def _timed(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        begun = time.perf_counter()
        answer = await work()
        self._taken_s.setdefault(name, []).append(time.perf_counter() - begun)
        return answer


def _write_and_sync(folder: Path, data: bytes) -> None:
    """The least that makes bytes durable under a name: one file synced, renamed, its folder synced."""
    with (folder / "new").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    (folder / "new").rename(folder / "old")
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
