"""One node for tests: a loader in a process of its own between a real object store and the engine's servicer in this
process, over an engine that counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from mint_api.runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as pb_grpc
from mint_api.v1 import common_pb2
from mint_blobs import blob_key
from mint_blobs.s3 import S3ObjectStore
from mint_core.base_model import digest_of_folder
from mint_core.channel import call, connect
from mint_core.config import ServiceSettings
from mint_core.server import Binding, Services, running
from mint_engine.adapter_folder import AdapterRules
from mint_engine.base_geometry import BaseGeometry
from mint_engine.host import EngineHost, adapter_checker
from mint_engine.replica import Replica
from mint_engine.service import EngineServicer
from support.children import dying_with_parent
from support.fake_engine import FakeEngine, FakePrompts
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.tiny_models import make_tiny_llama
from support.weed import WeedServer

__all__ = ["Materials", "Node", "make_materials", "running_node"]

_SERVICE = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]


class _EngineEndpointSettings(ServiceSettings):
    section = "engine"


@dataclass(frozen=True)
class Materials:
    """A tiny base and adapters of equal size for it."""

    base: Path
    base_digest: str
    adapters: list[ServingAdapter]


def make_materials(folder: Path, num_adapters: int = 4) -> Materials:
    base = make_tiny_llama(folder / "tiny-llama")
    adapters = [make_serving_adapter(base, folder / "folders", folder / "blobs", seed=n) for n in range(num_adapters)]
    return Materials(base, digest_of_folder(base, use_cache=False).digest, adapters)


@dataclass
class Node:
    """A loader that can be started, stopped and killed, beside an engine endpoint that stays."""

    folder: Path
    weed: WeedServer
    store: S3ObjectStore
    """A client of the loader's store that no fault stands before."""
    engine: FakeEngine
    engine_address: str
    materials: Materials
    replica: Replica
    process: asyncio.subprocess.Process | None = None
    stub: pb_grpc.LoaderServiceStub | None = None
    channel: grpc.aio.Channel | None = None
    log: list[dict[str, object]] = field(default_factory=list)
    """What the loader has said so far, over all its lives."""
    _reader: asyncio.Task[None] | None = None

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def socket(self) -> str:
        return f"unix:{self.folder / 'loader.sock'}"

    async def start(self, *, failpoints: str = "", **changes: object) -> None:
        """Start the loader and wait until it serves; ``changes`` are settings, ``object_store__…`` of its store."""
        store = self.weed.settings()
        environ = {
            "MINT_LOADER_OBJECT_STORE__ENDPOINT_URL": store.endpoint_url,
            "MINT_LOADER_OBJECT_STORE__ACCESS_KEY_ID": store.access_key_id,
            "MINT_LOADER_OBJECT_STORE__SECRET_ACCESS_KEY": store.secret_access_key.get_secret_value(),
            "MINT_LOADER_OBJECT_STORE__READ_TIMEOUT_S": "2",
            "MINT_LOADER_OBJECT_STORE__MAX_ATTEMPTS": "2",
            "MINT_LOADER_OBJECT_STORE__TRANSFER_TIMEOUT_S": "5",
            "MINT_LOADER_ENGINE_ADDRESS": self.engine_address,
            "MINT_LOADER_CACHE_DIR": str(self.cache),
            "MINT_LOADER_RUNTIME_LISTEN": self.socket,
            "MINT_FAILPOINTS": failpoints,
        } | {f"MINT_LOADER_{key.upper()}": str(value) for key, value in changes.items()}
        command = dying_with_parent([sys.executable, "-m", "mint_loader"])
        self.process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | environ, stderr=asyncio.subprocess.PIPE
        )
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log.append(json.loads(line))
            if self.log[-1].get("message") == "serving":
                break
        else:
            raise AssertionError(f"the loader did not start: {self.log[-1:]}")
        self._reader = asyncio.create_task(self._read_log(self.process.stderr))
        self.channel = connect(self.socket, retry=False)
        self.stub = pb_grpc.LoaderServiceStub(self.channel)

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self.log.append(json.loads(line))

    async def died(self) -> int:
        """Wait for the loader's end; returns its exit code."""
        assert self.process is not None
        assert self.channel is not None
        assert self._reader is not None
        await self.channel.close()
        code = await asyncio.wait_for(self.process.wait(), 20)
        await self._reader
        self.process = None
        return code

    async def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await self.died()

    async def adapter(self, number: int, *, tenant: str = "acme") -> pb.AdapterRef:
        """Put one adapter into the store; what a loader is told of it."""
        made = self.materials.adapters[number]
        key = blob_key(tenant, made.digest, "stage-1")
        await self.store.put_file(key, made.blob, digest=made.digest)
        return self.ref(made.digest, made.blob.stat().st_size, key, tenant)

    def ref(self, digest: str, size_bytes: int, key: str, tenant: str = "acme") -> pb.AdapterRef:
        return pb.AdapterRef(
            tenant=f"tenants/{tenant}",
            blob=common_pb2.BlobRef(digest=digest, size_bytes=size_bytes),
            object_key=key,
            base_digest=self.materials.base_digest,
        )

    async def ensure(
        self, ref: pb.AdapterRef, tier: pb.Tier.ValueType = pb.TIER_HOST, timeout_s: float = 20
    ) -> pb.EnsureLoadedResponse:
        assert self.stub is not None
        request = pb.EnsureLoadedRequest(adapter=ref, tier=tier)
        response: pb.EnsureLoadedResponse = await call(self.stub.EnsureLoaded, request, timeout_s=timeout_s)
        return response

    async def status(self) -> pb.GetLoaderStatusResponse:
        assert self.stub is not None
        response: pb.GetLoaderStatusResponse = await call(self.stub.GetLoaderStatus, pb.GetLoaderStatusRequest())
        return response

    async def holds(self, *refs: pb.AdapterRef) -> None:
        """Wait until the cache folder holds these and no leftovers, which are removed in the background."""
        expected = sorted(ref.blob.digest.removeprefix("sha256:") for ref in refs)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while self.names() != expected:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.01)
        assert self.names() == expected

    def names(self) -> list[str]:
        """Entries and leftovers in the cache folder."""
        hidden = [*self.cache.glob(".incoming/*"), *self.cache.glob(".trash/*")]
        return sorted(path.name for path in [*self.cache.glob("[0-9a-f]*"), *hidden])


