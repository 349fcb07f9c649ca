from __future__ import annotations

import asyncio
import io
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mint_blobs.digests import digest_bytes
from mint_core import failpoints
from mint_core.errors import (
    BlobCorrupt,
    BlobMissing,
    DigestMismatch,
    InvalidArgument,
    LeaseHeld,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import BlobName
from mint_core.signing import Signer, TrustedKeys
from mint_exporter.model import Exported, ImportSource, Lineage
from mint_lora import pack, write_peft_folder
from support.adapters import BASE_DIGEST, config_for, dense_shapes, write_adapter
from support.exporting import MIB, POLICY, Bench, exporter_bench

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TOLD = Lineage(data_digest="sha256:" + "d" * 64, recipe="their own", code_version="theirs 1")


@dataclass
class Peft:
    """A PEFT folder and the revision it must become."""

    files: dict[str, bytes]
    digest: str

    @property
    def text(self) -> str:
        return self.files[CONFIG].decode()

    def archive(self, kind: str, prefix: str = "adapter/") -> bytes:
        buffer = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
                for name, data in self.files.items():
                    packed.writestr(prefix + name, data)
            return buffer.getvalue()
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as packed_tar:
            for name, data in self.files.items():
                info = tarfile.TarInfo(prefix + name)
                info.size = len(data)
                packed_tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Peft:
    folder = tmp_path_factory.mktemp("peft")
    shapes = dense_shapes()
    write_adapter(folder / "source", shapes, config_for(shapes, use_rslora=True))
    digest = pack(folder / "source", folder / "blob").digest
    write_peft_folder(folder / "blob", folder / "peft")
    return Peft({each.name: each.read_bytes() for each in (folder / "peft").iterdir()}, digest)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with exporter_bench(tmp_path) as made:
        del made.catalog.fences[POLICY]
        yield made


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    for point in failpoints.declared():
        point.disarm()


def run(bench: Bench, source: ImportSource, lineage: Lineage = TOLD) -> asyncio.Future[Exported]:
    return asyncio.ensure_future(bench.importer.import_revision(POLICY, source, lineage, ""))


async def test_uploaded_weights_become_a_revision(bench: Bench, peft: Peft) -> None:
    data = peft.files[WEIGHTS]
    name = BlobName("acme", digest_bytes(data))
    source = ImportSource(name.digest, peft.text)
    with pytest.raises(BlobMissing, match="upload it first"):
        await run(bench, source)
    record = await bench.catalog.stage_blob(name, len(data))
    with pytest.raises(BlobMissing, match="upload it first"):
        await run(bench, source)
    await bench.catalog.verify_blob(name, record.object_key)
    with pytest.raises(BlobCorrupt, match="are gone"):
        await run(bench, source)
    await bench.store.put_bytes(record.object_key, data)
    bench.catalog.fences[POLICY] = 3
    with pytest.raises(LeaseHeld):
        await run(bench, source)
    del bench.catalog.fences[POLICY]
    exported = await run(bench, source)
    publication = exported.published.revision.publication
    assert (publication.blob.digest, publication.lineage, publication.signature) == (peft.digest, TOLD, None)
    assert min(exported.timings.fetch_ms, exported.timings.pack_ms) > 0
    with pytest.raises(InvalidArgument, match="peft_type"):
        await run(bench, ImportSource(name.digest, "{}"))
    bench.assert_sound()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
async def test_an_archive_becomes_the_same_revision(bench: Bench, peft: Peft, kind: str) -> None:
    data = peft.archive(kind)
    name = await bench.upload(data)
    await bench.store.put_bytes("tenants/acme/imports/new/adapter", data)
    for source in (
        ImportSource(archive_digest=name.digest),
        ImportSource(object_key="tenants/acme/imports/new/adapter"),
    ):
        assert (await run(bench, source)).published.revision.publication.blob.digest == peft.digest
    bench.assert_sound()


async def test_an_object_with_its_configuration_beside_it(bench: Bench, peft: Peft) -> None:
    key = f"tenants/acme/imports/a/{WEIGHTS}"
    await bench.store.put_bytes(key, peft.files[WEIGHTS])
    with pytest.raises(InvalidArgument, match=r"imports/a/adapter_config\.json"):
        await run(bench, ImportSource(object_key=key))
    await bench.store.put_bytes(f"tenants/acme/imports/a/{CONFIG}", peft.files[CONFIG])
    for text in ("", peft.text):
        exported = await run(bench, ImportSource(object_key=key, adapter_config_json=text))
        assert exported.published.revision.publication.blob.digest == peft.digest
    bench.assert_sound()


async def test_an_object_whose_digest_nobody_knows(bench: Bench, peft: Peft, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "tenants/acme/imports/foreign.zip"
    data = peft.archive("zip")
    await bench.store.put_bytes(key, data)
    head = bench.store.head

    async def head_of_another_program(asked: str) -> object:
        info = await head(asked)
        assert info is not None
        return type(info)(info.key, info.size_bytes, None, info.modified_at)

    monkeypatch.setattr(bench.store, "head", head_of_another_program)
    with pytest.raises(InvalidArgument, match="no digest recorded") as caught:
        await run(bench, ImportSource(object_key=key))
    assert caught.value.field == "object.blob.digest"
    with pytest.raises(DigestMismatch, match="does not have digest"):
        await run(bench, ImportSource(object_key=key, object_digest=digest_bytes(b"other")))
    exported = await run(bench, ImportSource(object_key=key, object_digest=digest_bytes(data)))
    assert exported.published.revision.publication.blob.digest == peft.digest
    bench.assert_sound()


def _pickled(peft: Peft) -> bytes:
    return Peft({CONFIG: peft.files[CONFIG], "adapter_model.bin": b"\x80\x04."}, "").archive("zip")


def _cut_weights(peft: Peft) -> bytes:
    return Peft(peft.files | {WEIGHTS: peft.files[WEIGHTS][:-5]}, "").archive("tar.gz")


def _pickle_by_another_name(peft: Peft) -> bytes:
    return Peft(peft.files | {WEIGHTS: b"\x80\x04]q\x00." + bytes(60)}, "").archive("tar")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_pickled, InvalidArgument, "pickle"),
        (_cut_weights, InvalidArgument, "cut off"),
        (_pickle_by_another_name, InvalidArgument, "pickle"),
        (lambda peft: peft.archive("zip", "../"), InvalidArgument, "leads out"),
        (lambda peft: Peft(peft.files | {WEIGHTS: bytes(9 * MIB)}, "").archive("tar.gz"), ResourceExhausted, "allowed"),
        (lambda peft: bytes(17 * MIB), ResourceExhausted, "max_blob_bytes"),
        (lambda peft: peft.files[WEIGHTS], InvalidArgument, "expected tar, tar.gz or zip"),
    ],
    ids=["pickled", "cut", "pickle by another name", "leads out", "bomb", "huge", "no archive"],
)
async def test_a_bad_archive_leaves_nothing(
    bench: Bench, peft: Peft, make: Callable[[Peft], bytes], error: type[MintError], says: str
) -> None:
    name = await bench.upload(make(peft))
    with pytest.raises(error, match=says):
        await run(bench, ImportSource(archive_digest=name.digest))
    assert bench.revisions == []
    assert list(bench.catalog.blobs) == [name]
    bench.assert_sound()


