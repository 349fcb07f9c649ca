from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mint_blobs.digests import digest_bytes
from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import (
    Aborted,
    BlobCorrupt,
    DigestMismatch,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import BlobName
from mint_exporter.scratch import Scratch
from mint_exporter.uploads import MAX_CHUNK_BYTES, Chunk, Uploads
from support.exporting import MemoryCatalog

MIB = 1 << 20


async def _stream(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


def _chunks(data: bytes, start: int = 0, size: int = MIB) -> list[Chunk]:
    return [Chunk(at, data[at : at + size]) for at in range(start, len(data), size)]


@dataclass
class Bench:
    catalog: MemoryCatalog
    store: MemoryObjectStore
    scratch: Scratch
    uploads: Uploads

    async def send(self, name: BlobName, size_bytes: int, chunks: Sequence[Chunk]) -> int:
        return await self.uploads.receive(name, size_bytes, _stream(chunks))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    catalog, store = MemoryCatalog(), MemoryObjectStore()
    async with Scratch(tmp_path / "scratch", 8 * MIB) as scratch:
        uploads = Uploads(catalog, store, scratch, max_bytes=6 * MIB, idle_timeout_s=0.05)
        yield Bench(catalog, store, scratch, uploads)
        uploads.close()
        assert scratch.used_bytes == 0


@pytest.fixture
def data() -> bytes:
    return secrets.token_bytes(3 * MIB + 17)


@pytest.fixture
def name(data: bytes) -> BlobName:
    return BlobName("acme", digest_bytes(data))


async def test_upload_then_download(bench: Bench, name: BlobName, data: bytes) -> None:
    assert await bench.uploads.progress(name) == (0, False)
    assert await bench.send(name, len(data), _chunks(data)) == len(data)
    assert await bench.uploads.progress(name) == (len(data), True)
    assert bench.scratch.used_bytes == 0
    chunks = [chunk async for chunk in bench.uploads.download(name)]
    assert b"".join(chunk.data for chunk in chunks) == data
    assert [chunk.offset for chunk in chunks] == [0, MIB, 2 * MIB, 3 * MIB]
    assert bench.scratch.used_bytes == 0
    # A stored blob is not taken again, whatever is sent.
    assert await bench.send(name, len(data), [Chunk(5, b"x")]) == len(data)


async def test_broken_upload_goes_on_where_it_stood(bench: Bench, name: BlobName, data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=f"ended after {2 * MIB}"):
        await bench.send(name, len(data), _chunks(data)[:2])
    assert await bench.uploads.progress(name) == (2 * MIB, False)
    for wrong in (0, MIB, 2 * MIB - 1, 2 * MIB + 1):
        with pytest.raises(InvalidArgument, match=f"expected {2 * MIB}"):
            await bench.send(name, len(data), [Chunk(wrong, b"x")])
    assert await bench.send(name, len(data), _chunks(data, 2 * MIB, 1000)) == len(data)
    assert bench.store._objects[bench.catalog.blobs[name].object_key].data == data


async def test_wrong_bytes_are_not_kept(bench: Bench, name: BlobName, data: bytes) -> None:
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(DigestMismatch) as caught:
        await bench.send(name, len(data), _chunks(damaged))
    assert caught.value.metadata == {"expected": name.digest, "actual": digest_bytes(damaged)}
    assert await bench.uploads.progress(name) == (0, False)
    assert bench.scratch.used_bytes == 0
    assert bench.catalog.blobs == {}
    assert await bench.send(name, len(data), _chunks(data)) == len(data)


async def test_limits(bench: Bench, name: BlobName, data: bytes) -> None:
    for size_bytes in (0, -1):
        with pytest.raises(InvalidArgument, match="must be positive"):
            await bench.send(name, size_bytes, [])
    with pytest.raises(ResourceExhausted, match="max_blob_bytes"):
        await bench.send(name, 6 * MIB + 1, [])
    with pytest.raises(InvalidArgument, match=f"allowed are {MAX_CHUNK_BYTES}"):
        await bench.send(name, len(data), [Chunk(0, bytes(MAX_CHUNK_BYTES + 1))])
    with pytest.raises(InvalidArgument, match="announced were 10"):
        await bench.send(name, 10, [Chunk(0, bytes(11))])
    with pytest.raises(InvalidArgument, match="ended after 0"):
        await bench.send(BlobName("acme", digest_bytes(b"a")), 5 * MIB, [])
    with pytest.raises(ResourceExhausted, match="other uploads"):
        await bench.send(BlobName("acme", digest_bytes(b"b")), 5 * MIB, [])


async def test_two_streams_of_one_blob(bench: Bench, name: BlobName, data: bytes) -> None:
    chunks = _chunks(data)
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def stalled() -> AsyncIterator[Chunk]:
        yield chunks[0]
        arrived.set()
        await gate.wait()
        yield chunks[1]

    old = asyncio.create_task(bench.uploads.receive(name, len(data), stalled()))
    await arrived.wait()
    new = asyncio.create_task(bench.send(name, len(data), chunks[1:]))
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(Aborted):
        await old
    assert await new == len(data)
    assert bench.store._objects[bench.catalog.blobs[name].object_key].data == data


async def test_idle_uploads_give_their_room_back(bench: Bench, name: BlobName, data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        await bench.send(name, len(data), _chunks(data)[:1])
    assert bench.uploads.drop_idle() == 0
    await asyncio.sleep(0.06)
    assert bench.uploads.drop_idle() == 1
    assert bench.scratch.used_bytes == 0
    assert await bench.uploads.progress(name) == (0, False)


async def test_store_away_at_the_end(
    bench: Bench, name: BlobName, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise Unavailable("the object store is away")

    monkeypatch.setattr(bench.store, "put_file", away)
    with pytest.raises(Unavailable):
        await bench.send(name, len(data), _chunks(data))
    assert await bench.uploads.progress(name) == (len(data), False)
    monkeypatch.undo()
    assert await bench.send(name, len(data), []) == len(data)
    assert bench.scratch.used_bytes == 0


async def test_downloads_of_what_is_not_there(bench: Bench, name: BlobName, data: bytes) -> None:
    async def read() -> list[Chunk]:
        return [chunk async for chunk in bench.uploads.download(name)]

    with pytest.raises(NotFound):
        await read()
    record = await bench.catalog.stage_blob(name, len(data))
    with pytest.raises(NotFound):
        await read()
    await bench.catalog.verify_blob(name, record.object_key)
    with pytest.raises(BlobCorrupt, match="are gone"):
        await read()
    await bench.store.put_bytes(record.object_key, data[:-1] + b"?")
    with pytest.raises(BlobCorrupt):
        await read()
    assert bench.scratch.used_bytes == 0
    assert await bench.uploads.progress(BlobName("other", name.digest)) == (0, False)


async def test_full_disk_keeps_what_has_arrived(
    bench: Bench, name: BlobName, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument):
        await bench.send(name, len(data), _chunks(data)[:1])
    upload = bench.uploads._uploads[name]

    class Full:
        def __init__(self) -> None:
            self.inner = upload._file

        def write(self, view: memoryview) -> int:
            self.inner.write(view[:1000])
            raise OSError(28, "No space left on device")

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.inner, attribute)

    monkeypatch.setattr(upload, "_file", Full())
    with pytest.raises(ResourceExhausted, match="No space left"):
        await bench.send(name, len(data), _chunks(data)[1:])
    monkeypatch.undo()
    assert await bench.uploads.progress(name) == (MIB, False)
    assert await bench.send(name, len(data), _chunks(data)[1:]) == len(data)