@contextlib.asynccontextmanager
async def running_node(folder: Path, weed: WeedServer, materials: Materials) -> AsyncIterator[Node]:
    """A node whose loader is not started yet; killed and closed at the end."""
    engine = FakeEngine()
    rules = AdapterRules(
        base_digest=materials.base_digest,
        geometry=BaseGeometry.from_folder(materials.base),
        max_lora_rank=8,
        target_modules=engine.limits.target_modules,
    )
    host = EngineHost(engine, FakePrompts(), adapter_checker(folder / "cache", rules), call_timeout_s=10)
    replica = Replica(host, "engineReplicas/one", "unix:engine", "baseModels/tiny", materials.base_digest, "")
    binding = Binding(
        engine_service_pb2_grpc.add_EngineServiceServicer_to_server,
        EngineServicer(host, replica, max_generate_s=60),
        _SERVICE.full_name,
    )

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(runtime=[binding])

    endpoint = _EngineEndpointSettings(runtime_listen=f"unix:{folder / 'engine.sock'}", grace_s=0.1)
    async with running("engine", endpoint, build) as addresses, S3ObjectStore(weed.settings()) as store:
        await store.ensure_bucket()
        node = Node(folder, weed, store, engine, addresses.runtime, materials, replica)
        try:
            yield node
        finally:
            if node.process is not None:
                await node.stop(signal.SIGKILL)
            await host.close()
