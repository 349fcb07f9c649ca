"""Garbage collections: one at a time over all catalogs, on a timer and on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from mint_blobs import ObjectStore
from mint_catalog.model.tables import Tables
from mint_catalog.storage.duty import Duties, Duty
from mint_catalog.storage.store import Store
from mint_catalog.upkeep.garbage.blobs import collect_blobs
from mint_catalog.upkeep.garbage.expired import delete_expired
from mint_catalog.upkeep.garbage.objects import delete_unnamed_objects
from mint_catalog.upkeep.garbage.policies import purge_policies
from mint_catalog.upkeep.garbage.report import Progress, Report
from mint_catalog.upkeep.garbage.rollouts import delete_expired_rollouts
from mint_catalog.upkeep.garbage.work import Grace, Work
from mint_core.errors import FailedPrecondition, WrongState
from mint_core.log import get_logger

__all__ = ["DUTY", "GarbageCollector"]

DUTY: Final = "gc"
_DEFAULT_CHUNK: Final = 100_000
_logger = get_logger(__name__)

_Step = Callable[[Work], Awaitable[None]]
_RECORDS: Final[tuple[tuple[str, _Step], ...]] = (
    ("deleting request ids, audit entries and usage counts past their time", delete_expired),
)
_ALL: Final[tuple[tuple[str, _Step], ...]] = (
    *_RECORDS,
    ("deleting rollout batches past their expiry", delete_expired_rollouts),
    ("purging policies past their undelete grace period", purge_policies),
    ("looking for blobs that nothing refers to", collect_blobs),
    ("looking for objects that no record names", delete_unnamed_objects),
)


class GarbageCollector:
    """Collects garbage. Without an object store only what has none: request ids, audit entries, usage counts."""

    def __init__(
        self,
        store: Store,
        tables: Tables,
        objects: ObjectStore | None,
        duties: Duties,
        grace: Grace,
        *,
        chunk: int = _DEFAULT_CHUNK,
    ) -> None:
        self._store = store
        self._tables = tables
        self._objects = objects
        self._duties = duties
        self._grace = grace
        self._chunk = chunk

    async def collect(self, *, dry_run: bool) -> AsyncGenerator[Progress, None]:
        """Collect now, and tell of each step before it begins and at the end.

        Raises ``FailedPrecondition`` (no object store), ``LeaseHeld`` (another collection is under way),
        ``LeaseLost``, ``WrongState`` (a backup is being restored), ``Unavailable``.
        """
        if self._objects is None:
            raise FailedPrecondition(
                "this catalog knows no object store, so it cannot collect garbage; set catalog.object_store"
            )
        told: asyncio.Queue[Progress | None] = asyncio.Queue()

        async def work() -> None:
            try:
                async with self._duties.hold(DUTY) as duty:
                    await self._collect(duty, dry_run, told.put_nowait)
            finally:
                told.put_nowait(None)

        # In a task of its own, which the duty may cancel; this one belongs to the caller.
        task = asyncio.create_task(work(), name="garbage collection")
        try:
            while (progress := await told.get()) is not None:
                yield progress
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(self, duty: Duty) -> None:
        """Collect under a duty that is held, and log the outcome."""

        last = Report()

        def note(progress: Progress) -> None:
            nonlocal last
            last = progress.report

        try:
            await self._collect(duty, False, note)
        finally:
            counts = {name: getattr(last, name) for name in Report.__dataclass_fields__ if name != "examples"}
            _logger.info(
                "garbage collected", extra={"fields": {name: count for name, count in counts.items() if count}}
            )

    async def _collect(self, duty: Duty, dry_run: bool, tell: Callable[[Progress], None]) -> None:
        if (await self._store.get([self._tables.keys.restoring])).values[0] is not None:
            raise WrongState("a backup is being restored; collect garbage when that is done")
        work = Work(self._store, self._tables, self._objects, self._grace, duty, dry_run=dry_run, chunk=self._chunk)
        for name, step in _ALL if self._objects is not None else _RECORDS:
            tell(Progress(name, work.report.copy()))
            await step(work)
        tell(Progress("done", work.report.copy()))
