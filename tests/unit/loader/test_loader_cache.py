"""The node disk: whole or absent, bounded, verified after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import FailedPrecondition, ResourceExhausted
from mint_loader.cache import DiskCache

CONFIG = b"{}"


def blob_of(number: int, size: int = 100) -> tuple[str, bytes]:
    data = (f"{number}-".encode() * size)[:size]
    return f"sha256:{hashlib.sha256(data).hexdigest()}", data


def verify(folder: Path, digest: str) -> bool:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return (
        f"sha256:{hashlib.sha256(weights).hexdigest()}" == digest
        and (folder / "adapter_config.json").read_bytes() == CONFIG
    )


async def put(cache: DiskCache, number: int, size: int = 100) -> str:
    digest, data = blob_of(number, size)
    async with cache.filling(digest, size) as workspace:
        workspace.blob.write_bytes(data)
        workspace.entry.mkdir()
        os.link(workspace.blob, workspace.entry / "adapter_model.safetensors")
        (workspace.entry / "adapter_config.json").write_bytes(CONFIG)
    return digest


@contextlib.asynccontextmanager
async def opened(folder: Path, max_bytes: int = 1000) -> AsyncIterator[DiskCache]:
    cache = DiskCache(folder, max_bytes, verify=verify, overhead_bytes=10)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))


def leftovers(folder: Path) -> list[Path]:
    return [*(folder / ".incoming").iterdir(), *(folder / ".trash").iterdir()]


async def test_an_adapter_is_found_under_its_digest_with_exactly_two_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
        async with cache.using(digest) as folder:
            assert folder == tmp_path / digest.removeprefix("sha256:")
            assert sorted(each.name for each in folder.iterdir()) == [
                "adapter_config.json",
                "adapter_model.safetensors",
            ]
        assert cache.status.used_bytes == 102
    assert leftovers(tmp_path) == []


async def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest, _ = blob_of(1)
        with pytest.raises(RuntimeError, match="torn"):  # noqa: PT012 - the block is what is tested
            async with cache.filling(digest, 100) as workspace:
                workspace.blob.write_bytes(b"half")
                raise RuntimeError("torn")
        assert digest not in cache
        assert cache.status.used_bytes == 0
    assert names(tmp_path) == []
    assert leftovers(tmp_path) == []


async def test_a_cancelled_fill_leaves_nothing_and_gives_its_room_back(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=200) as cache:
        digest, _ = blob_of(1)

        async def stall() -> None:
            async with cache.filling(digest, 100) as workspace:
                workspace.blob.write_bytes(b"half")
                await asyncio.Event().wait()

        stalled = asyncio.ensure_future(stall())
        while not list((tmp_path / ".incoming").glob("*.blob")):  # noqa: ASYNC110 - the disk tells no events
            await asyncio.sleep(0.001)
        stalled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stalled
        await put(cache, 2, 150)
    assert leftovers(tmp_path) == []


async def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=330) as cache:
        first, second, third = [await put(cache, number) for number in range(3)]
        async with cache.using(first) as folder:
            assert folder is not None
        fourth = await put(cache, 3)
        assert [digest in cache for digest in (first, second, third, fourth)] == [True, False, True, True]
        assert cache.status.num_evictions == 1
        assert cache.status.used_bytes <= 330
    assert len(names(tmp_path)) == 3


async def test_what_is_in_use_is_never_evicted_and_a_fill_waits_for_it(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=120) as cache:
        first = await put(cache, 1)
        async with cache.using(first) as folder:
            assert folder is not None
            waiting = asyncio.ensure_future(put(cache, 2))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert verify(folder, first)
        second = await asyncio.wait_for(waiting, 2)
        assert first not in cache
        assert second in cache


async def test_a_digest_pinned_before_it_arrives_is_kept_after_it_arrived(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=120) as cache:
        digest, _ = blob_of(1)
        with cache.pinned(digest):
            await put(cache, 1)
            waiting = asyncio.ensure_future(put(cache, 2))
            await asyncio.sleep(0.05)
            assert digest in cache
        await waiting
        assert digest not in cache


async def test_larger_than_the_cache_is_refused_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=105) as cache:
        with pytest.raises(ResourceExhausted, match="needs 110 bytes of disk, the loader's cache may hold 105"):
            await put(cache, 1)


async def test_an_evicted_file_that_is_mapped_keeps_its_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=120) as cache:
        first = await put(cache, 1)
        async with cache.using(first) as folder:
            assert folder is not None
            mapped = (folder / "adapter_model.safetensors").open("rb")
        with mapped:
            await put(cache, 2)
            assert mapped.read() == blob_of(1)[1]


async def test_a_restart_sweeps_leftovers_and_keeps_entries_in_order_of_use(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        first, second = await put(cache, 1), await put(cache, 2)
        os.utime(tmp_path / first.removeprefix("sha256:"), (2e9, 2e9))
        os.utime(tmp_path / second.removeprefix("sha256:"), (1e9, 1e9))
    (tmp_path / ".incoming" / "torn").mkdir()
    (tmp_path / ".incoming" / "torn" / "blob").write_bytes(b"half")
    (tmp_path / ".trash" / "old").mkdir()
    (tmp_path / "README").write_text("a stranger")
    async with opened(tmp_path, max_bytes=250) as cache:
        assert leftovers(tmp_path) == []
        assert first in cache
        assert second in cache
        await put(cache, 3)
        assert first in cache  # used later than the second, says its folder
        assert second not in cache
    assert (tmp_path / "README").exists()


async def test_a_smaller_bound_after_a_restart_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        for number in range(5):
            await put(cache, number)
    async with opened(tmp_path, max_bytes=220) as cache:
        assert cache.status.used_bytes <= 220
        assert cache.status.num_entries == 2


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
async def test_bytes_that_went_bad_are_found_at_the_first_use_after_a_restart(tmp_path: Path, file: str) -> None:
    async with opened(tmp_path) as cache:
        digest, good = await put(cache, 1), await put(cache, 2)
    path = tmp_path / digest.removeprefix("sha256:") / file
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    async with opened(tmp_path) as cache:
        async with cache.using(digest) as folder:
            assert folder is None
        assert digest not in cache
        assert cache.status.num_quarantined == 1
        async with cache.using(good) as folder:
            assert folder is not None
        await put(cache, 1)
        async with cache.using(digest) as folder:
            assert folder is not None
    assert leftovers(tmp_path) == []


async def test_a_torn_entry_of_a_foreign_hand_counts_as_absent(tmp_path: Path) -> None:
    digest, _ = blob_of(1)
    (tmp_path / digest.removeprefix("sha256:")).mkdir(parents=True)
    async with opened(tmp_path) as cache, cache.using(digest) as folder:
        assert folder is None


async def test_verification_happens_once_for_many(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
    num_checks = 0

    def counting(folder: Path, digest: str) -> bool:
        nonlocal num_checks
        num_checks += 1
        return verify(folder, digest)

    cache = DiskCache(tmp_path, 1000, verify=counting)
    await cache.open()

    async def use() -> bool:
        async with cache.using(digest) as folder:
            return folder is not None

    assert all(await asyncio.gather(*(use() for _ in range(50))))
    assert num_checks == 1
    cache.distrust(digest)
    assert await use()
    assert num_checks == 2
    await cache.close()


async def test_two_loaders_cannot_share_a_folder(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(FailedPrecondition, match="in use by another loader"):
            await DiskCache(tmp_path, 1000, verify=verify).open()
    async with opened(tmp_path):
        pass


async def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        with pytest.raises(ResourceExhausted, match="make room on that disk"):
            async with cache.filling(blob_of(1)[0], 100):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert cache.status.used_bytes == 0
        await put(cache, 1)


async def test_many_fills_at_once_stay_within_the_bound(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=350) as cache:
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                total = sum(
                    file.stat().st_size
                    for each in tmp_path.iterdir()
                    if not each.name.startswith(".")
                    for file in each.iterdir()
                )
                peak = max(peak, total)
                await asyncio.sleep(0.0005)

        watcher = asyncio.ensure_future(watch())
        await asyncio.gather(*(put(cache, number) for number in range(30)))
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError, FileNotFoundError):
            await watcher
        assert 0 < peak <= 350
        assert cache.status.num_entries == 3
        assert cache.status.num_evictions == 27
    assert leftovers(tmp_path) == []


async def test_one_that_waits_for_what_is_in_use_lets_others_pass(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=500) as cache:
        first = await put(cache, 1, 300)
        async with cache.using(first):
            large = asyncio.ensure_future(put(cache, 2, 400))
            await asyncio.sleep(0.02)
            small = await asyncio.wait_for(put(cache, 3, 100), 2)
            assert small in cache
            assert not large.done()
        await asyncio.wait_for(large, 2)
