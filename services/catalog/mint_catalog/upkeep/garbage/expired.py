"""What is kept for a set time and lies in ranges: request ids, audit entries, usage counts."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mint_catalog.trail.retention import Expired, expired_audit_entries, expired_request_ids, expired_usage
from mint_catalog.upkeep.garbage.work import Work

__all__ = ["delete_expired"]


async def delete_expired(work: Work) -> None:
    """Delete ranges of keys whose time is over."""
    store, keys, report = work.store, work.keys, work.report
    report.num_request_ids_deleted += await _delete(work, expired_request_ids(store, keys))
    report.num_audit_entries_deleted += await _delete(work, expired_audit_entries(store, keys, work.grace.audit_s))
    report.num_usage_counts_deleted += await _delete(work, expired_usage(store, keys, work.grace.usage_s))


async def _delete(work: Work, ranges: AsyncIterator[Expired]) -> int:
    num_keys = 0
    async for expired in ranges:
        if not work.dry_run:
            await work.commit([], expired.operations)
        num_keys += expired.num_keys
    return num_keys
