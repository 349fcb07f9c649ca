"""The node disk goes bad, runs full, is restarted: what the cache makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mint_core.errors import ResourceExhausted, Unavailable
from mint_loader.cache import DiskCache, Workspace
from mint_loader.cache_folder import CacheFolder
from mint_loader.eviction import EvictionPolicy, Gdsf, Lfu, Lru

SIZE = 100


def verify(folder: Path, digest: str) -> bool:
    return (folder / "weights").read_bytes().rstrip() == content(digest)


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"


def content(digest: str) -> bytes:
    return digest.encode()[-8:] * (SIZE // 8)


async def put(cache: DiskCache, number: int, size_bytes: int = SIZE) -> str:
    digest = digest_of(number)
    async with cache.filling(digest, size_bytes) as workspace:
        workspace.entry.mkdir()
        (workspace.entry / "weights").write_bytes(content(digest).ljust(size_bytes))
    return digest


async def is_good(cache: DiskCache, digest: str) -> bool:
    async with cache.using(digest) as folder:
        return folder is not None


@contextlib.asynccontextmanager
async def opened(
    folder: Path,
    max_bytes: int = 1000,
    check: Callable[[Path, str], bool] = verify,
    eviction: EvictionPolicy | None = None,
    **times: float,
) -> AsyncIterator[DiskCache]:
    cache = DiskCache(folder, max_bytes, verify=check, eviction=eviction, overhead_bytes=0, **times)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


def weights(folder: Path, digest: str) -> Path:
    return folder / digest.removeprefix("sha256:") / "weights"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


async def test_what_is_written_to_while_we_run_is_noticed_at_the_next_use(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        bad, good = await put(cache, 1), await put(cache, 2)
        assert await is_good(cache, bad)
        flip(weights(tmp_path, bad))
        assert not await is_good(cache, bad)
        assert bad not in cache
        assert await is_good(cache, good)
        assert cache.status.num_quarantined == 1
        [aside] = (tmp_path / ".quarantine").iterdir()
        assert aside.name.startswith(bad.removeprefix("sha256:"))
        await put(cache, 1)
        assert await is_good(cache, bad)


async def test_a_changed_file_with_the_same_bytes_is_still_good(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
        os.utime(weights(tmp_path, digest), (1e9, 1e9))
        assert await is_good(cache, digest)
        assert cache.status.num_quarantined == 0


async def test_an_entry_removed_by_hand_counts_as_absent(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
        weights(tmp_path, digest).unlink()
        weights(tmp_path, digest).parent.rmdir()
        assert not await is_good(cache, digest)
        assert (cache.status.used_bytes, cache.status.num_entries) == (0, 0)
        await put(cache, 1)
        assert await is_good(cache, digest)


async def test_bits_that_the_disk_lost_silently_are_found_after_a_while(tmp_path: Path) -> None:
    num_checks = 0

    def counting(folder: Path, digest: str) -> bool:
        nonlocal num_checks
        num_checks += 1
        return verify(folder, digest)

    async with opened(tmp_path, check=counting, verify_again_s=0.05) as cache:
        digest = await put(cache, 1)
        assert await is_good(cache, digest)
        assert num_checks == 0
        stat = weights(tmp_path, digest).stat()
        flip(weights(tmp_path, digest))
        os.utime(weights(tmp_path, digest), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        await asyncio.sleep(0.06)
        assert not await is_good(cache, digest)
        assert num_checks == 1


async def test_quarantine_is_bounded_and_leaves_before_anything_good(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=8 * SIZE) as cache:
        for number in range(6):
            flip(weights(tmp_path, await put(cache, number)))
            assert not await is_good(cache, digest_of(number))
        while cache.status.used_bytes > 4 * SIZE:  # noqa: ASYNC110 - removals
            await asyncio.sleep(0.001)
        assert len(list((tmp_path / ".quarantine").iterdir())) == 4
        for number in range(10, 18):
            await put(cache, number)
        assert cache.status.num_evictions == 0
        assert cache.status.num_entries == 8
    async with opened(tmp_path):
        assert list((tmp_path / ".quarantine").iterdir()) == []


async def test_what_is_kept_is_never_evicted_and_told_when_it_leaves_no_room(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=3 * SIZE) as cache:
        cache.keep(frozenset({digest_of(1), digest_of(2)}))
        for number in range(1, 8):
            await put(cache, number)
        assert digest_of(1) in cache
        assert digest_of(2) in cache
        assert (cache.status.num_kept, cache.status.kept_bytes) == (2, 2 * SIZE)
        with pytest.raises(ResourceExhausted, match=r"100 of 300 hold|unpin some") as caught:
            await put(cache, 8, 2 * SIZE)
        assert caught.value.retry_after_s is not None
        assert digest_of(7) in cache, "evicted in vain"
        cache.keep(cache.kept - {digest_of(1)})
        await put(cache, 8, 2 * SIZE)
        assert digest_of(1) not in cache
        assert digest_of(2) in cache


async def test_a_fill_that_waits_for_what_is_in_use_goes_on_when_something_is_unpinned(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=2 * SIZE) as cache:
        first, second = await put(cache, 1), await put(cache, 2)
        cache.keep(frozenset({second}))
        async with cache.using(first):
            waiting = asyncio.ensure_future(put(cache, 3))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            cache.keep(frozenset())
            await asyncio.wait_for(waiting, 2)
        assert second not in cache


@pytest.mark.parametrize("policy", [Gdsf, Lfu, Lru])
async def test_uses_survive_a_restart(tmp_path: Path, policy: type[EvictionPolicy]) -> None:
    async with opened(tmp_path, eviction=policy()) as cache:
        often, seldom, late = [await put(cache, number) for number in range(3)]
        for digest in [often] * 5 + [seldom] + [late] * 3:
            assert await is_good(cache, digest)
    async with opened(tmp_path, max_bytes=3 * SIZE, eviction=policy()) as cache:
        await put(cache, 9)
        assert (often in cache, seldom in cache, late in cache) == (policy is not Lru, policy is Lru, True)


async def test_uses_are_written_now_and_then_for_a_kill(tmp_path: Path) -> None:
    async with opened(tmp_path, save_uses_s=0.0) as cache:
        digest = await put(cache, 1)
        for _ in range(3):
            assert await is_good(cache, digest)
            await asyncio.gather(*cache._chores)
        held = json.loads((tmp_path / ".uses.json").read_bytes())
        assert held["eviction"] == "gdsf"
        assert held["adapters"][digest.removeprefix("sha256:")][0] == 4


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"[]",
        b'{"eviction": "gdsf"}',
        b'{"eviction": "gdsf", "adapters": {"%064d": [1]}}' % 1,
        b'{"eviction": "gdsf", "adapters": {"%064d": ["x", 1.0]}}' % 1,
        b'{"eviction": "gdsf", "adapters": {"%064d": [Infinity, 1.0]}}' % 1,
        b'{"eviction": "gdsf", "adapters": {"%064d": [1, 1e999]}}' % 1,
        b'{"eviction": "gdsf", "adapters": 7}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
async def test_uses_that_make_no_sense_are_forgotten(tmp_path: Path, garbage: bytes) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
    (tmp_path / ".uses.json").write_bytes(garbage)
    async with opened(tmp_path, max_bytes=SIZE) as cache:
        assert await is_good(cache, digest)
        await put(cache, 2)
        assert cache.status.num_entries == 1


async def test_a_disk_with_less_room_than_the_bound_makes_the_least_worthy_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_bytes = 10 * SIZE
    async with opened(tmp_path, max_bytes=100 * SIZE) as cache:
        monkeypatch.setattr(CacheFolder, "free_bytes", lambda _: disk_bytes - cache.status.used_bytes)
        for number in range(30):
            await put(cache, number)
            assert cache.status.used_bytes <= disk_bytes
        assert cache.status.num_entries == 10
        assert cache.status.num_evictions == 20
        disk_bytes = 4 * SIZE  # somebody else writes there too
        await put(cache, 50)
        assert cache.status.num_entries == 4


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, ResourceExhausted), (errno.EIO, Unavailable), (errno.EROFS, Unavailable)]
)
async def test_a_disk_that_cannot_be_written_is_told_and_counted(
    tmp_path: Path, number: int, told: type[Exception]
) -> None:
    async with opened(tmp_path) as cache:
        with pytest.raises(told) as caught:
            async with cache.filling(digest_of(1), SIZE):
                raise OSError(number, os.strerror(number))
        assert caught.value.retry_after_s is not None  # type: ignore[attr-defined]
        assert cache.status.num_full == (number == errno.ENOSPC)
        await put(cache, 1)


async def test_what_fails_in_the_last_step_leaves_nothing(tmp_path: Path) -> None:
    def make(workspace: Workspace) -> None:
        workspace.entry.mkdir()
        (workspace.entry / "weights").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with opened(tmp_path) as cache:
        with pytest.raises(ResourceExhausted):
            async with cache.filling(digest_of(1), SIZE, make) as workspace:
                workspace.blob.write_bytes(b"half")
        assert (cache.status.used_bytes, cache.status.num_full) == (0, 1)
        assert list((tmp_path / ".incoming").iterdir()) == []


async def test_what_is_no_entry_of_ours_is_removed_too(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
        (weights(tmp_path, digest).parent / "folder" / "inside").mkdir(parents=True)
        await put(cache, 1)
    assert list((tmp_path / ".trash").iterdir()) == []


async def test_uses_that_cannot_be_written_stop_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CacheFolder, "write_uses", full)
    async with opened(tmp_path, save_uses_s=0.0) as cache:
        assert await is_good(cache, await put(cache, 1))


async def test_a_fill_of_what_is_here_replaces_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        digest = await put(cache, 1)
        await put(cache, 1)
        (tmp_path / digest_of(2).removeprefix("sha256:")).mkdir()
        await put(cache, 2)
        assert (cache.status.used_bytes, cache.status.num_entries) == (2 * SIZE, 2)
        assert await is_good(cache, digest)
    assert list((tmp_path / ".trash").iterdir()) == []
