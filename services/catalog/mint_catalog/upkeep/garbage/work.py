"""One garbage collection under way: what its steps share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeVar

from mint_blobs import ObjectStore
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import now
from mint_catalog.model.tables import RecordCodec, Tables
from mint_catalog.storage.draft import Answer, Draft, Transactions
from mint_catalog.storage.duty import Duty
from mint_catalog.storage.store import Compare, Field, KeyValue, Operation, Store, prefix_end
from mint_catalog.storage.walk import clear, walk
from mint_catalog.upkeep.garbage.report import Report

__all__ = ["PAGE", "Grace", "Work", "in_batches"]

T = TypeVar("T")
R = TypeVar("R")

PAGE: Final = 250
"""Records decoded at one go: about ten milliseconds during which the catalog answers nobody."""

_MAX_CONCURRENT: Final = 8


@dataclass(frozen=True, slots=True)
class Grace:
    """How long what nothing refers to is kept."""

    unreferenced_s: float = 30 * 86_400.0
    """Blobs, unfinished uploads and objects that no record names: longer than the oldest backup is old, or else a
    restored catalog names blobs that are gone."""
    condemned_s: float = 3600.0
    """Between the condemnation of a blob and its deletion, for readers that resolved it before."""
    undelete_s: float = 7 * 86_400.0
    """Policies that were deleted."""
    audit_s: float = 90 * 86_400.0
    """Audit entries."""
    usage_s: float = 400 * 86_400.0
    """Usage counts."""


class Work:
    """A collection: where it looks, what it may do, what it has done."""

    def __init__(
        self,
        store: Store,
        tables: Tables,
        objects: ObjectStore | None,
        grace: Grace,
        duty: Duty,
        *,
        dry_run: bool,
        chunk: int,
    ) -> None:
        self.store = store
        self.tables = tables
        self.grace = grace
        self.duty = duty
        self.dry_run = dry_run
        self.chunk = chunk
        """Candidates held in memory at one time."""
        self.report = Report()
        self.started_at = now()
        self._objects = objects
        self._transactions = Transactions(store, tables.keys)

    @property
    def keys(self) -> Keys:
        return self.tables.keys

    @property
    def objects(self) -> ObjectStore:
        """The object store, of a collection that has one."""
        if self._objects is None:
            raise TypeError("a step that needs an object store was run without one")
        return self._objects

    def older_than(self, time: datetime | None, grace_s: float) -> bool:
        """Whether ``time`` lies more than a grace period before the start of the collection; None does not."""
        return time is not None and time < self.started_at - timedelta(seconds=grace_s)

    async def check_duty(self) -> None:
        """Raise ``LeaseLost`` if the duty was superseded: before objects are deleted, for which nothing is compared."""
        kv = (await self.store.get([self.duty.key])).values[0]
        if kv is None or kv.create_revision != self.duty.token:
            raise self.duty.lost()

    async def commit(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> bool:
        """Apply a transaction under the duty's fence; False if one of ``compares`` does not hold.

        Raises ``LeaseLost`` when the duty was superseded.
        """
        if (await self.store.txn([self.duty.compare, *compares], operations)).succeeded:
            return True
        await self.check_duty()
        return False

    async def transact(self, body: Callable[[Draft], Awaitable[Answer[R]]], codec: RecordCodec[R]) -> None:
        """Run a draft under the duty's fence, with its entry in the audit trail. Raises ``LeaseLost``."""
        duty_ref = self.tables.raw(self.duty.key)

        async def fenced(draft: Draft) -> Answer[R]:
            await draft.fetch(duty_ref)
            if draft.create_revision(duty_ref) != self.duty.token:
                raise self.duty.lost()
            draft.require_created(duty_ref, self.duty.token)
            return await body(draft)

        await self._transactions.run_delete(fenced, codec)

    def walk(self, prefix: bytes, *, keys_only: bool = False) -> AsyncGenerator[tuple[KeyValue, ...], None]:
        """Everything below ``prefix``, a page at a time, each as it is then."""
        return walk(self.store, prefix, prefix_end(prefix), limit=PAGE, keys_only=keys_only)

    async def delete_below(self, prefix: bytes) -> None:
        """Delete all keys below ``prefix``, which nobody writes any more."""
        if not self.dry_run and not await clear(self.store, prefix, prefix_end(prefix), compares=[self.duty.compare]):
            raise self.duty.lost()

    async def each(self, items: Iterable[T], job: Callable[[T], Awaitable[None]]) -> None:
        """Do a job for each item, a few at one time; the first error ends it."""
        slots = asyncio.Semaphore(_MAX_CONCURRENT)

        async def one(item: T) -> None:
            async with slots:
                await job(item)

        # gather, and not a TaskGroup, because callers know single errors; what is under way then is only idempotent.
        tasks = [asyncio.ensure_future(one(item)) for item in items]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def unchanged(kv: KeyValue) -> Compare:
        """Holds as long as nobody wrote the key since it was read."""
        return Compare(kv.key, Field.MOD, kv.mod_revision)


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """``items`` in stretches of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]
