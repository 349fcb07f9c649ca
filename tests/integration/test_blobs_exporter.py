"""The exporter's process over a real catalog, etcd and S3: whole exports, uploads, and its surroundings going away."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import (
    exporter_service_pb2,
    publish_service_pb2,
    publish_service_pb2_grpc,
)
from mint_api.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    common_pb2,
    revision_service_pb2,
)
from mint_blobs import digest_bytes
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
from mint_lora import LAYOUT_PACKED, validate_adapter
from support.adapters import BASE_DIGEST, config_for, delta_weights, dense_shapes, write_adapter
from support.exporter_house import House
from support.weed import WeedServer

pytestmark = pytest.mark.asyncio(loop_scope="session")

MIB = 1 << 20


async def test_from_state_to_revision(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    state = await house.save(tmp_path, policy, fence)
    lineage = revision_service_pb2.Lineage(data_digest=digest_bytes(b"data"), recipe="grpo")
    response = await house.exports.export(policy, state, fence, lineage=lineage)
    assert [each.name for each in await house.revisions(policy)] == [f"{policy}/revisions/1"]
    revision = response.revision
    assert (revision.number, revision.layout, revision.num_tensors) == (1, LAYOUT_PACKED, 28)
    assert (revision.lora.rank, revision.lora.alpha, revision.base_digest) == (4, 8.0, BASE_DIGEST)
    assert (revision.lineage.run, revision.lineage.step) == (state.run, 1)
    assert (revision.lineage.data_digest, revision.lineage.recipe) == (digest_bytes(b"data"), "grpo")
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


async def test_store_away_then_back(house: House, house_weed: WeedServer, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    state = await house.save(tmp_path, policy, fence, seed=70)
    request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=fence)
    house_weed.kill()
    try:
        with pytest.raises(Unavailable):
            await house.once("Export", request)
    finally:
        house_weed.start()
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
