from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_api.runtime.v1 import exporter_service_pb2 as pb
from mint_api.v1 import blob_service_pb2, common_pb2
from mint_client._peft_folder import write_peft_folder
from mint_core.errors import AlreadyExists, BlobCorrupt, InvalidArgument, MintError, Unavailable
from mint_core.files import atomic_folder

CONFIG, WEIGHTS = ("adapter_config.json", b"{}"), ("adapter_model.safetensors", bytes(range(256)) * 20)


def announced(name: str, data: bytes) -> pb.ExportPeftResponse:
    blob = common_pb2.BlobRef(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size_bytes=len(data))
    return pb.ExportPeftResponse(file=pb.PeftFile(name=name, blob=blob))


def chunks(data: bytes, step: int = 1000) -> list[pb.ExportPeftResponse]:
    return [
        pb.ExportPeftResponse(chunk=blob_service_pb2.BlobChunk(offset=at, data=data[at : at + step]))
        for at in range(0, len(data), step)
    ]


async def sent(
    *responses: pb.ExportPeftResponse, error: MintError | None = None
) -> AsyncIterator[pb.ExportPeftResponse]:
    for each in responses:
        yield each
    if error is not None:
        raise error


GOOD = [announced(*CONFIG), *chunks(CONFIG[1]), announced(*WEIGHTS), *chunks(WEIGHTS[1])]


async def test_a_folder_arrives_whole(tmp_path: Path) -> None:
    await write_peft_folder(sent(*GOOD), tmp_path / "adapter")
    assert {each.name: each.read_bytes() for each in (tmp_path / "adapter").iterdir()} == dict([CONFIG, WEIGHTS])
    with pytest.raises(AlreadyExists, match="adapter"):
        await write_peft_folder(sent(*GOOD), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("responses", "says"),
    [
        (GOOD[:-1], "arrived with digest"),
        (GOOD[:2], "before the folder was whole"),
        ([], "before the folder was whole"),
        ([announced("../../evil", b""), *GOOD], "announced a file"),
        ([*GOOD[:-1], *chunks(bytes(880))], "arrived with digest"),
    ],
    ids=["cut", "one file", "nothing", "a name that leads out", "other bytes"],
)
async def test_what_did_not_arrive_as_announced_is_not_kept(
    tmp_path: Path, responses: list[pb.ExportPeftResponse], says: str
) -> None:
    with pytest.raises(BlobCorrupt, match=says):
        await write_peft_folder(sent(*responses), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


async def test_a_broken_stream_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await write_peft_folder(sent(*GOOD[:4], error=Unavailable("gone")), tmp_path / "adapter")
    with pytest.raises(InvalidArgument, match="cannot write"):
        await write_peft_folder(sent(*GOOD), tmp_path / "no" / "adapter")
    assert list(tmp_path.iterdir()) == []


def half(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        half(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "file").read_text() == "whole"
    with pytest.raises(FileExistsError):
        half(tmp_path / "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
