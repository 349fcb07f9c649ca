"""Usage counters: what inference processes report, and its sums.

A report is cumulative for its reporter, policy and day, and lies under a key of its own. So it is put blindly, sending
it again changes nothing, and reporters never wait for each other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from mint_catalog.model.checks import check_holder, check_range, live_policy
from mint_catalog.model.keys import NUM_SHARDS, Keys
from mint_catalog.model.tables import Tables
from mint_catalog.storage.erasing import not_erasing
from mint_catalog.storage.paging import scan_family
from mint_catalog.storage.store import Put, Store, prefix_end
from mint_core.clock import wall_s
from mint_core.errors import InvalidArgument
from mint_core.names import PolicyName, TenantName

__all__ = ["Usage", "UsageCount", "UsageQuery", "Usages"]

_VALUE: Final = struct.Struct(">BQQQ")
_VERSION: Final = 1
_MAX_COUNTS: Final = 1000
_MAX_COUNT: Final = 2**62
_BATCH: Final = 100
_SCAN: Final = 1000
_DAY_S: Final = 86_400
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class UsageCount:
    """What one process served of one policy on one day."""

    policy: str = ""
    day: datetime | None = None
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What to add up."""

    resource: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used of a tenant or a policy."""

    resource: str
    start_time: datetime
    end_time: datetime
    num_requests: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_policies: int
    num_revisions: int


def _day_of(time: datetime) -> int:
    return (time - _EPOCH).days


def _parse_resource(resource: str) -> PolicyName | TenantName:
    if "/policies/" in resource:
        return PolicyName.parse(resource, field="resource")
    return TenantName.parse(resource, field="resource")


def _midnight(day: int) -> datetime:
    return _EPOCH + timedelta(days=day)


class _Sum:
    """Counters of the days ``[first, end)``."""

    def __init__(self, keys: Keys, first: int, end: int) -> None:
        self._keys = keys
        self._first, self._end = first, end
        self.oldest = end
        self.counts = (0, 0, 0)

    def add(self, key: bytes, value: bytes) -> None:
        day = self._keys.usage_day(key)
        if self._first <= day < self._end:
            _, *counts = _VALUE.unpack(value)
            self.oldest = min(self.oldest, day)
            self.counts = (self.counts[0] + counts[0], self.counts[1] + counts[1], self.counts[2] + counts[2])


class Usages:
    """Keeps reports and adds them up."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._keys = tables.keys

    async def report(self, reporter: str, counts: Sequence[UsageCount]) -> None:
        """Keep the counts of one reporter; the newest replace older ones. Raises ``InvalidArgument``.

        Counts of a tenant that is being erased are dropped.
        """
        check_holder(reporter, field="reporter")
        if "/" in reporter:
            raise InvalidArgument(f"reporter is {reporter!r}: it must not contain '/'", field="reporter")
        if len(counts) > _MAX_COUNTS:
            raise InvalidArgument(
                f"counts has {len(counts)} entries: at most {_MAX_COUNTS} in one report, send more reports",
                field="counts",
            )
        puts: dict[bytes, Put] = {}
        for index, count in enumerate(counts):
            put = self._put(reporter, count, field=f"counts[{index}]")
            puts[put.key] = put
        left = list(puts.values())
        while left:
            left = await self._keep(left[:_BATCH]) + left[_BATCH:]

    async def _keep(self, puts: list[Put]) -> list[Put]:
        """Returns those to try again: all, but for tenants under erasure, whose counts are dropped."""
        tenants = sorted({self._keys.parts(put.key)[1] for put in puts})
        if (await self._store.txn([not_erasing(self._keys, tenant) for tenant in tenants], puts)).succeeded:
            return []
        marks = (await self._store.get([self._keys.erasing(tenant) for tenant in tenants])).values
        erased = {tenant for tenant, mark in zip(tenants, marks, strict=True) if mark is not None}
        return [put for put in puts if self._keys.parts(put.key)[1] not in erased]

    def _put(self, reporter: str, count: UsageCount, *, field: str) -> Put:
        numbers = (count.num_requests, count.num_prompt_tokens, count.num_generated_tokens)
        for name, number in zip(("num_requests", "num_prompt_tokens", "num_generated_tokens"), numbers, strict=True):
            check_range(number, field=f"{field}.{name}", least=0, most=_MAX_COUNT)
        if count.day is None or _midnight(_day_of(count.day)) != count.day or count.day < _EPOCH:
            raise InvalidArgument(f"{field}.day is {count.day}: expected midnight UTC of a day", field=f"{field}.day")
        policy = PolicyName.parse(count.policy, field=f"{field}.policy")
        key = self._keys.usage_count(policy, _day_of(count.day), reporter)
        return Put(key, _VALUE.pack(_VERSION, *numbers))

    async def get(self, query: UsageQuery) -> Usage:
        """The usage of the days from the one of ``start_time`` until before the one of ``end_time``.

        Without them from the oldest day kept until today. A tenant's is added up over all of its policies, and its
        records are counted as they lie: tombstones of deleted policies and revisions are among them. Raises
        ``InvalidArgument``, ``NotFound``.
        """
        resource, start_time = _parse_resource(query.resource), query.start_time
        today = int(wall_s() // _DAY_S)
        first = _day_of(start_time) if start_time else 0
        end = _day_of(query.end_time) if query.end_time else max(today, first) + 1
        if end < first:
            raise InvalidArgument(f"end_time is {query.end_time}: it must not be before start_time", field="end_time")
        total = _Sum(self._keys, first, end)
        if isinstance(resource, PolicyName):
            num_policies, num_revisions = 1, await self._read_policy(resource, total)
        else:
            num_policies, num_revisions = await self._read_tenant(resource.tenant, total)
        return Usage(
            str(resource), _midnight(first if start_time else total.oldest), _midnight(end), *total.counts,
            num_policies=num_policies, num_revisions=num_revisions,
        )  # fmt: skip

    async def _read_policy(self, name: PolicyName, total: _Sum) -> int:
        ref = self._tables.policy(name)
        result = await self._store.get([ref.key])
        kv, revision = result.values[0], result.revision
        live_policy(ref.codec.decode(kv) if kv else None, name)
        prefix = self._keys.usage(name)
        start, end = prefix, prefix_end(prefix)
        more = True
        while more:
            found = await self._store.scan(start, end, limit=_SCAN, revision=revision)
            more = found.more
            for each in found.values:
                total.add(each.key, each.value)
                start = each.key + b"\0"
        revisions = self._keys.revisions(name)
        return await self._store.count(revisions, prefix_end(revisions), revision=revision)

    async def _read_tenant(self, tenant: str, total: _Sum) -> tuple[int, int]:
        revision = (await self._store.get([self._keys.tick])).revision
        async for stretch in scan_family(self._store, self._keys, "usage", tenant=tenant, revision=revision):
            for kv in stretch.values:
                total.add(kv.key, kv.value)
        return (
            await self._count("policies", tenant, revision=revision),
            await self._count("revisions", tenant, revision=revision),
        )

    async def _count(self, family: str, tenant: str, *, revision: int) -> int:
        """Keys of a family; a quarter of the shards at a time, since etcd answers nobody else while it counts."""
        prefix = self._keys.family(family, tenant)
        num_keys, step = 0, NUM_SHARDS // 4
        for shard in range(0, NUM_SHARDS, step):
            start = prefix + f"{shard:02x}".encode()
            stop = shard + step
            end = prefix_end(prefix) if stop >= NUM_SHARDS else prefix + f"{stop:02x}".encode()
            num_keys += await self._store.count(start, end, revision=revision)
        return num_keys
