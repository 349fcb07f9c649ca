from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mint_blobs.digests import digest_bytes
from mint_core import failpoints
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    BlobCorrupt,
    BlobMissing,
    InvalidArgument,
    LeaseLost,
    MintError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import PolicyName
from mint_exporter.model import Fence, Lineage, SavedWeights
from mint_lora import LAYOUT_PACKED, validate_adapter
from support.adapters import BASE_DIGEST, delta_weights
from support.exporting import FENCE, MIB, POLICY, RUN, Bench, exporter_bench

POINTS = sorted(
    each.name
    for each in failpoints.declared()
    if each.name.startswith("exporter.") and not each.name.startswith("exporter.import.")
)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with exporter_bench(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    for point in failpoints.declared():
        point.disarm()


async def test_a_state_becomes_a_revision(bench: Bench, tmp_path: Path) -> None:
    weights = await bench.save()
    exported = await bench.export(weights)
    revision = exported.published.revision
    assert revision.number == 1
    publication = revision.publication
    assert publication.lineage == RUN
    assert publication.config.layout == LAYOUT_PACKED
    assert publication.num_tensors == 2 * 14
    record = bench.catalog.blobs[publication.blob]
    await bench.store.get_file(record.object_key, tmp_path / "blob", digest=publication.blob.digest)
    assert validate_adapter(tmp_path / "blob", expected_base_digest=BASE_DIGEST).size_bytes == publication.size_bytes
    await bench.store.get_file(weights.key, tmp_path / "state", digest=weights.digest)
    ours, theirs = delta_weights(tmp_path / "blob"), delta_weights(tmp_path / "state")
    assert all((ours[module] == theirs[module]).all() for module in theirs)
    timings = exported.timings
    assert min(timings.fetch_ms, timings.pack_ms, timings.upload_ms, timings.publish_ms) > 0
    bench.assert_sound()


async def test_a_blob_that_the_trainer_stored_is_not_stored_again(bench: Bench) -> None:
    weights = await bench.save_for_export()
    publication = (await bench.export(weights)).published.revision.publication
    assert publication.blob.digest == weights.digest
    assert publication.num_tensors == 2 * 14
    assert bench.catalog.blobs[publication.blob].object_key == weights.key
    assert list(bench.store._objects) == [weights.key]
    assert (await bench.export(weights)).published.revision.number == 1
    bench.assert_sound()
    other = await bench.save()
    same = await bench.exporter.export(POLICY, other, FENCE, Lineage(run=RUN.run, step=21), "")
    assert same.published.revision.publication.blob == publication.blob


async def test_a_blob_that_the_trainer_stored_elsewhere_is_stored_once_more(bench: Bench, tmp_path: Path) -> None:
    weights = await bench.save_for_export()
    await bench.store.get_file(weights.key, tmp_path / "state", digest=weights.digest)
    elsewhere = SavedWeights(
        "tenants/acme/states/support/r1/00000001-7/export.safetensors", weights.digest, weights.size_bytes
    )
    await bench.store.put_file(elsewhere.key, tmp_path / "state", digest=weights.digest)
    await bench.store.delete(weights.key)
    assert (await bench.export(elsewhere)).published.revision.publication.blob.digest == weights.digest
    assert sorted(bench.store._objects) == sorted([elsewhere.key, weights.key])
    bench.assert_sound()


async def test_a_blob_condemned_after_it_was_read_is_staged_and_stored_anew(bench: Bench) -> None:
    weights = await bench.save_for_export()
    bench.catalog.num_condemnations = 1
    publication = (await bench.export(weights)).published.revision.publication
    assert publication.blob.digest == weights.digest
    assert bench.catalog.blobs[publication.blob].object_key != weights.key
    bench.assert_sound()


async def test_a_blob_that_the_trainer_stored_badly_is_not_published(bench: Bench) -> None:
    weights = await bench.save_for_export()
    stored = bench.store._objects[weights.key]
    bench.store._objects[weights.key] = replace(stored, data=stored.data[:-1] + bytes([stored.data[-1] ^ 1]))
    with pytest.raises(BlobCorrupt):
        await bench.export(weights)
    assert bench.revisions == []
    assert not any(record.is_verified for record in bench.catalog.blobs.values())
    bench.assert_sound()


@pytest.mark.parametrize("point", sorted({*POINTS} - {"exporter.uploaded"}))
async def test_of_a_blob_the_trainer_stored_broken_off_anywhere_and_repeated(bench: Bench, point: str) -> None:
    weights = await bench.save_for_export()
    armed = next(each for each in failpoints.declared() if each.name == point)
    armed.arm("error")
    with pytest.raises(Unavailable, match=point):
        await bench.export(weights)
    assert len(bench.revisions) == (1 if point == "exporter.published" else 0)
    bench.assert_sound()
    armed.disarm()
    assert (await bench.export(weights)).published.revision.number == 1
    assert (len(bench.revisions), bench.catalog.num_stagings) == (1, 1)
    assert list(bench.store._objects) == [weights.key]
    bench.assert_sound()


async def test_the_same_state_again_is_the_same_revision(bench: Bench) -> None:
    weights = await bench.save()
    first = await bench.export(weights)
    assert (await bench.export(weights)).published.revision == first.published.revision
    both = await asyncio.gather(bench.export(weights), bench.export(weights))
    assert {each.published.revision.number for each in both} == {1}
    assert (len(bench.revisions), bench.catalog.num_stagings) == (1, 1)
    # The answer was lost and the lease given back meanwhile: still the same answer.
    bench.catalog.fences[POLICY] = 99
    assert (await bench.export(weights)).published.revision == first.published.revision


async def test_there_are_points_to_fail_at() -> None:
    assert [
        f"exporter.{each}" for each in ("fetched", "packed", "published", "read_back", "staged", "uploaded", "verified")
    ] == POINTS


@pytest.mark.parametrize("point", POINTS)
async def test_broken_off_anywhere_and_repeated(bench: Bench, point: str) -> None:
    weights = await bench.save()
    armed = next(each for each in failpoints.declared() if each.name == point)
    armed.arm("error")
    with pytest.raises(Unavailable, match=point):
        await bench.export(weights)
    assert len(bench.revisions) == (1 if point == "exporter.published" else 0)
    bench.assert_sound()
    armed.disarm()
    assert (await bench.export(weights)).published.revision.number == 1
    assert len(bench.revisions) == 1
    assert bench.catalog.num_stagings == 1
    bench.assert_sound()


@pytest.mark.parametrize("point", POINTS)
async def test_cancelled_anywhere_and_repeated(bench: Bench, point: str) -> None:
    weights = await bench.save()
    armed = next(each for each in failpoints.declared() if each.name == point)
    armed.arm("sleep", sleep_s=30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await bench.export(weights)
    bench.assert_sound()
    armed.disarm()
    assert (await bench.export(weights)).published.revision.number == 1
    assert len(bench.revisions) == 1
    bench.assert_sound()


async def test_a_superseded_fence_stores_and_publishes_nothing(bench: Bench) -> None:
    weights = await bench.save()
    bench.catalog.fences[POLICY] = 8
    with pytest.raises(LeaseLost, match="fence 7"):
        await bench.export(weights)
    assert bench.revisions == []
    assert bench.catalog.blobs == {}
    del bench.catalog.fences[POLICY]
    with pytest.raises(LeaseLost):
        await bench.export(SavedWeights("tenants/acme/states/none/weights.safetensors", weights.digest, 5))
    bench.assert_sound()


async def test_garbage_collection_between_verify_and_publish(bench: Bench) -> None:
    weights = await bench.save()
    bench.catalog.num_condemnations = 2
    assert (await bench.export(weights)).published.revision.number == 1
    assert bench.catalog.num_stagings == 3
    bench.assert_sound()
    bench.catalog.num_condemnations = 3
    with pytest.raises(BlobMissing):
        await bench.export(await bench.save(seed=1), lineage=Lineage(run=RUN.run, step=21))


async def test_restaged_while_it_was_uploaded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = await bench.save()
    put, num_losses = bench.store.put_file, 2

    async def put_and_lose(key: str, path: Path, *, digest: str, if_absent: bool = True) -> object:
        nonlocal num_losses
        info = await put(key, path, digest=digest, if_absent=if_absent)
        if num_losses:
            num_losses -= 1
            (record,) = bench.catalog.blobs.values()
            bench.catalog.blobs.clear()
            if num_losses:
                await bench.catalog.stage_blob(record.name, record.size_bytes)
        return info

    monkeypatch.setattr(bench.store, "put_file", put_and_lose)
    # Once the record is another one, once there is none: the exporter learns it at VerifyBlob and begins anew.
    assert (await bench.export(weights)).published.revision.number == 1
    assert bench.catalog.num_stagings == 3
    bench.assert_sound()


async def test_store_that_gives_back_other_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = await bench.save()
    put = bench.store.put_file

    async def put_damaged(key: str, path: Path, *, digest: str, if_absent: bool = True) -> object:
        await put(key, path, digest=digest, if_absent=if_absent)
        stored = bench.store._objects[key]
        return await bench.store.put_bytes(key, stored.data[:-1] + b"\xff", if_absent=False)

    monkeypatch.setattr(bench.store, "put_file", put_damaged)
    with pytest.raises(BlobCorrupt):
        await bench.export(weights)
    monkeypatch.undo()
    with pytest.raises(BlobCorrupt, match="holds other bytes"):
        await bench.export(weights)
    assert bench.revisions == []
    assert not any(each.is_verified for each in bench.catalog.blobs.values())
    bench.assert_sound()


async def test_a_step_has_one_adapter(bench: Bench) -> None:
    await bench.export(await bench.save(seed=0))
    with pytest.raises(AlreadyExists):
        await bench.export(await bench.save(seed=1))
    second = await bench.export(await bench.save(seed=2), lineage=Lineage(run=RUN.run, step=21))
    assert second.published.revision.number == 2


async def test_bad_states(bench: Bench) -> None:
    good = await bench.save()
    foreign = await bench.save(seed=1, tenant="evil")
    other_base = await bench.save(seed=2, base_digest="sha256:" + "0" * 64)
    high_rank = await bench.save(seed=3, rank=17)
    huge = await bench.save(seed=4, rank_pattern={"layers.0.self_attn.q_proj": 512})
    no_adapter = await bench.store.put_bytes("tenants/acme/states/x/weights.safetensors", pickle.dumps([1.5] * 3))
    cases: list[tuple[SavedWeights, type[MintError], str]] = [
        (foreign, InvalidArgument, "tenant acme"),
        (SavedWeights("tenants/acme/states/../blobs/x", good.digest, 5), InvalidArgument, "object key"),
        (SavedWeights(good.key, "sha256:zz", 5), InvalidArgument, "digest"),
        (SavedWeights(good.key, good.digest, 0), InvalidArgument, "positive"),
        (SavedWeights(good.key, digest_bytes(b"x"), good.size_bytes), BlobCorrupt, "digest"),
        (SavedWeights(good.key, good.digest, good.size_bytes + 1), BlobCorrupt, "bytes"),
        (SavedWeights(good.key, good.digest, 9 * MIB), ResourceExhausted, "max_adapter_bytes"),
        (SavedWeights("tenants/acme/states/x", good.digest, 5), NotFound, "tenants/acme/states/x"),
        (SavedWeights(no_adapter.key, no_adapter.digest or "", no_adapter.size_bytes), InvalidArgument, "pickle"),
        (other_base, BaseModelMismatch, "policy's base"),
        (high_rank, ResourceExhausted, "rank 17, allowed is 16"),
    ]
    for weights, error, says in cases:
        with pytest.raises(error) as caught:
            await bench.export(weights)
        assert says in str(caught.value)
        bench.assert_sound()
    bench.limit(max_adapter_bytes=MIB // 4, max_rank=512)
    with pytest.raises(ResourceExhausted, match="rank 512 for all its modules"):
        await bench.export(huge)
    with pytest.raises(InvalidArgument, match=r"fence\.resource"):
        await bench.export(good, fence=Fence("tenants/acme/policies/other", 7))
    with pytest.raises(InvalidArgument, match=r"training_state\.run"):
        await bench.export(good, lineage=Lineage(run="tenants/evil/runs/r1"))
    nobody = PolicyName("acme", "nobody")
    with pytest.raises(NotFound, match="policies/nobody"):
        await bench.exporter.export(nobody, good, Fence(str(nobody), 7), RUN, "")
    assert bench.revisions == []
    assert (await bench.export(good)).published.revision.number == 1
    bench.assert_sound()


async def test_the_stores_refusal_of_us_is_not_the_callers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = await bench.save()

    async def refuse(*_: object, **__: object) -> None:
        raise PermissionDenied("access key 'AK' at http://10.0.0.7 may not")

    monkeypatch.setattr(bench.store, "get_file", refuse)
    with pytest.raises(Unavailable) as caught:
        await bench.export(weights)
    assert "10.0.0.7" not in str(caught.value)
