"""What is past its time: audit entries, request ids and usage counts that garbage collection deletes.

Each function yields deletions that fit into one transaction, and looks up the next one when its caller asks for it.
Times are wall clocks of catalogs that may differ, so everything is kept a day longer than was asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.keys import Keys
from mint_catalog.storage.paging import scan_family, tenants_of
from mint_catalog.storage.requests import bucket_at
from mint_catalog.storage.store import Delete, DeleteRange, Operation, Store, prefix_end
from mint_core.clock import wall_s

__all__ = ["Expired", "expired_audit_entries", "expired_request_ids", "expired_usage"]

_DAY_S: Final = 86_400
_CHUNK: Final = 1000
_BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class Expired:
    """Some keys past their time."""

    operations: tuple[Operation, ...]
    """Delete exactly them."""

    num_keys: int


async def expired_audit_entries(store: Store, keys: Keys, keep_s: float) -> AsyncIterator[Expired]:
    """Audit entries that were written more than ``keep_s`` ago, tenant by tenant. Raises ``Unavailable``."""
    time_us = int((wall_s() - keep_s - _DAY_S) * 1e6)
    async for tenant in tenants_of(store, keys, "audit"):
        start, end = keys.audit_before(tenant, time_us), prefix_end(keys.family("audit", tenant))
        async for expired in _ranges(store, start, end):
            yield expired


async def expired_request_ids(store: Store, keys: Keys) -> AsyncIterator[Expired]:
    """Request ids that no catalog looks up any more. Raises ``Unavailable``."""
    # A catalog looks up the day before its own; one whose clock is a day behind, the day before that.
    first_kept = bucket_at(wall_s()) - 2
    async for expired in _ranges(store, keys.family("requests"), keys.requests_from(first_kept)):
        yield expired


async def expired_usage(store: Store, keys: Keys, keep_s: float) -> AsyncIterator[Expired]:
    """Counts of days that ended more than ``keep_s`` ago.

    They lie scattered below their policies, so all counts' keys are looked at. Raises ``RevisionCompacted``,
    ``Unavailable``.
    """
    first_kept = int((wall_s() - keep_s) // _DAY_S) - 1
    batch: list[Operation] = []
    async for stretch in scan_family(store, keys, "usage", keys_only=True):
        for kv in stretch.values:
            if keys.usage_day(kv.key) < first_kept:
                batch.append(Delete(kv.key))
            if len(batch) == _BATCH:
                yield Expired(tuple(batch), _BATCH)
                batch = []
    if batch:
        yield Expired(tuple(batch), len(batch))


async def _ranges(store: Store, start: bytes, end: bytes) -> AsyncIterator[Expired]:
    """A range in pieces of at most 1000 keys: etcd answers nobody else while it deletes one."""
    more = start < end
    while more:
        found = await store.scan(start, end, limit=_CHUNK, keys_only=True)
        more = found.more
        if found.values:
            after = found.values[-1].key + b"\0"
            yield Expired((DeleteRange(start, after),), len(found.values))
            start = after