@pytest.mark.parametrize(
    ("source", "field"),
    [
        (ImportSource(), "weights"),
        (ImportSource("sha256:" + "0" * 64, archive_digest="sha256:" + "0" * 64), "weights"),
        (ImportSource(archive_digest="sha256:" + "0" * 64, adapter_config_json="{}"), "adapter_config_json"),
        (ImportSource("md5:1", "{}"), "weights.digest"),
        (ImportSource(archive_digest="md5:1"), "archive.digest"),
        (ImportSource(object_key="tenants/evil/imports/x"), "object.key"),
        (ImportSource(object_key="tenants/acme/states/x"), "object.key"),
        (ImportSource(object_key="tenants/acme/imports/../states/x"), "object.key"),
        (ImportSource(object_key="tenants/acme/imports/x", object_digest="x"), "object.blob.digest"),
    ],
    ids=str,
)
async def test_a_source_that_makes_no_sense(bench: Bench, source: ImportSource, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await run(bench, source)
    assert caught.value.field == field


async def test_what_does_not_fit_the_policy(bench: Bench, peft: Peft) -> None:
    name = await bench.upload(peft.files[WEIGHTS])
    for lineage in (Lineage(run="tenants/acme/runs/r1"), Lineage(step=3)):
        with pytest.raises(InvalidArgument, match=r"lineage\.run"):
            await run(bench, ImportSource(name.digest, peft.text), lineage)
    with pytest.raises(NotFound, match="imports/none"):
        await run(bench, ImportSource(object_key="tenants/acme/imports/none"))
    bench.catalog.architectures["tiny"] = "LlamaForCausalLM"
    assert (await run(bench, ImportSource(name.digest, peft.text))).published.revision.number == 1
    bench.limit(max_rank=3)
    with pytest.raises(ResourceExhausted, match="max_rank"):
        await run(bench, ImportSource(name.digest, peft.text))
    bench.limit(max_adapter_bytes=name.digest.count("sha"))
    with pytest.raises(ResourceExhausted, match="max_adapter_bytes"):
        await run(bench, ImportSource(name.digest, peft.text))
    assert len(bench.revisions) == 1
    bench.assert_sound()


POINTS = sorted(
    each.name for each in failpoints.declared() if each.name.startswith("exporter.") and each.name != "exporter.fetched"
)


@pytest.mark.parametrize("point", POINTS)
async def test_broken_off_anywhere_and_repeated(bench: Bench, peft: Peft, point: str) -> None:
    name = await bench.upload(peft.archive("tar.gz"))
    armed = next(each for each in failpoints.declared() if each.name == point)
    armed.arm("error")
    with pytest.raises(Unavailable, match=point):
        await run(bench, ImportSource(archive_digest=name.digest))
    bench.assert_sound()
    armed.disarm()
    assert (await run(bench, ImportSource(archive_digest=name.digest))).published.revision.publication
    assert {each.publication.blob.digest for each in bench.revisions} == {peft.digest}
    bench.assert_sound()


async def test_what_is_published_is_signed(tmp_path: Path, peft: Peft) -> None:
    trusted = TrustedKeys({"acme": [KEY.public_key()]})
    async with exporter_bench(tmp_path, Signer(KEY)) as bench:
        exported = [await bench.export(await bench.save())]
        del bench.catalog.fences[POLICY]
        name = await bench.upload(peft.archive("zip"))
        exported.append(await run(bench, ImportSource(archive_digest=name.digest)))
        for each in exported:
            publication = each.published.revision.publication
            trusted.check("acme", publication.blob.digest, BASE_DIGEST, publication.signature)
