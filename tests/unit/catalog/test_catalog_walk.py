"""Walks: every key once and in order, without making the store count what is not read."""

from __future__ import annotations

import random
from bisect import bisect_left
from typing import Any

import pytest
from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.keys import shard_of
from mint_catalog.storage.store import KeyValue, Put, ScanResult, prefix_end
from mint_catalog.storage.walk import clear, walk


class _Sorted:
    """Keys that never change; counts what a store that counts whole ranges would."""

    def __init__(self, keys: list[bytes], value: bytes = b"") -> None:
        self.keys = sorted(keys)
        self.value = value
        self.num_counted = 0
        self.num_scans = 0
        self.largest = 0

    async def scan(self, start: bytes, end: bytes, *, limit: int, revision: int = 0, keys_only: bool = False) -> Any:
        first, last = bisect_left(self.keys, start), bisect_left(self.keys, end)
        self.num_counted += last - first
        self.num_scans += 1
        found = self.keys[first : min(last, first + limit)]
        self.largest = max(self.largest, sum(len(self.value) for _ in found))
        return ScanResult(tuple(KeyValue(key, self.value, 1, 1) for key in found), last - first > limit, 7)


async def _walked(store: Any, start: bytes, end: bytes, **options: Any) -> list[bytes]:
    return [kv.key async for page in walk(store, start, end, **options) for kv in page]


def _sharded(num_tenants: int, num_policies: int) -> list[bytes]:
    ids = [f"p-{number:07d}" for number in range(num_policies)]
    return [f"/m/policies/t{t}/{shard_of(each)}/{each}".encode() for t in range(num_tenants) for each in ids]


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
async def test_every_key_comes_once_and_in_order(limit: int) -> None:
    pick = random.Random(limit)
    alphabet = "ab09._-/Z"
    keys = list({("/m/" + "".join(pick.choices(alphabet, k=pick.randint(1, 9)))).encode() for _ in range(700)})
    store = _Sorted([*keys, b"/l/z", b"/n"])
    assert await _walked(store, b"/m/", prefix_end(b"/m/"), limit=limit) == sorted(keys)


@pytest.mark.parametrize(
    "keys",
    [_sharded(1, 40_000), _sharded(40, 1000), [f"/m/blobs/t/{n:064x}".encode() for n in range(40_000)]],
    ids=["one tenant", "many tenants", "no shards"],
)
async def test_a_walk_counts_little_more_than_it_reads(keys: list[bytes]) -> None:
    store = _Sorted(keys)
    assert await _walked(store, b"/m/", b"/m0", limit=100) == sorted(keys)
    # A plain paging would count (number of pages) / 2 times the keys: 200 times here.
    assert store.num_counted < 20 * len(keys)
    assert store.num_scans < 6 * len(keys) / 100


async def test_large_values_make_small_pages() -> None:
    store = _Sorted([f"/m/{n:04d}".encode() for n in range(300)], b"x" * 100_000)
    assert len(await _walked(store, b"/m/", b"/m0", limit=100)) == 300
    first, store.largest = store.largest, 0
    assert first <= 100 * 100_000  # the first page tells
    assert store.num_scans > 5


async def test_clear_leaves_what_is_outside() -> None:
    store = MemoryStore()
    inside = [f"/m/{n:03d}".encode() for n in range(250)]
    await store.txn([], [Put(key, b"1") for key in inside[:100]])
    await store.txn([], [Put(key, b"1") for key in inside[100:200]])
    await store.txn([], [Put(key, b"1") for key in [*inside[200:], b"/l", b"/m0", b"/n"]])
    assert await clear(store, b"/m/", b"/m0")
    left = (await store.scan(b"/", b"0", limit=1000)).values
    assert [kv.key for kv in left] == [b"/l", b"/m0", b"/n"]
