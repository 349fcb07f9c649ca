"""Optimistic transactions: read, decide, write if nothing that was read has changed; else decide again.

::

    async def body(draft: Draft) -> Answer[Policy]:
        await draft.fetch(tables.policy(name))
        head = draft.get(tables.policy(name))
        ...
        return draft.put(tables.policy(name), replace(head, owner="ada"))

    written = await Transactions(store, keys).run(body, codec, request)

Everything fetched is compared when the draft is committed, so a body may decide on it as if it were alone. A body
runs again after a conflict and must have no other effect.

Where :class:`mint_catalog.storage.recent.Recent` is given, the first draft takes from there what it can and reads
nothing: a guess. Only one outcome of a guess counts, that its transaction went through: then all that was decided on
was so at that very moment, as it would have been after a read. Whatever else comes of it (an error, nothing to write, a
compare that does not hold) is forgotten, and the next draft reads. A body that looks at more than it fetches, because
some fetched record changes with it, may go on doing so: that record was known before the body began and is compared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from mint_catalog.model.keys import Keys
from mint_catalog.model.tables import RecordCodec, Ref
from mint_catalog.storage.erasing import check_erasing, not_erasing
from mint_catalog.storage.recent import Recent
from mint_catalog.storage.requests import Request, StoredAnswer
from mint_catalog.storage.store import Compare, Delete, DeleteRange, Field, KeyValue, Operation, Put, Store, TxnResult
from mint_catalog.trail.audit import RawChange, audit_put, audited, is_state_change
from mint_core.errors import Aborted, MintError

__all__ = ["Answer", "Draft", "Transactions", "Written"]

R = TypeVar("R")

_MAX_ATTEMPTS: Final = 40
_FIRST_BACKOFF_S: Final = 0.001
_LAST_BACKOFF_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """What a body decided on: a record and its place, or no record where one was deleted."""

    ref: Ref[R]
    record: R | None


@dataclass(frozen=True, slots=True)
class Written(Generic[R]):
    """A record as stored, and the catalog revision that contains it."""

    record: R
    catalog_revision: int


class _Replayed(Exception):
    def __init__(self, stored: StoredAnswer) -> None:
        super().__init__("the request id was answered before")
        self.stored = stored


class Draft:
    """One attempt at a transaction."""

    def __init__(
        self, store: Store, keys: Keys, request: Request | None, recent: Recent | None = None, *, may_guess: bool = True
    ) -> None:
        self._store = store
        self._keys = keys
        self._request = request
        self._recent = recent
        self._may_guess = may_guess
        self.is_guess = False
        """Whether some of what was fetched was not read, but known from before."""
        self._request_keys = request.keys(keys) if request else []
        self._seen: dict[bytes, KeyValue | None] = {}
        self._decoded: dict[bytes, Any] = {}
        self._written: dict[bytes, Any] = {}
        self._compares: dict[bytes, Compare] = {}
        self._operations: dict[bytes, Operation] = {}
        self.revision = 0
        """Revision of the store at the last read."""
        self.reason = ""
        """Why, in the caller's words; kept in the audit trail."""

    async def fetch(self, *refs: Ref[Any], compare: bool = True) -> None:
        """Read records at one revision; they are compared on commit unless ``compare`` is off.

        What this draft has read already is not read again. A guess takes what will be compared from what is known.
        """
        keys = [ref.key for ref in refs if ref.key not in self._seen]
        new_request_keys = [key for key in self._request_keys if key not in self._compares]
        if compare and keys and self._guess(keys):
            # That a request id is new is a guess like any other: the transaction compares it.
            self._compares.update((key, Compare(key, Field.MOD, 0)) for key in new_request_keys)
        elif keys or new_request_keys:
            result = await self._store.get([*keys, *new_request_keys])
            self.revision = result.revision
            read = list(zip(keys, result.values, strict=False))
            self._seen.update(read)
            if self._recent is not None:
                self._recent.note(read, result.revision)
            for key, kv in zip(new_request_keys, result.values[len(keys) :], strict=True):
                self._compares[key] = Compare(key, Field.MOD, 0)
                if kv is not None and self._request is not None:
                    raise _Replayed(self._request.decode(kv))
        if compare:
            for ref in refs:
                kv = self._seen[ref.key]
                self._compares.setdefault(ref.key, Compare(ref.key, Field.MOD, kv.mod_revision if kv else 0))

    def _guess(self, keys: Sequence[bytes]) -> bool:
        known = self._recent.recall(keys) if self._recent is not None and self._may_guess else None
        if known is None:
            return False
        self._seen.update(zip(keys, known, strict=True))
        self.is_guess = True
        return True

    def get(self, ref: Ref[R]) -> R | None:
        """A record that was fetched, None when it is absent."""
        kv = self._seen[ref.key]
        if kv is None:
            return None
        if ref.key not in self._decoded:
            self._decoded[ref.key] = ref.codec.decode(kv)
        record: R = self._decoded[ref.key]
        return record

    def create_revision(self, ref: Ref[Any]) -> int:
        """Revision at which a fetched record was created, 0 when it is absent."""
        kv = self._seen[ref.key]
        return kv.create_revision if kv else 0

    def require_created(self, ref: Ref[Any], create_revision: int) -> None:
        """Commit only if the key was created at exactly this revision; later changes of its value do not matter."""
        self._compares[ref.key] = Compare(ref.key, Field.CREATE, create_revision)

    def put(self, ref: Ref[R], record: R, *, lease: int = 0) -> Answer[R]:
        """Write a record on commit."""
        self._operations[ref.key] = Put(ref.key, ref.codec.encode(record), lease)
        self._written[ref.key] = record
        return Answer(ref, record)

    def put_bytes(self, key: bytes, value: bytes, *, lease: int = 0) -> None:
        """Write a key that holds no record."""
        self._operations[key] = Put(key, value, lease)

    def touch(self, ref: Ref[Any]) -> None:
        """Write a fetched record again as it is, so that its revision moves and rivals conflict."""
        kv = self._seen[ref.key]
        if kv is not None:
            self._operations.setdefault(ref.key, Put(kv.key, kv.value, kv.lease))

    def hold(self, ref: Ref[Any]) -> None:
        """Commit only if a fetched record still has its value, and write it again as it is.

        Rivals that change or delete it conflict with this draft; those that hold it too do not.
        """
        kv = self._seen[ref.key]
        if kv is not None:
            self._compares[ref.key] = Compare(ref.key, Field.VALUE, value=kv.value)
            self._operations.setdefault(ref.key, Put(kv.key, kv.value, kv.lease))

    def delete(self, ref: Ref[R]) -> Answer[R]:
        """Delete a record on commit."""
        self._operations[ref.key] = Delete(ref.key)
        return Answer(ref, None)

    def delete_key(self, key: bytes) -> None:
        """Delete a key that holds no record."""
        self._operations[key] = Delete(key)

    def writes(self, ref: Ref[Any]) -> bool:
        """Whether the record is written by this draft."""
        return ref.key in self._operations

    @property
    def num_writes(self) -> int:
        """Keys written so far."""
        return len(self._operations)

    async def commit(self, answer: Answer[Any]) -> TxnResult:
        """Try to apply the draft, and with it what it leaves in the audit trail."""
        await self._audit()
        if self._request is not None:
            own = 0 if self.writes(answer.ref) else getattr(answer.record, "mod_revision", 0)
            key = self._request_keys[0]
            self._operations[key] = Put(key, self._request.encode(answer.ref.key, self._answered(answer), own))
        if not self._operations:
            return TxnResult(True, self.revision)
        compares = list(self._compares.values())
        tenant = self._tenant()
        if tenant is not None:
            compares.append(not_erasing(self._keys, tenant))
        result = await self._store.txn(compares, list(self._operations.values()))
        if result.succeeded and self._recent is not None:
            self._recent.note(self._left(result.revision), result.revision)
        return result

    def _answered(self, answer: Answer[Any]) -> bytes | None:
        """The answer's record as it is stored; what this draft writes is encoded already."""
        if answer.record is None:
            return None
        operation = self._operations.get(answer.ref.key)
        if isinstance(operation, Put) and self._written.get(answer.ref.key) is answer.record:
            return operation.value
        return answer.ref.codec.encode(answer.record)

    def _left(self, revision: int) -> Iterator[tuple[bytes, KeyValue | None]]:
        """What a transaction that went through has left of the records that were fetched and compared by revision."""
        for operation in self._operations.values():
            if isinstance(operation, DeleteRange) or operation.key not in self._seen:
                continue
            if isinstance(operation, Delete):
                yield operation.key, None
            elif (compare := self._compares.get(operation.key)) is not None and compare.field is Field.MOD:
                before = self._seen[operation.key]
                created = before.create_revision if before else revision
                yield operation.key, KeyValue(operation.key, operation.value, created, revision, operation.lease)

    def _tenant(self) -> str | None:
        """Whose records are written."""
        tenants = (self._keys.tenant_of(key) for key in self._operations)
        return next((tenant for tenant in tenants if tenant is not None), None)

    async def check_erasing(self) -> None:
        """After a commit that failed: raise ``WrongState`` if the tenant is being erased."""
        tenant = self._tenant()
        if tenant is not None:
            await check_erasing(self._store, self._keys, tenant)

    async def _audit(self) -> None:
        written = [key for key in self._operations if audited(self._keys, key) is not None]
        blind = [key for key in written if key not in self._seen]
        if blind:
            self._seen.update(zip(blind, (await self._store.get(blind)).values, strict=True))
        for key in written:  # the trail tells what was there before, so what was written without a compare gets one
            seen = self._seen[key]
            self._compares.setdefault(key, Compare(key, Field.MOD, seen.mod_revision if seen else 0))
        changes = [change for operation in self._operations.values() if (change := self._change(operation))]
        if changes:
            tenant = self._keys.parts(changes[0][0])[1]
            request_id = self._request.request_id if self._request else ""
            put = audit_put(self._keys, tenant, changes=changes, request_id=request_id, reason=self.reason)
            self._operations[put.key] = put

    def _change(self, operation: Operation) -> RawChange | None:
        """What an operation changes, if that is audited; writing the same again changes nothing."""
        if isinstance(operation, DeleteRange):
            return None
        family = audited(self._keys, operation.key)
        if family is None:
            return None
        key, kv = operation.key, self._seen[operation.key]
        before, after = kv.value if kv else None, operation.value if isinstance(operation, Put) else None
        if before == after:
            return None
        if family.unaudited and not is_state_change(family, self._decoded.get(key), self._written.get(key)):
            return None
        return key, before, after


