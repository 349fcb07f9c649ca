from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from mint_blobs.digests import digest_bytes
from mint_core.errors import BlobCorrupt, InvalidArgument, NotFound, ResourceExhausted
from mint_core.names import RevisionName
from mint_exporter.model import Lineage
from mint_exporter.reading import FolderFile
from mint_exporter.uploads import MAX_CHUNK_BYTES, Chunk
from mint_lora import pack, read_peft_folder
from support.adapters import BASE_DIGEST, delta_weights
from support.exporting import RUN, Bench, exporter_bench

FIRST, SECOND = (RevisionName("acme", "support", number) for number in (1, 2))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with exporter_bench(tmp_path) as made:
        await made.export(await made.save(seed=0))
        await made.export(await made.save(seed=1), lineage=Lineage(run=RUN.run, step=21))
        yield made


async def folder_of(bench: Bench, name: RevisionName, layout: str = "") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    current: FolderFile | None = None
    async for part in bench.reader.peft_folder(name, layout):
        if isinstance(part, Chunk):
            assert current is not None
            assert part.offset == len(files[current.name])
            assert len(part.data) <= MAX_CHUNK_BYTES
            files[current.name] += part.data
        else:
            current, files[part.name] = part, b""
            expected = part
        if len(files[expected.name]) == expected.size_bytes:
            assert digest_bytes(files[expected.name]) == expected.digest
    return files


@pytest.mark.parametrize("layout", ["", "peft-1"])
async def test_a_revision_as_a_peft_folder_packs_to_the_same_adapter(bench: Bench, tmp_path: Path, layout: str) -> None:
    files = await folder_of(bench, FIRST, layout)
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    (folder := tmp_path / "peft").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    weights, config = read_peft_folder(folder, base_model="tiny", base_digest=BASE_DIGEST)
    pack(weights, tmp_path / "again", config)
    record = bench.catalog.blobs[bench.revisions[0].publication.blob]
    await bench.store.get_file(record.object_key, tmp_path / "blob", digest=record.name.digest)
    ours, theirs = delta_weights(tmp_path / "again"), delta_weights(tmp_path / "blob")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[module], theirs[module]) for module in theirs)
    bench.assert_sound()


async def test_two_revisions_side_by_side(bench: Bench) -> None:
    different, same = await bench.reader.diff(FIRST, SECOND), await bench.reader.diff(FIRST, FIRST)
    assert (same.is_same, different.is_same) == (True, False)
    assert same.config == different.config == ()
    assert len(different.modules) == 14
    assert different.norm_difference > 0
    bench.assert_sound()


async def test_what_cannot_be_read(bench: Bench) -> None:
    nobody, other = RevisionName("acme", "support", 9), RevisionName("umbrella", "support", 1)
    with pytest.raises(NotFound):
        await folder_of(bench, nobody)
    with pytest.raises(NotFound):
        await bench.reader.diff(FIRST, nobody)
    with pytest.raises(InvalidArgument, match="two tenants"):
        await bench.reader.diff(FIRST, other)
    for layout in ("packed-1", "packed-9"):  # ours, which PEFT cannot load, and nobody's
        with pytest.raises(InvalidArgument, match="layout"):
            await folder_of(bench, FIRST, layout)
    bench.scratch._max_bytes = 1 << 20
    with pytest.raises(ResourceExhausted, match="max_scratch_bytes"):
        await folder_of(bench, FIRST)
    bench.scratch._max_bytes = 64 << 20
    record = bench.catalog.blobs[bench.revisions[0].publication.blob]
    damaged = bytearray(await bench.store.get_bytes(record.object_key, max_bytes=1 << 24))
    damaged[-1] ^= 1
    await bench.store.put_bytes(record.object_key, bytes(damaged), if_absent=False)
    with pytest.raises(BlobCorrupt):
        await folder_of(bench, FIRST)
    with pytest.raises(BlobCorrupt):
        await bench.reader.diff(SECOND, FIRST)
    await bench.store.delete(record.object_key)
    with pytest.raises(BlobCorrupt, match="are gone"):
        await folder_of(bench, FIRST)
    assert await folder_of(bench, SECOND)
    assert bench.scratch.used_bytes == 0


async def test_a_reader_that_goes_away_leaves_nothing(bench: Bench) -> None:
    parts = bench.reader.peft_folder(FIRST, "")
    assert isinstance(await anext(parts), FolderFile)
    assert bench.scratch.used_bytes > 0
    await parts.aclose()
    bench.assert_sound()
