"""The digest of a file that arrives in pieces."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest

from mint_blobs import _local
from mint_blobs._local import ArrivalDigest, write_at, writing_target
from mint_core.errors import Internal


@pytest.mark.parametrize(("size_bytes", "range_bytes"), [(0, 10), (1, 10), (10, 10), (95, 10), (3_000_000, 700_001)])
async def test_any_order_gives_the_digest_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int, range_bytes: int
) -> None:
    monkeypatch.setattr(_local, "_SYNC_BYTES", 20)
    data = random.Random(size_bytes).randbytes(size_bytes)
    async with writing_target(tmp_path / "target") as file:
        digesting = ArrivalDigest(file, size_bytes, range_bytes)
        assert sum(length for _, length in digesting.ranges) == size_bytes
        following = asyncio.create_task(digesting.follow())
        for start, length in random.Random(7).sample(digesting.ranges, len(digesting.ranges)):
            await asyncio.sleep(0)
            assert not following.done()
            write_at(file, data[start : start + length], start)
            digesting.arrived(start)
        assert await following == f"sha256:{hashlib.sha256(data).hexdigest()}"


async def test_a_range_that_did_not_arrive_is_no_silent_zero(tmp_path: Path) -> None:
    async with writing_target(tmp_path / "target") as file:
        digesting = ArrivalDigest(file, 20, 10)
        write_at(file, bytes(15), 0)
        for start, _ in digesting.ranges:
            digesting.arrived(start)
        with pytest.raises(Internal, match="5 bytes too early"):
            await digesting.follow()