class Transactions:
    """Runs drafts until one is applied."""

    def __init__(self, store: Store, keys: Keys, recent: Recent | None = None) -> None:
        self._store = store
        self._keys = keys
        self._recent = recent

    async def run(
        self,
        body: Callable[[Draft], Awaitable[Answer[R]]],
        codec: RecordCodec[R],
        request: Request | None = None,
    ) -> Written[R]:
        """Apply what ``body`` drafts, once; a request id that was answered before answers the same again.

        Raises what ``body`` raises, ``RequestIdReused``, ``Aborted`` after too many lost races, ``Unavailable``.
        """
        written = await self._run(body, codec, request)
        if written.record is None:
            raise TypeError("a body that answers no record must be run by run_delete")
        return Written(written.record, written.catalog_revision)

    async def run_delete(
        self, body: Callable[[Draft], Awaitable[Answer[R]]], codec: RecordCodec[R], request: Request | None = None
    ) -> int:
        """As :meth:`run`, for a body that deletes; returns the catalog revision."""
        return (await self._run(body, codec, request)).catalog_revision

    async def would_write(self, body: Callable[[Draft], Awaitable[Answer[R]]], request: Request | None = None) -> bool:
        """Run ``body`` without applying what it drafts: whether it drafts anything, and was not answered before.

        For what must be checked before a long wait. Raises what ``body`` raises, ``RequestIdReused``.
        """
        draft = Draft(self._store, self._keys, request)
        try:
            await body(draft)
        except _Replayed:
            return False
        return bool(draft.num_writes)

    async def _run(
        self, body: Callable[[Draft], Awaitable[Answer[R]]], codec: RecordCodec[R], request: Request | None
    ) -> Written[R | None]:
        backoff_s = _FIRST_BACKOFF_S
        for attempt in range(_MAX_ATTEMPTS):
            draft = Draft(self._store, self._keys, request, self._recent, may_guess=attempt == 0)
            try:
                answer = await body(draft)
            except _Replayed as replay:
                kv = replay.stored.kv
                return Written(codec.decode(kv) if kv else None, replay.stored.catalog_revision)
            except MintError:
                if draft.is_guess:
                    continue
                raise
            if draft.is_guess and not draft.num_writes:
                continue
            result = await draft.commit(answer)
            if result.succeeded:
                record: Any = answer.record
                if record is not None and draft.writes(answer.ref):
                    record = replace(record, mod_revision=result.revision)
                return Written(record, result.revision)
            if draft.is_guess:
                continue
            await draft.check_erasing()
            await asyncio.sleep(backoff_s * random.random())
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        raise Aborted(f"lost {_MAX_ATTEMPTS} races in a row against other writers of the same record; retry")
