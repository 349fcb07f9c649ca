"""The form a backup is kept in: what is written is read back, and damage is told."""

from __future__ import annotations

import gzip
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_blobs.settings import ObjectStoreSettings
from mint_cli.backup_files import BackupPlace, BackupReader, write_backup
from mint_core.errors import DataLoss, InvalidArgument, MintError

_STORE = ObjectStoreSettings()


def _parts(num: int = 5) -> list[pb.BackupResponse]:
    pick = random.Random(num)
    parts = [pb.BackupResponse(header=pb.BackupHeader(format=1, catalog_revision=7))]
    for number in range(num):
        keys = [f"policies/{number}/{i}".encode() for i in range(3)]
        records = [pb.BackupRecord(key=key, value=pick.randbytes(50_000)) for key in keys]
        parts.append(pb.BackupResponse(records=pb.BackupRecords(records=records)))
    return [*parts, pb.BackupResponse(trailer=pb.BackupTrailer(num_records=3 * num, digest="sha256:00"))]


async def _stream(parts: list[pb.BackupResponse]) -> AsyncIterator[pb.BackupResponse]:
    for part in parts:
        yield part


async def _write(path: Path, parts: list[pb.BackupResponse]) -> list[int]:
    seen: list[int] = []
    async with BackupPlace.parse(str(path)).writing(_STORE) as write:
        await write_backup(_stream(parts), write, seen.append)
    return seen


async def _read(path: Path) -> tuple[list[bytes], Exception | None]:
    reader = BackupReader(BackupPlace.parse(str(path)).reading(_STORE), str(path), lambda _: None)
    return [part.SerializeToString() async for part in reader.parts()], reader.failure


async def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    parts = _parts()
    assert (await _write(tmp_path / "b", parts))[-1] == 15
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    read, failure = await _read(tmp_path / "b")
    assert failure is None
    assert read == [part.SerializeToString() for part in parts], "a restore's parts have the form of a backup's"


@pytest.mark.parametrize(
    "parts", [_parts()[:-1], [*_parts()[:3], _parts()[-1]]], ids=["no trailer", "fewer records than told"]
)
async def test_a_backup_that_is_not_whole_replaces_nothing(tmp_path: Path, parts: list[pb.BackupResponse]) -> None:
    await _write(tmp_path / "b", _parts(1))
    before = (tmp_path / "b").read_bytes()
    with pytest.raises(DataLoss, match="make it again"):
        await _write(tmp_path / "b", parts)
    assert (tmp_path / "b").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def _with_bit_flipped(packed: bytes) -> bytes:
    return packed[:-200] + bytes([packed[-200] ^ 4]) + packed[-199:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-20],
        lambda packed: packed[: len(packed) // 2],
        _with_bit_flipped,
        lambda packed: b"",
        lambda packed: b"no gzip at all",
        lambda packed: gzip.compress(gzip.decompress(packed)[:-3]),
        lambda packed: gzip.compress(b"\xff\xff\xff\xff" + packed),
        lambda packed: gzip.compress(b"\x00\x00\x00\x02\xff\xff"),
    ],
    ids=["end gone", "half", "bit flipped", "empty", "no gzip", "half a message", "absurd length", "no message"],
)
async def test_damage_ends_the_stream_and_is_told(tmp_path: Path, damage: Any) -> None:
    await _write(tmp_path / "b", _parts())
    (tmp_path / "b").write_bytes(damage((tmp_path / "b").read_bytes()))
    read, failure = await _read(tmp_path / "b")
    assert isinstance(failure, DataLoss)
    assert str(tmp_path / "b") in failure.message
    assert len(read) < 8


async def test_places() -> None:
    place = BackupPlace.parse("s3://bucket/a/b")
    assert (place.bucket, place.key, place.path) == ("bucket", "a/b", None)
    assert BackupPlace.parse("-").is_standard_stream
    for wrong in ("s3://bucket", "s3://bucket/", "s3:///key"):
        with pytest.raises(InvalidArgument, match="s3://BUCKET/KEY"):
            BackupPlace.parse(wrong)


async def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="does not exist"):
        await _write(tmp_path / "no" / "b", _parts())
    read, failure = await _read(tmp_path / "no")
    assert read == []
    assert isinstance(failure, MintError)
    assert "cannot read" in failure.message
