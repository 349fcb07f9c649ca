"""An exporter's process over a real catalog, etcd and S3, for tests that break it off; everything it publishes is
signed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mint_api.runtime.v1 import exporter_service_pb2_grpc, publish_service_pb2
from mint_api.v1 import base_model_service_pb2, common_pb2, revision_service_pb2
from mint_blobs import digest_bytes, state_keys
from mint_blobs.s3 import S3ObjectStore
from mint_client import Endpoints, MintClient
from mint_client.garbage import GarbageClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core.channel import call, connect
from mint_core.names import PolicyName
from mint_core.signing import TrustedKeys
from mint_lora import pack
from support.adapters import BASE_DIGEST, config_for, moe_shapes, write_adapter
from support.children import dying_with_parent
from support.etcd import EtcdServer
from support.fault_proxy import FaultProxy
from support.weed import WeedServer

__all__ = ["House", "Process", "exporter_house"]

PART_BYTES = 5 << 20
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(b"exporter house, 32 bytes of key!")


class Process:
    """One of our services, on unix sockets."""

    def __init__(self, name: str, folder: Path, environ: dict[str, str]) -> None:
        self.name = name
        self.public, self.runtime = f"unix:{folder}/{name}.sock", f"unix:{folder}/{name}-runtime.sock"
        self.log_path = folder / f"{name}.log"
        prefix = f"MINT_{name.upper()}_"
        listen = {"LISTEN": self.public, "RUNTIME_LISTEN": self.runtime}
        self._environ = {f"{prefix}{key}": value for key, value in (listen | environ).items()}
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, **environ: str) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - starting takes no time, waiting for it does
                dying_with_parent([sys.executable, "-m", f"mint_{self.name}"]),
                env=os.environ | self._environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        async with grpc.aio.insecure_channel(self.public) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(1200):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    return
                if self._process.poll() is not None:
                    break
                await asyncio.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{self.name} did not start:\n{self.tail()}")

    def stop(self, *, kill: bool = True) -> int:
        """End it; returns its exit status."""
        if self._process is None:
            return 0
        (self._process.kill if kill else self._process.terminate)()
        try:
            return self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def tail(self) -> str:
        """The end of its log."""
        return self.log_path.read_text()[-3000:]

    async def exit_status(self) -> int:
        """Wait until it has ended by itself."""
        assert self._process is not None
        status = await asyncio.to_thread(self._process.wait, 20)
        self._process = None
        return status


@dataclass
class House:
    """Catalog and exporter with what they stand on."""

    catalog: Process
    exporter: Process
    scratch: Path
    store: S3ObjectStore
    proxy: FaultProxy
    """Between the exporter and its store."""
    client: MintClient
    work: WorkClient
    exports: ExporterClient

    async def policy(self, base_model: str = "tiny") -> str:
        name = f"p-{secrets.token_hex(4)}"
        return str((await self.client.policies.create("acme", name, base_model=f"baseModels/{base_model}")).name)

    async def lease(self, policy: str) -> common_pb2.Fence:
        return (await self.work.acquire_lease(policy, secrets.token_hex(8), ttl_s=60)).fence

    async def save(
        self,
        folder: Path,
        policy: str,
        fence: common_pb2.Fence,
        *,
        step: int = 1,
        seed: int = 0,
        shapes: dict[str, tuple[int, int]] | None = None,
        **changes: Any,
    ) -> common_pb2.TrainingState:
        """A training state's weights in the store."""
        shapes = moe_shapes() if shapes is None else shapes
        write_adapter(folder / "weights", shapes, config_for(shapes, **changes), seed=seed)
        data = (folder / "weights").read_bytes()
        keys = state_keys(PolicyName.parse(policy), "r1", step, fence.token)
        await self.store.put_bytes(keys.weights, data, if_absent=False)
        return common_pb2.TrainingState(
            run="tenants/acme/runs/r1",
            step=step,
            fence=fence.token,
            weights_key=keys.weights,
            weights=common_pb2.BlobRef(digest=digest_bytes(data), size_bytes=len(data)),
        )

    async def save_for_export(
        self, folder: Path, policy: str, fence: common_pb2.Fence, *, seed: int = 0
    ) -> common_pb2.TrainingState:
        """As the trainer does: the blob itself, where the catalog wants it."""
        shapes = moe_shapes()
        write_adapter(folder / "weights", shapes, config_for(shapes), seed=seed)
        packed = pack(folder / "weights", folder / "packed")
        record = await self.work.stage_blob(f"tenants/acme/blobs/{packed.digest}", packed.size_bytes)
        await self.store.put_file(record.object_key, packed.path, digest=packed.digest)
        return common_pb2.TrainingState(
            run="tenants/acme/runs/r1",
            step=1,
            fence=fence.token,
            weights_key=record.object_key,
            weights=common_pb2.BlobRef(digest=packed.digest, size_bytes=packed.size_bytes),
        )

    async def once(self, method: str, request: Any) -> Any:
        """One call to the exporter over a channel that does not retry."""
        async with connect(self.exporter.runtime, retry=False) as channel:
            stub = exporter_service_pb2_grpc.ExporterServiceStub(channel)
            return await call(getattr(stub, method), request, timeout_s=30)

    async def revisions(self, policy: str) -> list[revision_service_pb2.Revision]:
        return [each async for each in self.client.revisions.list(policy)]

    async def blob(self, digest: str) -> publish_service_pb2.BlobRecord:
        return await self.work.get_blob(f"tenants/acme/blobs/{digest}")

    async def check(self, policy: str, numbers: list[int]) -> None:
        """The policy has these revisions; each one's bytes are there once, verified, and signed."""
        revisions = await self.revisions(policy)
        assert [each.number for each in revisions] == numbers
        for revision in revisions:
            digest, size_bytes = revision.blob.digest, revision.blob.size_bytes
            record = await self.blob(digest)
            assert record.state == publish_service_pb2.BLOB_STATE_VERIFIED
            assert record.object_key == revision.object_key
            await self.store.verify(record.object_key, digest=digest, size_bytes=size_bytes)
            prefix = record.object_key.rpartition("/")[0] + "/"
            assert [each.key async for each in self.store.list(prefix)] == [record.object_key]
            trusted = TrustedKeys({"acme": [SIGNING_KEY.public_key()]})
            trusted.check("acme", digest, revision.base_digest, revision.signature)  # type: ignore[arg-type]

    async def part_uploads(self) -> list[str]:
        """Keys of uploads in parts that are not completed."""
        return [each.key async for each in self.store.list_part_uploads("tenants/")]

    async def collect_garbage(self) -> None:
        async with GarbageClient(self.catalog.runtime) as client:
            async for _ in client.collect():
                pass

    def left_on_disk(self) -> list[Path]:
        return [each for part in self.scratch.iterdir() if part.is_dir() for each in part.rglob("*")]


