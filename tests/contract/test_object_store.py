"""What every object store keeps, asked of the real S3 client over a real server and of its in-memory twin."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mint_blobs.digests import digest_bytes, digest_file
from mint_blobs.memory import MemoryObjectStore
from mint_blobs.objects import ObjectStore, PartUpload
from mint_blobs.s3 import S3ObjectStore
from mint_core.errors import (
    AlreadyExists,
    BlobCorrupt,
    DigestMismatch,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from support.weed import WeedServer, running_weed

MIB = 1 << 20


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest.fixture(params=["memory", "s3"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[ObjectStore]:
    if request.param == "memory":
        async with MemoryObjectStore() as memory:
            yield memory
    else:
        weed: WeedServer = request.getfixturevalue("weed")
        # A small range makes ordinary test files go through the parallel ways.
        settings = weed.settings(part_size_bytes=5 * MIB, range_size_bytes=MIB, max_concurrency=4)
        async with S3ObjectStore(settings) as s3:
            await s3.ensure_bucket()
            yield s3


@pytest.fixture
def key() -> str:
    return f"tenants/acme/blobs/{secrets.token_hex(8)}/s1"


async def test_put_bytes_then_head_and_get(store: ObjectStore, key: str) -> None:
    put = await store.put_bytes(key, b"weights")
    assert (put.key, put.size_bytes, put.digest) == (key, 7, digest_bytes(b"weights"))
    head = await store.head(key)
    assert head is not None
    assert (head.size_bytes, head.digest) == (7, put.digest)
    assert abs((head.modified_at - put.modified_at).total_seconds()) < 5
    assert await store.get_bytes(key, max_bytes=7) == b"weights"
    assert await store.get_bytes(key, digest=put.digest, max_bytes=100) == b"weights"


async def test_same_content_again_succeeds_other_content_does_not(store: ObjectStore, key: str) -> None:
    await store.put_bytes(key, b"one")
    assert (await store.put_bytes(key, b"one")).size_bytes == 3
    with pytest.raises(AlreadyExists, match="other content"):
        await store.put_bytes(key, b"two")
    assert await store.get_bytes(key, max_bytes=10) == b"one"


async def test_overwrite_only_on_request(store: ObjectStore, key: str) -> None:
    await store.put_bytes(key, b"one")
    await store.put_bytes(key, b"two", if_absent=False)
    assert await store.get_bytes(key, max_bytes=10) == b"two"


async def test_of_racing_writers_exactly_one_wins(store: ObjectStore, key: str) -> None:
    outcomes = await asyncio.gather(
        *(store.put_bytes(key, f"writer {n}".encode()) for n in range(6)), return_exceptions=True
    )
    lost = [each for each in outcomes if isinstance(each, BaseException)]
    assert [type(each) for each in lost] == [AlreadyExists] * 5
    winner = next(n for n, each in enumerate(outcomes) if not isinstance(each, BaseException))
    assert await store.get_bytes(key, max_bytes=100) == f"writer {winner}".encode()


@pytest.mark.parametrize("size_bytes", [0, 1, MIB - 1, MIB, MIB + 1, 12 * MIB + 17])
async def test_files_of_all_sizes_come_back_equal(
    store: ObjectStore, key: str, tmp_path: Path, size_bytes: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(secrets.token_bytes(size_bytes))
    digest = await digest_file(source)
    put = await store.put_file(key, source, digest=digest)
    assert (put.size_bytes, put.digest) == (size_bytes, digest)
    await store.put_file(key, source, digest=digest)
    await store.get_file(key, target, digest=digest)
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    await store.get_file(key, target, digest=digest, size_bytes=size_bytes)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("size_bytes", [100, 11 * MIB])
async def test_file_with_another_digest_is_not_stored(
    store: ObjectStore, key: str, tmp_path: Path, size_bytes: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(secrets.token_bytes(size_bytes))
    with pytest.raises(DigestMismatch, match="nothing was stored"):
        await store.put_file(key, source, digest=digest_bytes(b"something else"))
    assert await store.head(key) is None


@pytest.mark.parametrize("size_bytes", [100, 11 * MIB])
async def test_put_file_does_not_replace_other_content(
    store: ObjectStore, key: str, tmp_path: Path, size_bytes: int
) -> None:
    await store.put_bytes(key, b"first")
    source = tmp_path / "source"
    source.write_bytes(bytes(size_bytes))
    digest = await digest_file(source)
    with pytest.raises(AlreadyExists):
        await store.put_file(key, source, digest=digest)
    assert await store.get_bytes(key, max_bytes=10) == b"first"
    await store.put_file(key, source, digest=digest, if_absent=False)
    head = await store.head(key)
    assert head is not None
    assert head.digest == digest


@pytest.mark.parametrize("size_bytes", [100, 3 * MIB])
async def test_wrong_content_leaves_nothing_on_disk(
    store: ObjectStore, key: str, tmp_path: Path, size_bytes: int
) -> None:
    await store.put_bytes(key, bytes(size_bytes))
    with pytest.raises(BlobCorrupt, match=key):
        await store.get_file(key, tmp_path / "target", digest=digest_bytes(b"x"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BlobCorrupt):
        await store.get_bytes(key, digest=digest_bytes(b"x"), max_bytes=size_bytes)


@pytest.mark.parametrize("size_bytes", [0, 100, 3 * MIB])
async def test_verify_reads_what_is_stored(store: ObjectStore, key: str, size_bytes: int) -> None:
    data = secrets.token_bytes(size_bytes)
    with pytest.raises(NotFound):
        await store.verify(key, digest=digest_bytes(data), size_bytes=size_bytes)
    await store.put_bytes(key, data)
    await store.verify(key, digest=digest_bytes(data), size_bytes=size_bytes)
    with pytest.raises(BlobCorrupt, match="digest"):
        await store.verify(key, digest=digest_bytes(b"x"), size_bytes=size_bytes)
    with pytest.raises(BlobCorrupt, match="bytes"):
        await store.verify(key, digest=digest_bytes(data), size_bytes=size_bytes + 1)


@pytest.mark.parametrize("expected", [0, 1, 3 * MIB - 1, 3 * MIB + 1, 7 * MIB])
async def test_other_size_than_expected_is_corrupt(store: ObjectStore, key: str, tmp_path: Path, expected: int) -> None:
    data = bytes(3 * MIB)
    await store.put_bytes(key, data)
    with pytest.raises(BlobCorrupt):
        await store.get_file(key, tmp_path / "target", digest=digest_bytes(data), size_bytes=expected)
    assert list(tmp_path.iterdir()) == []


async def test_corrupt_download_keeps_the_file_that_was_there(store: ObjectStore, key: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old and good")
    await store.put_bytes(key, b"new")
    with pytest.raises(BlobCorrupt):
        await store.get_file(key, target, digest=digest_bytes(b"x"))
    assert target.read_bytes() == b"old and good"
    await store.get_file(key, target, digest=digest_bytes(b"new"))
    assert target.read_bytes() == b"new"


async def test_missing_key(store: ObjectStore, key: str, tmp_path: Path) -> None:
    assert await store.head(key) is None
    with pytest.raises(NotFound, match=key):
        await store.get_bytes(key, max_bytes=1)
    for size_bytes in (None, 10, 5 * MIB):
        with pytest.raises(NotFound, match=key):
            await store.get_file(key, tmp_path / "target", digest=digest_bytes(b""), size_bytes=size_bytes)
    assert list(tmp_path.iterdir()) == []
    await store.delete(key)


async def test_longer_than_allowed_is_refused(store: ObjectStore, key: str) -> None:
    await store.put_bytes(key, bytes(11))
    with pytest.raises(ResourceExhausted, match="11 bytes"):
        await store.get_bytes(key, max_bytes=10)


async def test_delete(store: ObjectStore, key: str) -> None:
    await store.put_bytes(key, b"x")
    await store.delete(key)
    assert await store.head(key) is None
    await store.put_bytes(key, b"y")
    assert await store.get_bytes(key, max_bytes=1) == b"y"


async def test_list_by_prefix(store: ObjectStore) -> None:
    root = f"tenants/t{secrets.token_hex(4)}/blobs"
    keys = {f"{root}/{folder}/s{n}" for folder in ("aa", "ab", "b") for n in range(3)}
    for each in keys:
        await store.put_bytes(each, each.encode())
    listed = [each async for each in store.list(f"{root}/")]
    assert sorted(each.key for each in listed) == sorted(keys)
    assert all(each.size_bytes == len(each.key) and each.digest is None for each in listed)
    assert {each.key async for each in store.list(f"{root}/a")} == {each for each in keys if "/a" in each[len(root) :]}
    assert [each.key async for each in store.list(f"{root}/aa/s1")] == [f"{root}/aa/s1"]
    assert [each async for each in store.list("tenants/nobody/")] == []


async def test_part_uploads_are_listed_and_given_up(store: ObjectStore, tmp_path: Path) -> None:
    root = f"tenants/t{secrets.token_hex(4)}/blobs"
    before = datetime.now(UTC) - timedelta(minutes=1)
    assert [each async for each in store.list_part_uploads(f"{root}/")] == []
    for name in ("a", "b"):
        await begin_part_upload(store, f"{root}/{name}/s1")
    listed = {each.key: each async for each in store.list_part_uploads(f"{root}/")}
    assert set(listed) == {f"{root}/a/s1", f"{root}/b/s1"}
    assert all(before < each.started_at < datetime.now(UTC) + timedelta(minutes=1) for each in listed.values())
    assert await store.head(f"{root}/a/s1") is None
    for _ in range(2):
        await store.abort_part_upload(listed[f"{root}/a/s1"])
    assert [each.key async for each in store.list_part_uploads(root)] == [f"{root}/b/s1"]


async def begin_part_upload(store: ObjectStore, key: str) -> None:
    """Leave an upload behind as a killed process does."""
    if isinstance(store, S3ObjectStore):
        await store._calls.client.create_multipart_upload(Bucket=store._bucket, Key=key)
    else:
        assert isinstance(store, MemoryObjectStore)
        store.part_uploads.append(PartUpload(key, secrets.token_hex(4), datetime.now(UTC)))


@pytest.mark.parametrize("bad", ["", "/a", "a/", "a//b", "a/../b", "..", "a/..b", "a b", "a\x00b", "ä", "x" * 1025])
async def test_malformed_keys(store: ObjectStore, tmp_path: Path, bad: str) -> None:
    with pytest.raises(InvalidArgument):
        await store.put_bytes(bad, b"")
    with pytest.raises(InvalidArgument):
        await store.head(bad)
    with pytest.raises(InvalidArgument):
        await store.get_bytes(bad, max_bytes=1)
    with pytest.raises(InvalidArgument):
        await store.delete(bad)
    with pytest.raises(InvalidArgument):
        await store.get_file(bad, tmp_path / "t", digest=digest_bytes(b""))


async def test_files_that_cannot_be_opened(store: ObjectStore, key: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        await store.put_file(key, tmp_path / "absent", digest=digest_bytes(b""))
    with pytest.raises(InvalidArgument, match="cannot read"):
        await store.put_file(key, tmp_path, digest=digest_bytes(b""))
    await store.put_bytes(key, b"x")
    with pytest.raises(InvalidArgument, match="cannot write"):
        await store.get_file(key, tmp_path / "absent" / "target", digest=digest_bytes(b"x"))
    with pytest.raises(InvalidArgument, match="digest"):
        await store.put_file(key, tmp_path, digest="md5:abc")


async def test_ensure_bucket_twice(store: ObjectStore) -> None:
    await asyncio.gather(store.ensure_bucket(), store.ensure_bucket())
