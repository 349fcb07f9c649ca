"""The exporter's process over a real catalog, etcd and S3: whole exports, and every way to break one off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mint_api.runtime.v1 import (
    exporter_service_pb2,
    exporter_service_pb2_grpc,
    publish_service_pb2,
    publish_service_pb2_grpc,
)
from mint_api.v1 import (
    base_model_service_pb2,
    blob_service_pb2,
    blob_service_pb2_grpc,
    common_pb2,
    revision_service_pb2,
)
from mint_blobs import digest_bytes, state_keys
from mint_blobs.s3 import S3ObjectStore
from mint_client import Endpoints, MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core.channel import call, connect
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DigestMismatch,
    InvalidArgument,
    LeaseLost,
    MintError,
    NotFound,
    Unavailable,
)
from mint_core.names import PolicyName
from mint_lora import LAYOUT_PACKED, validate_adapter
from support.adapters import BASE_DIGEST, config_for, delta_weights, dense_shapes, moe_shapes, write_adapter
from support.children import dying_with_parent
from support.etcd import EtcdServer, running_etcd
from support.weed import WeedServer, running_weed

# Processes take seconds to start: all tests share them and their event loop, and leave them running.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# In the order an export passes them.
POINTS = ("fetched", "packed", "staged", "uploaded", "read_back", "verified", "published")
MIB = 1 << 20


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
            for _ in range(300):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    return
                if self._process.poll() is not None:
                    break
                await asyncio.sleep(0.1)
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
    client: MintClient
    work: WorkClient
    exports: ExporterClient

    async def policy(self) -> str:
        name = f"p-{secrets.token_hex(4)}"
        return str((await self.client.policies.create("acme", name, base_model="baseModels/tiny")).name)

    async def lease(self, policy: str) -> common_pb2.Fence:
        return (await self.work.acquire_lease(policy, secrets.token_hex(8), ttl_s=60)).fence

    async def save(
        self, folder: Path, policy: str, fence: common_pb2.Fence, *, step: int = 1, seed: int = 0, **changes: Any
    ) -> common_pb2.TrainingState:
        shapes = moe_shapes()
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

    async def revisions(self, policy: str) -> list[revision_service_pb2.Revision]:
        return [each async for each in self.client.revisions.list(policy)]

    async def blob(self, digest: str) -> publish_service_pb2.BlobRecord:
        return await self.work.get_blob(f"tenants/acme/blobs/{digest}")

    def left_on_disk(self) -> list[Path]:
        return [each for part in self.scratch.iterdir() if part.is_dir() for each in part.rglob("*")]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(etcd: EtcdServer, weed: WeedServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    sockets = folder / "s"
    sockets.mkdir()
    catalog = Process("catalog", sockets, {"ETCD__ENDPOINTS": f'["{etcd.endpoint}"]'})
    exporter = Process(
        "exporter",
        sockets,
        {
            "CATALOG_ADDRESS": catalog.public,
            "CATALOG_RUNTIME_ADDRESS": catalog.runtime,
            "SCRATCH_DIR": str(folder / "scratch"),
            "OBJECT_STORE__ENDPOINT_URL": weed.endpoint_url,
            "OBJECT_STORE__ACCESS_KEY_ID": weed.access_key_id,
            "OBJECT_STORE__SECRET_ACCESS_KEY": weed.secret_access_key,
            "OBJECT_STORE__MAX_ATTEMPTS": "2",
        },
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(exporter.stop)
        stack.callback(catalog.stop)
        await catalog.start()
        await exporter.start()
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
            client,
            await stack.enter_async_context(WorkClient(catalog.runtime)),
            await stack.enter_async_context(ExporterClient(exporter.runtime)),
        )


async def test_from_state_to_revision(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    state = await house.save(tmp_path, policy, fence)
    lineage = revision_service_pb2.Lineage(data_digest=digest_bytes(b"data"))
    response = await house.exports.export(policy, state, fence, lineage=lineage)
    assert [each.name for each in await house.revisions(policy)] == [f"{policy}/revisions/1"]
    revision = response.revision
    assert (revision.number, revision.layout, revision.num_tensors) == (1, LAYOUT_PACKED, 28)
    assert (revision.lora.rank, revision.lora.alpha, revision.base_digest) == (4, 8.0, BASE_DIGEST)
    assert (revision.lineage.run, revision.lineage.step) == (state.run, 1)
    assert revision.lineage.data_digest == digest_bytes(b"data")
    assert revision.lineage.code_version.startswith("mint-lora")
    record = await house.blob(revision.blob.digest)
    assert record.state == publish_service_pb2.BLOB_STATE_VERIFIED
    await house.store.get_file(record.object_key, tmp_path / "blob", digest=revision.blob.digest)
    validate_adapter(tmp_path / "blob", expected_base_digest=BASE_DIGEST, layout=LAYOUT_PACKED)
    ours, theirs = delta_weights(tmp_path / "blob"), delta_weights(tmp_path / "weights")
    assert all((ours[module] == theirs[module]).all() for module in theirs)
    assert response.timings.upload_ms > 0
    again = await house.exports.export(policy, state, fence, lineage=lineage)
    assert again.revision == revision
    second = await house.exports.export(policy, await house.save(tmp_path, policy, fence, step=2, seed=1), fence)
    assert second.revision.number == 2
    assert house.left_on_disk() == []


@pytest.mark.timeout(240)
async def test_killed_at_every_step_and_repeated(house: House, tmp_path: Path) -> None:
    for number, point in enumerate(POINTS):
        policy = await house.policy()
        fence = await house.lease(policy)
        state = await house.save(tmp_path, policy, fence, seed=number)
        house.exporter.stop(kill=False)
        await house.exporter.start(MINT_FAILPOINTS=f"exporter.{point}=kill")
        export = asyncio.create_task(_once(house, policy, state, fence))
        assert await house.exporter.exit_status() == -9, point
        with pytest.raises(Unavailable):
            await export
        assert len(await house.revisions(policy)) == (1 if point == "published" else 0), point
        await house.exporter.start()
        assert house.left_on_disk() == [], point
        response = await house.exports.export(policy, state, fence)
        assert [each.number for each in await house.revisions(policy)] == [1], point
        record = await house.blob(response.revision.blob.digest)
        size_bytes = response.revision.blob.size_bytes
        await house.store.verify(record.object_key, digest=response.revision.blob.digest, size_bytes=size_bytes)
        prefix = record.object_key.rpartition("/")[0] + "/"
        assert [each.key async for each in house.store.list(prefix)] == [record.object_key], point


async def _once(house: House, policy: str, state: common_pb2.TrainingState, fence: common_pb2.Fence) -> Any:
    """One export over a channel that does not retry."""
    async with connect(house.exporter.runtime, retry=False) as channel:
        stub = exporter_service_pb2_grpc.ExporterServiceStub(channel)
        request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=fence)
        return await call(stub.Export, request, timeout_s=30)


async def test_superseded_holder_changes_nothing(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    old = await house.lease(policy)
    state = await house.save(tmp_path, policy, old, seed=50)
    await house.work.release_lease(old)
    new = await house.lease(policy)
    with pytest.raises(LeaseLost):
        await house.exports.export(policy, state, old)
    assert await house.revisions(policy) == []
    assert (await house.exports.export(policy, state, new)).revision.number == 1
    # The loser's repeated question is answered with what is there; it publishes nothing.
    assert (await house.exports.export(policy, state, old)).revision.number == 1
    with pytest.raises(LeaseLost):
        await house.exports.export(policy, await house.save(tmp_path, policy, old, step=2, seed=51), old)
    gone = common_pb2.TrainingState()
    gone.CopyFrom(state)
    gone.weights_key = "tenants/acme/states/none/weights.safetensors"
    with pytest.raises(LeaseLost):
        await house.exports.export(policy, gone, old)
    with pytest.raises(NotFound):
        await house.exports.export(policy, gone, new)


async def test_bad_states_answer_their_documented_errors(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    good = await house.save(tmp_path, policy, fence, seed=60)

    async def refused(error: type[MintError], says: str, **changes: Any) -> None:
        state = common_pb2.TrainingState()
        state.CopyFrom(good)
        if "weights" in changes:
            state.weights.CopyFrom(changes.pop("weights"))
        for key, value in changes.items():
            setattr(state, key, value)
        with pytest.raises(error, match=says):
            await house.exports.export(policy, state, fence)

    await refused(InvalidArgument, "tenant acme", weights_key=good.weights_key.replace("acme", "evil"))
    await refused(InvalidArgument, "object key", weights_key="tenants/acme/states/../../evil")
    await refused(
        BlobCorrupt, "digest", weights=common_pb2.BlobRef(digest=digest_bytes(b""), size_bytes=good.weights.size_bytes)
    )
    await refused(InvalidArgument, "digest", weights=common_pb2.BlobRef(digest="md5:1", size_bytes=1))
    await refused(InvalidArgument, "training_state.run", run="tenants/evil/runs/r1")
    foreign = await house.save(tmp_path, policy, fence, step=3, base_digest="sha256:" + "0" * 64)
    with pytest.raises(BaseModelMismatch):
        await house.exports.export(policy, foreign, fence)
    await house.store.put_bytes("tenants/acme/states/cut", (tmp_path / "weights").read_bytes()[:-9], if_absent=False)
    cut = (tmp_path / "weights").read_bytes()[:-9]
    await refused(
        InvalidArgument,
        "cut off",
        weights_key="tenants/acme/states/cut",
        weights=common_pb2.BlobRef(digest=digest_bytes(cut), size_bytes=len(cut)),
    )
    assert await house.revisions(policy) == []
    assert (await house.exports.export(policy, good, fence)).revision.number == 1


async def test_upload_import_download(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    shapes = dense_shapes()
    config = config_for(shapes, use_rslora=True)
    write_adapter(tmp_path / "weights", shapes, config)
    uploaded = await house.client.blobs.upload("acme", tmp_path / "weights")
    progress = await house.client.blobs.get_upload(f"tenants/acme/blobs/{uploaded.digest}")
    assert (progress.verified, progress.committed_bytes) == (True, uploaded.size_bytes)
    text = json.dumps(config.to_peft_config())
    revision = await house.exports.import_revision(policy, uploaded, text)
    assert (revision.number, revision.lora.use_rslora) == (1, True)
    target = tmp_path / "download"
    await house.client.blobs.download(f"tenants/acme/blobs/{revision.blob.digest}", target)
    assert validate_adapter(target, layout=LAYOUT_PACKED).config.base_model == "tiny"
    with pytest.raises(NotFound):
        await house.client.blobs.download(f"tenants/evil/blobs/{revision.blob.digest}", tmp_path / "stolen")
    with pytest.raises(InvalidArgument, match="peft_type"):
        await house.exports.import_revision(policy, uploaded, "{}")


async def test_upload_broken_by_a_killed_exporter(house: House, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(secrets.token_bytes(48 * MIB))
    upload = asyncio.create_task(house.client.blobs.upload("acme", big))
    for _ in range(2000):
        if house.left_on_disk():
            break
        await asyncio.sleep(0.005)
    house.exporter.stop()
    await house.exporter.start()
    blob = await upload
    assert blob.digest == digest_bytes(big.read_bytes())
    await house.client.blobs.download(f"tenants/acme/blobs/{blob.digest}", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert house.left_on_disk() == []


async def test_store_away_then_back(house: House, weed: WeedServer, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    state = await house.save(tmp_path, policy, fence, seed=70)
    weed.kill()
    try:
        with pytest.raises(Unavailable):
            await _once(house, policy, state, fence)
    finally:
        weed.start()
    assert (await house.exports.export(policy, state, fence)).revision.number == 1


async def test_wrong_store_credentials_end_the_start_with_one_sentence(house: House) -> None:
    house.exporter.stop(kill=False)
    with pytest.raises(RuntimeError, match=r"mint-exporter: PERMISSION_DENIED: .*Check the secret"):
        await house.exporter.start(MINT_EXPORTER_OBJECT_STORE__SECRET_ACCESS_KEY="wrong")
    with pytest.raises(RuntimeError, match="max_scratch_bytes is 5"):
        await house.exporter.start(MINT_EXPORTER_MAX_SCRATCH_BYTES="5")
    await house.exporter.start()


async def test_drains_on_sigterm(house: House) -> None:
    assert house.exporter.stop(kill=False) == 0
    assert "draining" in house.exporter.tail()
    assert "Traceback" not in house.exporter.tail()
    await house.exporter.start()


async def test_digest_mismatch_keeps_nothing(house: House) -> None:
    name = "tenants/acme/blobs/" + digest_bytes(b"announced")
    requests = [
        blob_service_pb2.UploadBlobRequest(announcement=blob_service_pb2.UploadAnnouncement(name=name, size_bytes=5)),
        blob_service_pb2.UploadBlobRequest(chunk=blob_service_pb2.BlobChunk(offset=0, data=b"other")),
    ]
    async with connect(house.exporter.public) as channel:
        stub = blob_service_pb2_grpc.BlobServiceStub(channel)
        with pytest.raises(DigestMismatch):
            await call(stub.UploadBlob, iter(requests))
        with pytest.raises(InvalidArgument, match="first message"):
            await call(stub.UploadBlob, iter(requests[1:]))
        with pytest.raises(InvalidArgument, match="first message"):
            await call(stub.UploadBlob, iter(()))
    async with connect(house.catalog.runtime) as channel:
        stub = publish_service_pb2_grpc.PublishServiceStub(channel)
        with pytest.raises(NotFound):
            await call(stub.GetBlob, publish_service_pb2.GetBlobRequest(name=name))
    assert house.left_on_disk() == []
