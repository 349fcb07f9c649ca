"""Many new policies at a time: packed into few transactions, each with one entry in the audit trail.

The common case, names that were never used, needs no read of a name or of a request id: the transaction compares that
they are not there. Base models and blobs are read once for a batch; a blob's record is held by its value, so that
batches which share blobs do not conflict and garbage collection's condemnation does. Whatever does not go through at
the first try is created one by one, as CreatePolicy does it, which finds out why.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar

from mint_catalog.model.records import BaseModel, BlobRecord, now
from mint_catalog.model.tables import Ref, Tables
from mint_catalog.policies.creation import NewPolicy, Prepared, assemble, prepare
from mint_catalog.policies.heads import Policies
from mint_catalog.storage.erasing import not_erasing
from mint_catalog.storage.store import Compare, Field, KeyValue, Operation, Put, Store
from mint_catalog.trail.audit import RawChange, audit_put
from mint_core.errors import InvalidArgument, MintError
from mint_core.names import BaseModelName, BlobName, PolicyName

__all__ = ["MAX_ITEMS", "BulkCreation", "BulkResult", "worked_at_once"]

MAX_ITEMS: Final = 1000
_MAX_OPERATIONS: Final = 100
"""Of one transaction, its audit entry included; etcd takes 128, and as many compares."""
_MAX_COMPARES: Final = 120
_MAX_BYTES: Final = 512 * 1024
_MAX_KEYS: Final = 128
_IN_FLIGHT: Final = 4
"""Transactions and reads under way, over all batches: more would only keep other callers waiting."""
_AT_ONE_GO: Final = 50
"""Items looked at before others have their turn: a few milliseconds."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What became of a batch."""

    errors: list[MintError | None]
    """One for each item in order, None for one that was created."""

    catalog_revision: int
    """Revision of the catalog that contains all of the writes; 0 when nothing was written."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read for a batch."""

    base_models: Mapping[BaseModelName, BaseModel | None]
    blobs: Mapping[str, BlobRecord | None]
    """By digest."""
    blob_values: Mapping[str, KeyValue]


@dataclass(slots=True)
class _Item:
    """One policy as its part of a transaction."""

    index: int
    prepared: Prepared
    compares: list[Compare] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)
    changes: list[RawChange] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(slots=True)
class _Pack:
    """Items of one transaction."""

    items: list[_Item] = field(default_factory=list)
    compares: dict[bytes, Compare] = field(default_factory=dict)
    operations: dict[bytes, Operation] = field(default_factory=dict)
    num_bytes: int = 0

    def takes(self, item: _Item) -> bool:
        """Whether the item fits in; it may share what it holds with those inside."""
        return not self.items or (
            len(self.compares) + len(item.compares) < _MAX_COMPARES
            and len(self.operations) + len(item.puts) < _MAX_OPERATIONS
            and self.num_bytes + item.num_bytes <= _MAX_BYTES
        )

    def add(self, item: _Item) -> None:
        self.items.append(item)
        self.compares.update((compare.key, compare) for compare in item.compares)
        self.operations.update((put.key, put) for put in item.puts)
        self.num_bytes += item.num_bytes


class BulkCreation:
    """Creates batches of policies."""

    def __init__(self, store: Store, tables: Tables, policies: Policies) -> None:
        self._store = store
        self._tables = tables
        self._policies = policies
        self._turns = asyncio.Semaphore(_IN_FLIGHT)

    async def create(self, tenant: str, num_items: int, wanted: Iterable[NewPolicy | MintError]) -> BulkResult:
        """Create policies of one tenant; an item that could not be understood comes as its error.

        ``wanted`` is read bit by bit, so that a thousand items do not keep everybody else waiting.
        Not atomic: each item has its own outcome. One that failed with ``Unavailable`` may have been created.
        Raises ``InvalidArgument`` for no item or more than 1000.
        """
        if not 1 <= num_items <= MAX_ITEMS:
            raise InvalidArgument(f"requests has {num_items} items: send 1 to {MAX_ITEMS} at a time", field="requests")
        batch = _Batch(self._store, self._tables, self._policies, self._turns, tenant, num_items)
        await batch.run(wanted)
        return BulkResult(batch.errors, batch.catalog_revision)


