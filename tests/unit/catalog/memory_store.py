"""The key-value contract in memory, with a clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from mint_catalog.storage.store import (
    Change,
    Compare,
    Delete,
    DeleteRange,
    Field,
    KeyValue,
    LeaseGone,
    Operation,
    Put,
    ReadResult,
    Revision,
    ScanResult,
    TxnResult,
)
from mint_core.errors import OutOfRange, RevisionCompacted, Unavailable

__all__ = ["MemoryStore"]


@dataclass
class _Lease:
    ttl_s: int
    ends_at: float


class MemoryStore:
    """History is kept whole, one list of versions a key; a version without value is a deletion."""

    def __init__(self) -> None:
        self.revision = 1
        self.time_s = 0.0
        self.num_txns = 0
        """Transactions applied."""
        self.num_tried_txns = 0
        self.fail_next_txn: str = ""
        """"before" or "after": raise Unavailable before or after applying the next transaction."""
        self._compacted = 0
        self._versions: dict[bytes, list[tuple[int, KeyValue | None]]] = {}
        self._log: list[Revision] = []
        self._leases: dict[int, _Lease] = {}
        self._lease_ids = itertools.count(1000)
        self._changed = asyncio.Event()

    def _at(self, key: bytes, revision: int) -> KeyValue | None:
        versions = self._versions.get(key, [])
        index = bisect_right(versions, revision, key=lambda version: version[0])
        return versions[index - 1][1] if index else None

    def _check(self, revision: int) -> int:
        if revision > self.revision:
            raise OutOfRange("the catalog revision asked for lies in the future; list again")
        if 0 < revision < self._compacted:
            raise RevisionCompacted("the catalog revision asked for was compacted away; list again")
        return revision or self.revision

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        await asyncio.sleep(0)
        at = self._check(revision)
        return ReadResult(tuple(self._at(key, at) for key in keys), self.revision)

    @property
    def seen_revision(self) -> int:
        return self.revision

    async def get_nearby(self, keys: Sequence[bytes]) -> ReadResult:
        return await self.get(keys)

    def _range(self, start: bytes, end: bytes, revision: int) -> list[KeyValue]:
        found = [self._at(key, revision) for key in sorted(self._versions) if start <= key < end]
        return [kv for kv in found if kv is not None]

    async def scan(
        self, start: bytes, end: bytes, *, limit: int, revision: int = 0, keys_only: bool = False
    ) -> ScanResult:
        await asyncio.sleep(0)
        values = self._range(start, end, self._check(revision))
        shown = [replace(kv, value=b"") for kv in values[:limit]] if keys_only else values[:limit]
        return ScanResult(tuple(shown), len(values) > limit, self.revision)

    async def scan_each(
        self, ranges: Sequence[tuple[bytes, bytes]], *, limit: int, revision: int = 0
    ) -> list[ScanResult]:
        await asyncio.sleep(0)
        assert len(ranges) <= 128
        at = self._check(revision)
        found = [self._range(start, end, at) for start, end in ranges]
        return [ScanResult(tuple(values[:limit]), len(values) > limit, self.revision) for values in found]

    async def count(self, start: bytes, end: bytes, *, revision: int = 0) -> int:
        await asyncio.sleep(0)
        return len(self._range(start, end, self._check(revision)))

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        await asyncio.sleep(0)
        assert max(len(compares), len(operations)) <= 128
        keys = [operation.key for operation in operations if not isinstance(operation, DeleteRange)]
        assert len(keys) == len(set(keys)), "a key is written once"
        fault, self.fail_next_txn = self.fail_next_txn, ""
        if fault == "before":
            raise Unavailable("etcd did not answer a transaction, which may have been applied; retry")
        for operation in operations:
            if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                raise LeaseGone("requested lease not found")
        self.num_tried_txns += 1
        succeeded = all(self._holds(compare) for compare in compares)
        if succeeded:
            self.num_txns += 1
            self._apply(operations)
        if fault == "after":
            raise Unavailable("etcd did not answer a transaction, which may have been applied; retry")
        return TxnResult(succeeded, self.revision)

    def _holds(self, compare: Compare) -> bool:
        kv = self._at(compare.key, self.revision)
        if compare.field is Field.VALUE:
            return kv is not None and kv.value == compare.value
        actual = 0 if kv is None else (kv.create_revision if compare.field is Field.CREATE else kv.mod_revision)
        return actual == compare.revision

    def _apply(self, operations: Sequence[Operation]) -> None:
        number, changes = self.revision + 1, []
        single: list[Put | Delete] = []
        for operation in operations:
            if isinstance(operation, DeleteRange):
                single += [Delete(kv.key) for kv in self._range(operation.start, operation.end, self.revision)]
            else:
                single.append(operation)
        for operation in single:
            known = self._at(operation.key, self.revision)
            match operation:
                case Put(key, value, lease):
                    created = known.create_revision if known else number
                    kv = KeyValue(key, value, created, number, lease)
                    self._versions.setdefault(key, []).append((number, kv))
                    changes.append(Change(key, value, created, number))
                case Delete(key):
                    if known is None:
                        continue
                    self._versions[key].append((number, None))
                    changes.append(Change(key, b"", 0, number, deleted=True))
        if changes:
            self.revision = number
            self._log.append(Revision(number, tuple(changes)))
            self._changed.set()
            self._changed = asyncio.Event()

    async def grant(self, ttl_s: int) -> int:
        lease = next(self._lease_ids)
        self._leases[lease] = _Lease(ttl_s, self.time_s + ttl_s)
        return lease

    async def keep_alive(self, lease: int) -> bool:
        await asyncio.sleep(0)
        known = self._leases.get(lease)
        if known is not None:
            known.ends_at = self.time_s + known.ttl_s
        return known is not None

    async def revoke(self, lease: int) -> None:
        await asyncio.sleep(0)
        if self._leases.pop(lease, None) is not None:
            current = {key: self._at(key, self.revision) for key in self._versions}
            self._apply([Delete(key) for key, kv in current.items() if kv is not None and kv.lease == lease])

    async def pass_time(self, seconds: float) -> None:
        """Move the clock; leases that have run out end."""
        self.time_s += seconds
        for lease in [lease for lease, known in self._leases.items() if known.ends_at <= self.time_s]:
            await self.revoke(lease)

    async def compact(self, revision: int) -> None:
        self._compacted = max(self._compacted, revision)

    async def watch(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
        if after + 1 < self._compacted:
            raise RevisionCompacted(f"catalog revision {after + 1} was compacted away; list again")
        while True:
            changed = self._changed
            for revision in [each for each in self._log if each.revision > after]:
                after = revision.revision
                changes = tuple(change for change in revision.changes if start <= change.key < end)
                if changes:
                    yield Revision(revision.revision, changes)
            if self.revision <= after or not any(each.revision > after for each in self._log):
                await changed.wait()