@contextlib.asynccontextmanager
async def exporter_house(folder: Path, etcd: EtcdServer, weed: WeedServer) -> AsyncIterator[House]:
    """Everything up, with one base model ``tiny``; garbage has no grace and is collected when asked for."""
    sockets = folder / "s"
    sockets.mkdir()
    pem = SIGNING_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    keys = {
        "OBJECT_STORE__ACCESS_KEY_ID": weed.access_key_id,
        "OBJECT_STORE__SECRET_ACCESS_KEY": weed.secret_access_key,
    }
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(weed.endpoint_url))
        catalog = Process(
            "catalog",
            sockets,
            keys
            | {
                "ETCD__ENDPOINTS": f'["{etcd.endpoint}"]',
                "OBJECT_STORE__ENDPOINT_URL": weed.endpoint_url,
                "GC_GRACE_S": "0",
            },
        )
        exporter = Process(
            "exporter",
            sockets,
            keys
            | {
                "CATALOG_ADDRESS": catalog.public,
                "CATALOG_RUNTIME_ADDRESS": catalog.runtime,
                "SCRATCH_DIR": str(folder / "scratch"),
                "SIGNING_KEY_FILE": str(folder / "key.pem"),
                "OBJECT_STORE__ENDPOINT_URL": proxy.url,
                "OBJECT_STORE__MAX_ATTEMPTS": "2",
                "OBJECT_STORE__PART_SIZE_BYTES": str(PART_BYTES),
            },
        )
        stack.callback(exporter.stop)
        stack.callback(catalog.stop)
        await asyncio.gather(catalog.start(), exporter.start())
        endpoints = Endpoints(catalog=catalog.public, exporter=exporter.public)
        client = await stack.enter_async_context(MintClient(endpoints))
        await client.base_models.register(
            base_model_service_pb2.BaseModel(name="baseModels/tiny", digest=BASE_DIGEST, size_bytes=1)
        )
        yield House(
            catalog,
            exporter,
            folder / "scratch",
            await stack.enter_async_context(S3ObjectStore(weed.settings())),
            proxy,
            client,
            await stack.enter_async_context(WorkClient(catalog.runtime)),
            await stack.enter_async_context(ExporterClient(exporter.runtime)),
        )
