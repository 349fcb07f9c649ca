"""Walks over key ranges of any size and layout: in order, page by page, at a cost that follows the page.

etcd counts the whole range that it is asked for, however small the limit: paging over a range of a million keys makes
it count half a million for each page. A walk asks for narrow ranges instead. A page that was full says how dense the
keys are there: the next range ends with the prefix that all of its keys share. A range that was read to its end is
followed by its neighbour if it was well filled, else by one that reaches a byte further up. So no family, tenant or
shard need be known, and none is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from mint_catalog.storage.store import Compare, DeleteRange, KeyValue, ScanResult, Store, prefix_end

__all__ = ["PAGE", "clear", "walk"]

PAGE: Final = 1000
_LEAST: Final = 16
_FILLED: Final = 8
_PAGE_BYTES: Final = 4 << 20


async def walk(
    store: Store, start: bytes, end: bytes, *, revision: int = 0, limit: int = PAGE, keys_only: bool = False
) -> AsyncGenerator[tuple[KeyValue, ...], None]:
    """All keys of ``[start, end)`` in order, in pages of at most ``limit`` keys and some MiB, none empty.

    At one revision if one is given, else each page as it is then. The next page is read while one is worked on.
    Raises ``RevisionCompacted``, ``Unavailable``.
    """

    def read(first: bytes, last: bytes, most: int) -> asyncio.Task[ScanResult]:
        return asyncio.create_task(store.scan(first, last, limit=most, revision=revision, keys_only=keys_only))

    stop, depth, size = end, 0, limit
    reading: asyncio.Task[ScanResult] | None = read(start, stop, size)
    try:
        while reading is not None:
            result = await reading
            values = result.values
            if result.more:
                start, depth = values[-1].key + b"\0", _num_shared(values[0].key, values[-1].key)
                stop = min(end, prefix_end(values[-1].key[:depth]))
                size = _next_size(values, limit)
            else:
                filled = len(values) >= max(1, size // _FILLED)
                start, depth = stop, len(stop) if filled else len(stop) - 1
                stop = min(end, prefix_end(start[:depth])) if depth else end
            reading = read(start, stop, size) if start < end else None
            if values:
                yield values
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def _num_shared(first: bytes, last: bytes) -> int:
    """Number of leading bytes that two different keys share, at least 1."""
    different = (index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return max(1, next(different, min(len(first), len(last))))


def _next_size(values: Sequence[KeyValue], limit: int) -> int:
    """How many keys to ask for next, by the size of those that came."""
    mean = max(1, sum(len(kv.value) for kv in values) // len(values))
    return max(_LEAST, min(limit, _PAGE_BYTES // mean))


async def clear(store: Store, start: bytes, end: bytes, *, compares: Sequence[Compare] = ()) -> bool:
    """Delete all keys of ``[start, end)``, a page in a transaction; False when a compare did not hold."""
    async for page in walk(store, start, end, keys_only=True):
        operation = DeleteRange(page[0].key, page[-1].key + b"\0")
        if not (await store.txn(compares, [operation])).succeeded:
            return False
    return True
