"""A tenant's sharded records in the order of their names.

The store's order is by hash shard first, so the shards are merged. A stretch reads the same span of names of every
shard. How wide a span is worth reading, one shard tells: names are spread evenly over them, and a bound keeps etcd from
counting all that follows in each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from mint_catalog.model.keys import NUM_SHARDS
from mint_catalog.storage.paging import Stretch
from mint_catalog.storage.store import KeyValue, Store, prefix_end

__all__ = ["name_stretches"]

_RANGES_AT_ONCE: Final = 128


async def name_stretches(
    store: Store, prefix: bytes, position: str, *, revision: int, limit: int
) -> AsyncIterator[Stretch]:
    """Keys below a tenant's sharded ``prefix``, by their last part, after the one that is ``position``."""
    shards = [prefix + f"{shard:02x}/".encode() for shard in range(NUM_SHARDS)]
    per_shard = 2 + limit // NUM_SHARDS
    while True:
        after = position.encode() + b"\0" if position else b""
        sample = await store.scan(
            shards[0] + after, prefix_end(shards[0]), limit=per_shard, revision=revision, keys_only=True
        )
        revision = revision or sample.revision
        until = sample.values[-1].key[len(shards[0]) :] + b"\0" if sample.more else b""
        complete, values = until, list[KeyValue]()
        for first in range(0, NUM_SHARDS, _RANGES_AT_ONCE):
            ranges = [
                (shard + after, shard + until if until else prefix_end(shard))
                for shard in shards[first : first + _RANGES_AT_ONCE]
            ]
            for (start, _), found in zip(
                ranges, await store.scan_each(ranges, limit=2 * per_shard, revision=revision), strict=True
            ):
                values += found.values
                if found.more:  # names behind the last one of this shard may be missing
                    end = found.values[-1].key[len(start) - len(after) :] + b"\0"
                    complete = min(complete, end) if complete else end
        merged = sorted((kv.key.rpartition(b"/")[2], kv) for kv in values)
        whole = tuple(kv for name, kv in merged if not complete or name < complete)
        yield Stretch(whole, revision, last=not complete)
        if not complete:
            return
        position = complete[:-1].decode()
