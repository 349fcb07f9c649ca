"""The S3 client against a real server that is killed, stopped, forgetful or unwilling."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mint_blobs.digests import digest_bytes, digest_file
from mint_blobs.s3 import S3ObjectStore
from mint_blobs.settings import ObjectStoreSettings
from mint_core.errors import (
    BlobCorrupt,
    FailedPrecondition,
    MintError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from support.weed import WeedServer, running_weed

MIB = 1 << 20


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@contextlib.asynccontextmanager
async def opened(weed: WeedServer, **changes: object) -> AsyncIterator[S3ObjectStore]:
    quick: dict[str, object] = {
        "part_size_bytes": 5 * MIB,
        "range_size_bytes": MIB,
        "max_concurrency": 3,
        "max_attempts": 3,
        "backoff_s": 0.02,
    }
    async with S3ObjectStore(weed.settings(**(quick | changes))) as store:
        yield store


@pytest.fixture
async def store(weed: WeedServer) -> AsyncIterator[S3ObjectStore]:
    async with opened(weed) as store:
        await store.ensure_bucket()
        yield store


@pytest.fixture
def key() -> str:
    return f"tenants/acme/blobs/{secrets.token_hex(8)}/s1"


def _random_file(path: Path, size_bytes: int) -> str:
    data = secrets.token_bytes(size_bytes)
    path.write_bytes(data)
    return digest_bytes(data)


def _num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.timeout(120)
async def test_killed_server_answers_unavailable_and_keeps_what_it_acknowledged(
    weed: WeedServer, store: S3ObjectStore, key: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    digest = _random_file(source, 64 * MIB)
    await store.put_file(key, source, digest=digest)
    folder = key.rpartition("/")[0]
    try:
        # In the midst of an upload and of a download
        up = asyncio.create_task(store.put_file(f"{folder}/s2", source, digest=digest))
        down = asyncio.create_task(store.get_file(key, target, digest=digest))
        await asyncio.sleep(0.15)
        assert not up.done(), "too quick: the server must be killed in the midst"
        assert not down.done(), "too quick: the server must be killed in the midst"
        weed.kill()
        for task in (up, down):
            with pytest.raises(Unavailable) as caught:
                await task
            assert caught.value.retry_after_s is not None
            assert weed.endpoint_url in str(caught.value)
        assert [each.name for each in tmp_path.iterdir()] == ["source"]
        for call in (store.head(key), store.get_bytes(key, max_bytes=1), store.put_bytes(key, b""), store.delete(key)):
            with pytest.raises(Unavailable):
                await call
        with pytest.raises(Unavailable):
            await store.ensure_bucket()
        with pytest.raises(Unavailable):
            _ = [each async for each in store.list("")]
    finally:
        weed.kill()
        weed.start()
    # The same client goes on with the restarted server.
    assert await store.head(f"{folder}/s2") is None
    await store.get_file(key, target, digest=digest)
    assert await digest_file(target) == digest
    await store.put_file(f"{folder}/s2", source, digest=digest)
    assert {each.key async for each in store.list(f"{folder}/")} == {f"{folder}/s1", f"{folder}/s2"}


async def test_silent_server_is_given_up_in_time(weed: WeedServer, store: S3ObjectStore, key: str) -> None:
    await store.put_bytes(key, b"x")
    async with opened(weed, read_timeout_s=0.3, operation_timeout_s=0.8) as hasty:
        weed.pause()
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await hasty.get_bytes(key, max_bytes=1)
            assert time.monotonic() - began < 2.0
        finally:
            weed.resume()
        assert await hasty.get_bytes(key, max_bytes=1) == b"x"


async def test_wrong_credentials_are_told_at_once(weed: WeedServer, store: S3ObjectStore, key: str) -> None:
    await store.put_bytes(key, b"x")
    patient: dict[str, object] = {"max_attempts": 20, "backoff_s": 2.0}
    for changes in ({"secret_access_key": "not the secret"}, {"access_key_id": "nobody"}):
        async with opened(weed, **changes, **patient) as stranger:
            for call in (stranger.get_bytes(key, max_bytes=1), stranger.put_bytes(key, b"y", if_absent=False)):
                with pytest.raises(Unauthenticated, match="access_key_id"):
                    await call
            # A HEAD answer has no body that could tell a wrong secret from a missing right.
            for head in (stranger.head(key), stranger.ensure_bucket()):
                with pytest.raises(PermissionDenied, match="Check the secret"):
                    await head
    assert await store.get_bytes(key, max_bytes=1) == b"x"


async def test_secret_is_in_no_message(weed: WeedServer, key: str) -> None:
    async with opened(weed, secret_access_key="tell-nobody") as stranger:
        with pytest.raises(Unauthenticated) as caught:
            await stranger.get_bytes(key, max_bytes=1)
    assert "tell-nobody" not in str(caught.value) + repr(caught.value.metadata) + repr(weed.settings())


async def test_absent_bucket(weed: WeedServer, store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    async with opened(weed, bucket="not-there") as lost:
        with pytest.raises(FailedPrecondition, match="not-there"):
            await lost.get_bytes(key, max_bytes=1)
        with pytest.raises(FailedPrecondition, match="not-there"):
            _ = [each async for each in lost.list("")]


async def test_cancelled_transfers_leave_nothing(store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    digest = _random_file(source, 48 * MIB)
    await store.put_file(key, source, digest=digest)
    other = key.replace("/s1", "/s2")
    for transfer in (
        lambda: store.get_file(key, tmp_path / "target", digest=digest),
        lambda: store.put_file(other, source, digest=digest),
    ):
        for after_s in (0.0, 0.005, 0.05):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(after_s):
                    await transfer()
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
    assert await store.head(other) is None
    uploads = await store._calls.client.list_multipart_uploads(Bucket="mint")
    assert not [each for each in uploads.get("Uploads", []) if each["Key"] == other], "an upload was not aborted"
    await store.put_file(other, source, digest=digest)
    await store.get_file(other, tmp_path / "target", digest=digest)


async def test_upload_begun_while_its_caller_was_cancelled_is_aborted(
    store: S3ObjectStore, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    digest = _random_file(source, 24 * MIB)
    client = store._calls.client
    create, begun = client.create_multipart_upload, asyncio.Event()

    async def slow_answer(**asked: str) -> object:
        answer: object = await create(**asked)
        begun.set()
        await asyncio.sleep(0.1)
        return answer

    monkeypatch.setattr(client, "create_multipart_upload", slow_answer)
    put = asyncio.create_task(store.put_file(key, source, digest=digest))
    await begun.wait()
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    uploads = await client.list_multipart_uploads(Bucket="mint")
    assert not [each for each in uploads.get("Uploads", []) if each["Key"] == key]


async def test_parallel_ranges_equal_one_read(weed: WeedServer, store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    digest = _random_file(source, 9 * MIB + 123)
    await store.put_file(key, source, digest=digest)
    for range_size_bytes, max_concurrency in ((64 * 1024, 16), (1_000_003, 2), (1 << 30, 1)):
        async with opened(weed, range_size_bytes=range_size_bytes, max_concurrency=max_concurrency) as reader:
            target = tmp_path / f"target{range_size_bytes}"
            await reader.get_file(key, target, digest=digest)
            assert target.read_bytes() == source.read_bytes()


async def test_object_changed_under_its_record_is_corrupt(store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    good, bad = secrets.token_bytes(3 * MIB), bytearray()
    bad += good
    bad[2 * MIB] ^= 1
    await store.put_bytes(key, bytes(bad))
    with pytest.raises(BlobCorrupt) as caught:
        await store.get_file(key, tmp_path / "target", digest=digest_bytes(good), size_bytes=len(good))
    assert caught.value.metadata["actual_digest"] == digest_bytes(bytes(bad))
    assert list(tmp_path.iterdir()) == []


async def test_full_disk(store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    data = secrets.token_bytes(4 * MIB)
    await store.put_bytes(key, data)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        with pytest.raises(ResourceExhausted, match="cannot write"):
            await store.get_file(key, tmp_path / "target", digest=digest_bytes(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    await store.get_file(key, tmp_path / "target", digest=digest_bytes(data))


async def test_transfers_leak_no_descriptors(store: S3ObjectStore, key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    digest = _random_file(source, 6 * MIB)
    await store.put_file(key, source, digest=digest)

    async def round_trip() -> None:
        await store.get_file(key, tmp_path / "target", digest=digest)
        with pytest.raises(BlobCorrupt):
            await store.get_file(key, tmp_path / "target", digest=digest_bytes(b""))
        with pytest.raises(NotFound):
            await store.get_file(f"{key}x", tmp_path / "target", digest=digest)

    await round_trip()
    num_before = _num_open_files()
    for _ in range(5):
        await round_trip()
    assert _num_open_files() <= num_before + 2


async def test_nobody_listens(key: str) -> None:
    settings = ObjectStoreSettings(
        endpoint_url="http://127.0.0.1:1", access_key_id="a", secret_access_key="b", max_attempts=2, backoff_s=0.01
    )
    async with S3ObjectStore(settings) as store:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await store.head(key)
    with pytest.raises(MintError, match="async with"):
        await store.head(key)
