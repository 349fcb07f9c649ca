"""Whose run is next.

Larger priorities go first. Among equal ones a tenant with fewer runs claimed goes before one with more, whatever each
has queued, and among those the one whose oldest run waits longest. So a tenant with 10,000 queued runs holds another
one up by no more than what is running.

Exactly so while at most 64 tenants stand equal; of more, a call looks at the heads of 64 lanes that it chooses by
chance. What one call costs is bounded by that and by the number of lanes read, not by the number of runs.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from mint_catalog.model.keys import Keys
from mint_catalog.storage.erasing import not_erasing
from mint_catalog.storage.paging import list_all
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, Operation, ScanResult, Store, prefix_end
from mint_catalog.work.waiting import Waiting, woken
from mint_core.clock import wall_s
from mint_core.names import BaseModelName

__all__ = ["Turns", "read_claims"]

_MAX_LANES: Final = 512
_NUM_LANES: Final = 64
"""Lanes whose first entries are read at once."""
_NUM_HEADS: Final = 8
_PAGE: Final = 100
_MAX_PAGES: Final = 10
_NUM_WOKEN: Final = 32
_CLOCK_SLACK_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Lane:
    marker: KeyValue
    priority: str
    tenant: str


class Turns:
    """Puts what waits for a base model into the order of its turns."""

    def __init__(self, store: Store, keys: Keys, *, longest_delay_s: float) -> None:
        self._store = store
        self._keys = keys
        self._longest_delay_s = longest_delay_s + _CLOCK_SLACK_S
        # Where to read on in ranges that were not read to their end.
        self._places: dict[bytes, bytes] = {}

    async def wake(self, base_model: BaseModelName) -> float:
        """Move entries whose time has passed to their lanes; seconds until the next one, infinity if there is none.

        A clock may be wrong: an entry that would wait longer than any pause has its time passed too.
        """
        now_us = round(wall_s() * 1e6)
        latest_us = now_us + round(self._longest_delay_s * 1e6)
        start, end = self._keys.delays(base_model), prefix_end(self._keys.delays(base_model))
        present, latest = (self._keys.delayed_from(base_model, time_us) for time_us in (now_us, latest_us))
        ranges = [(start, present), (latest, end), (present, latest)]
        passed, impossible, coming = await self._store.scan_each(ranges, limit=_NUM_WOKEN)
        entries = (*passed.values, *impossible.values)[:_NUM_WOKEN]
        if entries and not await self._move(base_model, entries):
            return 0.0  # a rival has moved some of them, or one was cancelled
        if passed.more or impossible.more or len(passed.values) + len(impossible.values) > _NUM_WOKEN:
            return 0.0
        if not coming.values:
            return math.inf
        next_us = int(self._keys.parts(coming.values[0].key)[2])
        return (next_us - now_us) / 1e6

    async def _move(self, base_model: BaseModelName, entries: Sequence[KeyValue]) -> bool:
        marks = {
            name: self._keys.erasing(name) for name in {self._keys.run_name(entry.key).tenant for entry in entries}
        }
        values = (await self._store.get(list(marks.values()))).values
        erased = {tenant for tenant, mark in zip(marks, values, strict=True) if mark is not None}
        compares = [Compare(entry.key, Field.MOD, entry.mod_revision) for entry in entries]
        compares += [not_erasing(self._keys, tenant) for tenant in marks if tenant not in erased]
        operations: dict[bytes, Operation] = {entry.key: Delete(entry.key) for entry in entries}
        for entry in entries:
            if self._keys.run_name(entry.key).tenant not in erased:  # else it only goes, as all of the tenant's will
                operations |= {put.key: put for put in woken(self._keys, base_model, entry)}
        return (await self._store.txn(compares, list(operations.values()))).succeeded

    async def entries(self, base_model: BaseModelName) -> AsyncGenerator[KeyValue, None]:
        """Entries of the queue whose lease was free when they were looked at, in the order of their turns."""
        lanes = await self._lanes(base_model)
        num_claims = await self._num_claims(base_model) if len(lanes) > 1 else Counter[str]()

        def rank(lane: _Lane) -> tuple[str, int]:
            return lane.priority, num_claims[lane.tenant]

        tried: set[bytes] = set()
        for _, group in groupby(sorted(lanes, key=rank), key=rank):
            equals = list(group)
            # By chance, since any counter may keep step with the lanes that are read and leave some out for good.
            first = random.randrange(len(equals)) if len(equals) > _NUM_LANES else 0
            equals = equals[first:] + equals[:first]
            for index in range(0, len(equals), _NUM_LANES):
                for prefix, head in await self._heads(equals[index : index + _NUM_LANES]):
                    async for entry in self._free_of(prefix, head, tried):
                        yield entry

    async def _lanes(self, base_model: BaseModelName) -> list[_Lane]:
        """The first lanes, and where there are more, some of those behind them: other ones each time."""
        prefix = self._keys.lanes(base_model)
        end = prefix_end(prefix)
        result = await self._store.scan(prefix, end, limit=_MAX_LANES, keys_only=True)
        markers = list(result.values)
        if result.more:
            start = max(self._places.get(prefix, b""), markers[-1].key + b"\0")
            result = await self._store.scan(start, end, limit=_MAX_LANES, keys_only=True)
            markers += result.values
            self._remember(prefix, result)
        return [_Lane(marker, *self._keys.parts(marker.key)[2:]) for marker in markers]

    async def _num_claims(self, base_model: BaseModelName) -> Counter[str]:
        """Claimed runs of the base model, by tenant. Reads all claims: there are as many as busy workers."""
        return Counter(
            self._keys.run_name(claim.key).tenant
            for claim in await read_claims(self._store, self._keys)
            if claim.value.decode().partition("/")[2] == base_model.base_model
        )

    async def _heads(self, lanes: Sequence[_Lane]) -> list[tuple[bytes, ScanResult]]:
        """The lanes' first entries, of the lane whose oldest run waits longest first; empty lanes are taken away."""
        prefixes = [self._keys.lane_entries(lane.marker.key) for lane in lanes]
        ranges = [(prefix, prefix_end(prefix)) for prefix in prefixes]
        results = await self._store.scan_each(ranges, limit=_NUM_HEADS)
        heads = []
        for lane, prefix, head in zip(lanes, prefixes, results, strict=True):
            if head.values:
                heads.append((prefix, head))
            else:
                marker = lane.marker
                self._places.pop(prefix, None)
                # An entry that came since was written together with the marker.
                await self._store.txn([Compare(marker.key, Field.MOD, marker.mod_revision)], [Delete(marker.key)])
        return sorted(heads, key=lambda head: head[1].values[0].key[len(head[0]) :])

    async def _free_of(self, prefix: bytes, head: ScanResult, tried: set[bytes]) -> AsyncGenerator[KeyValue, None]:
        """Entries of one lane whose lease is free; of a long one that is not, another stretch of it each time."""
        for entry in await self._free(head.values, tried):
            yield entry
        if not head.more:
            return
        start = max(self._places.pop(prefix, b""), head.values[-1].key + b"\0")
        for _ in range(_MAX_PAGES):
            page = await self._store.scan(start, prefix_end(prefix), limit=_PAGE)
            for entry in await self._free(page.values, tried):
                yield entry
            if not page.more:
                return
            start = page.values[-1].key + b"\0"
        self._places[prefix] = start

    async def _free(self, entries: Sequence[KeyValue], tried: set[bytes]) -> list[KeyValue]:
        """The entries whose lease is free; the first one for each lease that was not tried before."""
        first: dict[bytes, KeyValue] = {}
        for entry in entries:
            lease = self._keys.lease(Waiting.of(self._keys, entry).resource)
            if lease not in tried:
                first.setdefault(lease, entry)
        tried.update(first)
        leases = (await self._store.get(list(first))).values if first else ()
        return [entry for entry, lease in zip(first.values(), leases, strict=True) if lease is None]

    def _remember(self, prefix: bytes, result: ScanResult) -> None:
        if result.more:
            self._places[prefix] = result.values[-1].key + b"\0"
        else:
            self._places.pop(prefix, None)


async def read_claims(store: Store, keys: Keys) -> list[KeyValue]:
    """Every claim: a key that names the run, and ``{policy}/{base model}``."""
    return (await list_all(store, keys.family("claims"), _AsStored()))[0]


class _AsStored:
    """Leaves keys and values as they are."""

    def encode(self, record: KeyValue) -> bytes:
        return record.value

    def decode(self, kv: KeyValue) -> KeyValue:
        return kv