class _Batch:
    """One batch under way."""

    def __init__(
        self,
        store: Store,
        tables: Tables,
        policies: Policies,
        turns: asyncio.Semaphore,
        tenant: str,
        num_items: int,
    ) -> None:
        self._store = store
        self._tables = tables
        self._policies = policies
        self._turns = turns
        self._tenant = tenant
        self._singly: list[tuple[int, Prepared]] = []
        self.errors: list[MintError | None] = [None] * num_items
        self.catalog_revision = 0

    async def run(self, wanted: Iterable[NewPolicy | MintError]) -> None:
        prepared = await self._prepare(wanted)
        try:
            known = await self._read(each for _, each in prepared)
        except MintError as error:
            for index, _ in prepared:
                self.errors[index] = error
            return
        await self._all_of(self._commit, self._packs(prepared, known))
        self._singly.sort(key=lambda each: each[0])
        # Items of one name in their order: the first one is the one that may succeed.
        by_name: dict[PolicyName, list[tuple[int, Prepared]]] = {}
        for index, each in self._singly:
            by_name.setdefault(each.name, []).append((index, each))
        await self._all_of(self._create_singly, by_name.values())

    async def _prepare(self, wanted: Iterable[NewPolicy | MintError]) -> list[tuple[int, Prepared]]:
        """The items that are right by themselves; a name that comes again has to wait for the first one's outcome."""
        prepared: list[tuple[int, Prepared]] = []
        names: set[PolicyName] = set()
        for index, item in enumerate(wanted):
            if index % _AT_ONE_GO == 0:
                await asyncio.sleep(0)
            if isinstance(item, MintError):
                self.errors[index] = item
                continue
            try:
                each = prepare(item)
            except MintError as error:
                self.errors[index] = error
                continue
            if each.name in names:
                self._singly.append((index, each))
            else:
                names.add(each.name)
                prepared.append((index, each))
        return prepared

    async def _read(self, prepared: Iterable[Prepared]) -> _Known:
        bases: dict[BaseModelName, Ref[BaseModel]] = {}
        blobs: dict[str, Ref[BlobRecord]] = {}
        for each in prepared:
            if each.base_model not in bases:
                bases[each.base_model] = self._tables.base_model(each.base_model)
            for digest in each.digests:
                if digest not in blobs:
                    blobs[digest] = self._tables.blob(BlobName(self._tenant, digest))
        refs: list[Ref[Any]] = [*bases.values(), *blobs.values()]
        values = await self._values([ref.key for ref in refs])

        def found(ref: Ref[R]) -> R | None:
            kv = values[ref.key]
            return None if kv is None else ref.codec.decode(kv)

        return _Known(
            {name: found(ref) for name, ref in bases.items()},
            {digest: found(ref) for digest, ref in blobs.items()},
            {digest: kv for digest, ref in blobs.items() if (kv := values[ref.key]) is not None},
        )

    async def _values(self, keys: Sequence[bytes]) -> dict[bytes, KeyValue | None]:
        chunks = [keys[first : first + _MAX_KEYS] for first in range(0, len(keys), _MAX_KEYS)]
        found: dict[bytes, KeyValue | None] = {}

        async def read(chunk: Sequence[bytes]) -> None:
            found.update(zip(chunk, (await self._store.get(chunk)).values, strict=True))

        await self._all_of(read, chunks)
        return found

    def _packs(self, prepared: list[tuple[int, Prepared]], known: _Known) -> Iterator[_Pack]:
        """The transactions; items over the same blob lie together, since a transaction holds a blob once."""
        time = now()
        pack = _Pack()
        for index, each in sorted(prepared, key=lambda item: item[1].digests):
            try:
                item = self._item(index, each, known, time)
            except MintError:
                self._singly.append((index, each))  # it may have been created by this very request before
                continue
            if not pack.takes(item):
                yield pack
                pack = _Pack()
            pack.add(item)
        if pack.items:
            yield pack

    def _item(self, index: int, prepared: Prepared, known: _Known, time: datetime) -> _Item:
        tables, keys = self._tables, self._tables.keys
        base = known.base_models[prepared.base_model]
        made = assemble(prepared, None, base, known.blobs, time)
        head_ref = tables.policy(prepared.name)
        head = Put(head_ref.key, head_ref.codec.encode(made.head))
        item = _Item(index, prepared, [Compare(head.key, Field.MOD, 0)])
        for digest in dict.fromkeys(prepared.digests):
            kv = known.blob_values[digest]
            item.compares.append(Compare(kv.key, Field.VALUE, value=kv.value))
            item.puts.append(Put(kv.key, kv.value))
        records = [head]
        records += [Put(keys.revision(each.name), tables.codecs.revision.encode(each)) for each in made.revisions]
        records += [Put(keys.alias(each.name), tables.codecs.alias.encode(each)) for each in made.aliases]
        item.puts += records
        item.changes += [(put.key, None, put.value) for put in records]
        if base is not None:
            base_key = keys.base_model(prepared.base_model)
            item.compares.append(Compare(base_key, Field.MOD, base.mod_revision))
        if prepared.request is not None:
            request_keys = prepared.request.keys(keys)
            item.compares += [Compare(key, Field.MOD, 0) for key in request_keys]
            item.puts.append(Put(request_keys[0], prepared.request.encode(head.key, head.value, 0)))
        item.num_bytes = sum(len(put.key) + 2 * len(put.value) for put in item.puts)
        return item

    async def _commit(self, pack: _Pack) -> None:
        request_ids = [item.prepared.request.request_id for item in pack.items if item.prepared.request is not None]
        audit = audit_put(
            self._tables.keys,
            self._tenant,
            changes=[change for item in pack.items for change in item.changes],
            request_id=request_ids[0] if len(pack.items) == len(request_ids) == 1 else "",
        )
        compares = [*pack.compares.values(), not_erasing(self._tables.keys, self._tenant)]
        try:
            result = await self._store.txn(compares, [*pack.operations.values(), audit])
        except MintError as error:
            for item in pack.items:
                self.errors[item.index] = error
            return
        if result.succeeded:
            self.catalog_revision = max(self.catalog_revision, result.revision)
        else:
            self._singly += [(item.index, item.prepared) for item in pack.items]

    async def _create_singly(self, items: Sequence[tuple[int, Prepared]]) -> None:
        for index, prepared in items:
            try:
                written = await self._policies.create_prepared(prepared)
            except MintError as error:
                self.errors[index] = error
            else:
                self.catalog_revision = max(self.catalog_revision, written.catalog_revision)

    async def _all_of(self, work: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
        """Do ``work`` on each, as turns come. The first error ends it."""
        waiting = iter(items)

        async def worker() -> None:
            more = True
            while more:
                async with self._turns:
                    item = next(waiting, None)  # made no earlier than its turn
                    more = item is not None
                    if item is not None:
                        await work(item)

        tasks = [asyncio.create_task(worker()) for _ in range(_IN_FLIGHT)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


async def worked_at_once(
    source: AsyncIterator[T], work: Callable[[T], Coroutine[Any, Any, R]], *, limit: int
) -> AsyncGenerator[R, None]:
    """What ``work`` makes of each item, as it gets ready; no more than ``limit`` are read ahead of the answers."""
    running: set[asyncio.Task[R]] = set()
    reading: asyncio.Task[T] | None = None
    more = True
    try:
        while more or running:
            if more and reading is None and len(running) < limit:
                reading = asyncio.ensure_future(anext(source))
            await asyncio.wait({*running, *([reading] if reading else [])}, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                try:
                    running.add(asyncio.create_task(work(reading.result())))
                except StopAsyncIteration:
                    more = False
                reading = None
            for task in [task for task in running if task.done()]:
                running.discard(task)
                yield task.result()
    finally:
        left = [*running, *([reading] if reading else [])]
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
