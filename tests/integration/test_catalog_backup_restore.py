"""Backup and restore as an operator does them: the CLI, a real etcd and a real object store."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import maintenance_service_pb2
from mint_blobs.s3 import S3ObjectStore
from mint_blobs.streams import read_stream, writing_stream
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import prefix_end
from mint_cli.backup_files import BackupPlace, BackupReader
from mint_client.backups import BackupClient
from mint_core import errors
from support.catalog_rig import Rig, digest_of, running_catalog
from support.commands import run_mint
from support.etcd import EtcdServer, running_etcd
from support.weed import WeedServer, running_weed

_FLEETING = ("duties/", "engineHolders/", "engines/", "holds/", "leases/", "tick")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


def _aws(weed: WeedServer) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": weed.endpoint_url,
        "AWS_ACCESS_KEY_ID": weed.access_key_id,
        "AWS_SECRET_ACCESS_KEY": weed.secret_access_key,
    }


async def _records(etcd: EtcdServer, prefix: str) -> dict[str, bytes]:
    async with EtcdStore(etcd.settings()) as store:
        start = prefix.encode()
        found = (await store.scan(start, prefix_end(start), limit=100_000)).values
    records = {kv.key.decode().removeprefix(prefix): kv.value for kv in found}
    return {key: value for key, value in records.items() if not key.startswith(_FLEETING)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


async def _fill(rig: Rig) -> str:
    policy = await rig.policy("acme")
    for text in ("one", "two", "three"):
        await rig.revision(policy, text)
    await rig.promote(policy, 2)
    await rig.policy("beta", "other")
    await rig.run(policy, "r1")
    claimed = await rig.claim("worker-before")
    assert claimed.run.name == "tenants/acme/runs/r1"
    return policy


async def test_a_catalog_is_backed_up_and_restored_elsewhere(etcd: EtcdServer, weed: WeedServer, folder: Path) -> None:
    async with S3ObjectStore(weed.settings()) as objects:
        await objects.ensure_bucket()
        async with running_catalog(etcd, object_store=weed.settings()) as rig:
            policy = await _fill(rig)
            resolution = await rig.resolve(policy)
            await objects.put_bytes(resolution.object_key, b"two")  # of the four blobs, the only one that is stored
            runtime = ("--catalog-runtime", rig.runtime_address)
            code, output = await run_mint("catalog", "backup", str(folder / "acme.backup"), "--json", *runtime)
            assert code == 0, output
            before = await _records(etcd, "/mint/v1/")
            code, output = await run_mint(
                "catalog", "backup", f"s3://{weed.settings().bucket}/b/1", *runtime, **_aws(weed)
            )
            assert code == 0, output
            assert f"{len(before)} records" in output
            code, output = await run_mint("catalog", "restore", str(folder / "acme.backup"), *runtime)
            assert code == 1
            assert "WRONG_STATE" in output
            assert "not empty" in output
    assert (folder / "acme.backup").stat().st_mode & 0o077 == 0
    source = f"s3://{weed.settings().bucket}/b/1"
    settings = etcd.settings(prefix="/second/")
    # The reaper sleeps: what was restored is to be compared before the run is taken back.
    async with running_catalog(etcd, etcd=settings, object_store=weed.settings(), reap_interval_s=3600.0) as rig:
        code, output = await run_mint(
            "catalog", "restore", source, "--json", "--catalog-runtime", rig.runtime_address, **_aws(weed)
        )
        assert code == 0, output
        report = json.loads(output)
        after = await _records(etcd, "/second/")
        assert report["num_records"] == len(before)
        missing = {f"tenants/acme/blobs/{digest_of(text)}" for text in ("one", "three", "{}")}
        assert set(report["missing_blobs"]) == missing
        assert (report["num_missing_blobs"], report["num_blobs_checked"]) == (3, 4)
        changed = {key for key in before if before[key] != after.get(key)}
        assert changed == {
            name.removeprefix("tenants/acme/").replace("blobs/sha256:", "blobs/acme/") for name in missing
        }
        assert set(before) == set(after)
        again = await rig.resolve(policy)
        again.catalog_revision = resolution.catalog_revision  # of another etcd, as far as it is concerned
        assert again == resolution
        published = await rig.revision(policy, "four")
        assert published.revision.number == 4, "numbers go on"
    async with running_catalog(etcd, etcd=settings) as rig:  # its reaper finds the claim without its lease
        claim = await rig.claim("worker-after", wait_s=10)
        assert (claim.run.name, claim.run.num_attempts) == ("tenants/acme/runs/r1", 2)


@pytest.fixture
async def empty(etcd: EtcdServer) -> AsyncIterator[Rig]:
    async with running_catalog(etcd, etcd=etcd.settings(prefix="/empty/")) as rig:
        yield rig


def _truncated(packed: bytes) -> bytes:
    return packed[: len(packed) * 2 // 3]


def _without_trailer(packed: bytes) -> bytes:
    plain = gzip.decompress(packed)
    at = 0
    while at + 4 + int.from_bytes(plain[at : at + 4]) < len(plain):
        at += 4 + int.from_bytes(plain[at : at + 4])
    return gzip.compress(plain[:at])


def _flipped(packed: bytes) -> bytes:
    """A bit of a stored value, with a checksum of gzip's that is right."""
    plain = bytearray(gzip.decompress(packed))
    plain[plain.index(b"worker-before") + 3] ^= 1
    return gzip.compress(bytes(plain))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_truncated, errors.DataLoss),
        (_without_trailer, errors.DataLoss),
        (_flipped, errors.DataLoss),
        (lambda packed: b"PK\3\4" + packed, errors.DataLoss),
        (lambda packed: gzip.compress(b"\0\0\0\2\x1a\0"), errors.InvalidArgument),
    ],
    ids=["truncated", "no trailer", "a bit flipped", "no gzip", "no header"],
)
async def test_a_damaged_backup_is_refused_and_taken_back(
    etcd: EtcdServer, folder: Path, empty: Rig, tmp_path: Path, damage: Any, error: type[errors.MintError]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(damage((folder / "acme.backup").read_bytes()))
    with pytest.raises(error):
        await _restore(damaged, empty)
    await asyncio.sleep(0.2)  # what is on its way to etcd when a caller goes away comes after the deletes
    async with asyncio.timeout(10):
        while True:  # a client that finds the damage itself does not wait for the catalog
            if await _records(etcd, "/empty/") == {}:
                break
            await asyncio.sleep(0.05)


async def _restore(path: Path, rig: Rig) -> maintenance_service_pb2.RestoreResponse:
    place = BackupPlace.parse(str(path))
    reader = BackupReader(place.reading(None), str(path), lambda _: None)  # type: ignore[arg-type]
    async with BackupClient(rig.runtime_address) as client:
        try:
            return await client.restore(reader.parts())
        except errors.MintError:
            if reader.failure is not None:
                raise reader.failure from None
            raise


async def test_a_restore_that_was_cut_off_leaves_nothing_and_can_be_made_again(
    etcd: EtcdServer, folder: Path, empty: Rig
) -> None:
    place = BackupPlace.parse(str(folder / "acme.backup"))
    reader = BackupReader(place.reading(None), "it", lambda _: None)  # type: ignore[arg-type]

    async def stuck() -> AsyncIterator[maintenance_service_pb2.RestoreRequest]:
        async for part in reader.parts():
            if part.HasField("trailer"):
                await asyncio.Event().wait()
            yield part

    async with BackupClient(empty.runtime_address) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.restore(stuck(), timeout_s=1.0)
    async with asyncio.timeout(10):
        while True:  # until what was cut off is taken back and its duties are given back
            with contextlib.suppress(errors.LeaseHeld, errors.WrongState):
                restored = await _restore(folder / "acme.backup", empty)
                break
            await asyncio.sleep(0.05)
    assert restored.num_records > 10
    assert len(await _records(etcd, "/empty/")) >= restored.num_records


async def test_a_stream_goes_up_in_parts_and_comes_back_or_leaves_nothing(weed: WeedServer) -> None:
    settings = weed.settings(part_size_bytes=5 << 20, range_size_bytes=1 << 20)
    pieces = [os.urandom(700_000) for _ in range(16)]
    async with S3ObjectStore(settings) as objects:
        await objects.ensure_bucket()
        async with writing_stream(settings, "streams/whole") as stream:
            for piece in pieces:
                await stream.write(piece)
        assert b"".join([data async for data in read_stream(settings, "streams/whole")]) == b"".join(pieces)

        async def break_off() -> None:
            async with writing_stream(settings, "streams/broken") as stream:
                for piece in pieces:
                    await stream.write(piece)
                raise KeyError

        with pytest.raises(KeyError):
            await break_off()
        assert await objects.head("streams/broken") is None
        assert [upload async for upload in objects.list_part_uploads("streams/")] == []
        with pytest.raises(errors.NotFound):
            await anext(read_stream(settings, "streams/broken"))
