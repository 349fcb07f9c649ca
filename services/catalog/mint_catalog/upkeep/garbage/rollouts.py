"""Rollout batches past their expiry: the object first and the pointer after it, as whoever trains does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mint_catalog.storage.store import Delete, KeyValue
from mint_catalog.upkeep.garbage.work import Work

__all__ = ["delete_expired_rollouts", "delete_rollouts"]

_MARGIN_S: Final = 3600.0
"""For clocks that differ, and for a run that has just read the pointer."""


async def delete_expired_rollouts(work: Work) -> None:
    """Delete what its pointer says is no longer kept; a run that still wants such a batch samples it again."""
    codec = work.tables.codecs.rollout
    async for page in work.walk(work.keys.family("rollouts")):
        await delete_rollouts(work, [kv for kv in page if work.older_than(codec.decode(kv).expire_time, _MARGIN_S)])


async def delete_rollouts(work: Work, pointers: Sequence[KeyValue]) -> None:
    """Delete batches with their objects. A pointer is written once, so what it names is its own."""

    async def one(kv: KeyValue) -> None:
        rollout = work.tables.codecs.rollout.decode(kv)
        if not work.dry_run:
            await work.objects.delete(rollout.object_key)
            await work.commit([work.unchanged(kv)], [Delete(kv.key)])
        work.report.num_rollouts_deleted += 1
        work.report.example(rollout.name)

    await work.each(pointers, one)
