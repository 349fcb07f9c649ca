"""Working through fleet operations, one catalog at a time (the duty ``fleet``).

First the policies are selected, at the operation's catalog revision: a key ``fleetItems/…`` for each. Then the items
are tried, some at once, each by the ordinary call with a request id that is made of the operation and the policy, so
that a catalog that takes over after a crash applies nothing twice. An item's result, the end of its item key and the
operation's counts are one transaction: what is left to do is what has an item key. History may be compacted once all
are selected; if it is before, nothing was tried yet, and policies are selected anew at the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mint_catalog.fleet.operations import SELECTED
from mint_catalog.model.checks import live_policy
from mint_catalog.model.fleet_records import (
    FleetOperation,
    FleetPause,
    FleetPromote,
    FleetResult,
    FleetRollback,
    FleetState,
)
from mint_catalog.model.records import Policy, PolicyState, RevisionState, now
from mint_catalog.model.tables import Tables
from mint_catalog.policies import policy_filter
from mint_catalog.policies.heads import Policies
from mint_catalog.policies.policy_listing import having
from mint_catalog.serving.aliases import Aliases, Move
from mint_catalog.storage.duty import Duty
from mint_catalog.storage.erasing import not_erasing
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, Operation, Put, Store, prefix_end
from mint_catalog.storage.walk import clear, walk
from mint_core import calls, failpoints
from mint_core.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    MintError,
    RevisionCompacted,
    Unavailable,
    WrongState,
)
from mint_core.log import get_logger
from mint_core.names import AliasName, FleetOperationName, PolicyName, RevisionName

__all__ = ["FLEET_DUTY", "FleetWork"]

FLEET_DUTY: Final = "fleet"

_logger = get_logger(__name__)
_METHOD: Final = "mint.v1.FleetService/CreateFleetOperation"
_NUM_AT_ONCE: Final = 16
_MAX_OPERATIONS: Final = 64
_CHUNK: Final = 40
_LOOKED_AT: Final = 16
_SELECT_CHUNK: Final = 100
_POLL_S: Final = 1.0
_PAUSE_S: Final = 1.0
_TRIED = failpoints.declare("catalog.fleet.tried", "some items were tried, their results are not written yet")
_RECORDED = failpoints.declare("catalog.fleet.recorded", "some items were tried and their results are written")


class _Gone(Exception):
    """The operation is not what it was: erased, or somebody else's now."""


class FleetWork:
    """Does what operations ask for."""

    def __init__(self, store: Store, tables: Tables, aliases: Aliases, policies: Policies) -> None:
        self._store = store
        self._tables = tables
        self._keys = tables.keys
        self._aliases = aliases
        self._policies = policies
        self._slots = asyncio.Semaphore(_NUM_AT_ONCE)

    async def pending(self) -> bool:
        """Whether an operation has work left."""
        return bool(await self._open(1))

    async def _open(self, limit: int) -> tuple[KeyValue, ...]:
        prefix = self._keys.family("fleetOpen")
        return (await self._store.scan(prefix, prefix_end(prefix), limit=limit)).values

    async def work(self, duty: Duty) -> None:
        """Work on all open operations until none is left; also on those that are begun meanwhile."""
        async with asyncio.TaskGroup() as group:
            running: dict[bytes, asyncio.Task[None]] = {}
            while True:
                for kv in await self._open(_MAX_OPERATIONS):
                    if kv.key not in running:
                        name = self._keys.fleet_operation_name(kv.key)
                        running[kv.key] = group.create_task(self._guarded(duty, name))
                if not running:
                    return
                await asyncio.wait(running.values(), timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                running = {key: task for key, task in running.items() if not task.done()}

    async def _guarded(self, duty: Duty, name: FleetOperationName) -> None:
        """One operation's failure must not stop the others; what is left is taken up again a little later."""
        try:
            await self.operate(duty, name)
        except MintError as error:
            fields = {"operation": str(name), "reason": error.reason, "error": error.message}
            _logger.warning("a fleet operation was interrupted", extra={"fields": fields})
            await asyncio.sleep(_PAUSE_S)

    async def operate(self, duty: Duty, name: FleetOperationName) -> None:
        """Work on one operation until it has ended. Raises ``Unavailable``; call it again then."""
        with contextlib.suppress(_Gone):
            known = await self._read(duty, name)
            if known.state is FleetState.RUNNING:
                await self._select(duty, known)
                await self._try_all(duty, known)
            await self._end(duty, name)

    async def _read(self, duty: Duty, name: FleetOperationName) -> FleetOperation:
        ref, open_key = self._tables.fleet_operation(name), self._keys.fleet_open(name)
        kv, opened = (await self._store.get([ref.key, open_key])).values
        if kv is None or opened is None:
            if opened is not None:
                await self._store.txn([duty.compare, Compare(ref.key, Field.CREATE, 0)], [Delete(open_key)])
            raise _Gone
        return ref.codec.decode(kv)

    def _compares(self, duty: Duty, operation: FleetOperation) -> list[Compare]:
        """What every write for an operation rests on: it is as it was read, and its tenant is not being erased."""
        key = self._keys.fleet_operation(operation.name)
        compares = [duty.compare, not_erasing(self._keys, operation.name.tenant)]
        return [*compares, Compare(key, Field.MOD, operation.mod_revision)]

    # Selecting

    async def _select(self, duty: Duty, operation: FleetOperation) -> None:
        open_key = self._keys.fleet_open(operation.name)
        opened = (await self._store.get([open_key])).values[0]
        if opened is not None and opened.value == SELECTED:
            return
        try:
            await self._put_items(duty, operation)
        except RevisionCompacted:
            await self._clear_items(duty, operation.name)
            ref = self._tables.fleet_operation(operation.name)
            head = (await self._store.get([ref.key])).revision
            await self._write(
                duty, operation, [Put(ref.key, ref.codec.encode(replace(operation, catalog_revision=head)))]
            )
            await self._select(duty, await self._read(duty, operation.name))
            return
        await self._write(duty, operation, [Put(open_key, SELECTED)])

    async def _put_items(self, duty: Duty, operation: FleetOperation) -> None:
        keep = policy_filter.parse(operation.filter)
        narrow = having(self._store, self._tables, keep.aliases)
        prefix = self._keys.family("policies", operation.name.tenant)
        puts: list[Operation] = []
        pages = walk(self._store, prefix, prefix_end(prefix), revision=operation.catalog_revision)
        async with contextlib.aclosing(pages):
            async for page in pages:
                policies = [policy for kv in page if keep(policy := self._tables.codecs.policy.decode(kv))]
                for policy in await narrow(policies, operation.catalog_revision):
                    puts.append(Put(self._keys.fleet_item(operation.name, policy.name.policy), b""))
                    if len(puts) == _SELECT_CHUNK:
                        await self._write(duty, operation, puts)
                        puts = []
        if puts:
            await self._write(duty, operation, puts)

    async def _write(self, duty: Duty, operation: FleetOperation, operations: Sequence[Operation]) -> None:
        if not (await self._store.txn(self._compares(duty, operation), operations)).succeeded:
            await self._read(duty, operation.name)
            raise Unavailable(f"{operation.name} was changed meanwhile; going on with what it is now")

    # Trying

    async def _try_all(self, duty: Duty, known: FleetOperation) -> None:
        prefix = self._keys.fleet_items(known.name)
        operation = await self._read(duty, known.name)
        pages = walk(self._store, prefix, prefix_end(prefix), limit=_CHUNK)
        async with contextlib.aclosing(pages):
            async for page in pages:
                if operation.state is not FleetState.RUNNING:
                    return
                names = [self._keys.fleet_policy(kv.key) for kv in page]
                results = await self._try_some(operation, names)
                await _TRIED.reached()
                operation = await self._record(duty, operation, results)
                await _RECORDED.reached()

    async def _record(self, duty: Duty, operation: FleetOperation, results: Sequence[FleetResult]) -> FleetOperation:
        num_failed = sum(result.error is not None for result in results)
        ref = self._tables.fleet_operation(operation.name)
        operations: list[Operation] = []
        for result in results:
            result_ref = self._tables.fleet_result(operation.name, result.policy.policy)
            operations.append(Put(result_ref.key, result_ref.codec.encode(result)))
            operations.append(Delete(self._keys.fleet_item(operation.name, result.policy.policy)))
        while True:  # cancelling it changes the operation too, and what was tried counts all the same
            changed = replace(
                operation,
                num_done=operation.num_done + len(results),
                num_failed=operation.num_failed + num_failed,
            )
            put = Put(ref.key, ref.codec.encode(changed))
            written = await self._store.txn(self._compares(duty, operation), [put, *operations])
            if written.succeeded:
                return replace(changed, mod_revision=written.revision)
            known = operation
            operation = await self._read(duty, operation.name)
            if operation.mod_revision == known.mod_revision:
                raise Unavailable(f"{operation.name} cannot go on: its duty was lost, or its tenant is being erased")

    async def _try_some(self, operation: FleetOperation, names: Sequence[PolicyName]) -> list[FleetResult]:
        tried = await asyncio.gather(*(self._try(operation, name) for name in names), return_exceptions=True)
        results: list[FleetResult] = []
        for each in tried:
            if isinstance(each, BaseException):
                raise each
            results.append(each)
        return results

    async def _try(self, operation: FleetOperation, name: PolicyName) -> FleetResult:
        async with self._slots:
            try:
                with calls.inbound_call(operation.principal, None, _METHOD):
                    number = await self._apply(operation, name)
            except (Unavailable, DeadlineExceeded, Cancelled):
                raise  # nothing is known of this item: it is tried again
            except MintError as error:
                return FleetResult(name, error)
            except Exception:  # a bug that one policy wakes must not stop the rest
                error_id = secrets.token_hex(8)
                fields = {"operation": str(operation.name), "policy": str(name), "error_id": error_id}
                _logger.exception("an item of a fleet operation failed by a bug", extra={"fields": fields})
                message = f"internal error {error_id}; the server's log has the rest"
                return FleetResult(name, Internal(message, metadata={"error_id": error_id}))
            return FleetResult(name, None, number)

    async def _apply(self, operation: FleetOperation, name: PolicyName) -> int:
        request = _request(operation, name)
        match operation.verb:
            case FleetPromote(alias):
                number = await self._newest_ready(name)
                moved = (await self._aliases.promote(_move(operation, name, alias, number), request)).record
                return moved.active.revision_number if moved.active else 0
            case FleetRollback(alias):
                moved = (await self._aliases.rollback(_move(operation, name, alias, 0), request)).record
                return moved.active.revision_number if moved.active else 0
            case verb:
                state = PolicyState.PAUSED if isinstance(verb, FleetPause) else PolicyState.ACTIVE
                await self._policies.update(name, Policy(name, state=state), ["state"], request=request)
                return 0

    async def _newest_ready(self, name: PolicyName) -> int:
        """Number of the policy's newest READY revision. Raises ``NotFound``, ``WrongState``."""
        head_ref = self._tables.policy(name)
        kv = (await self._store.get([head_ref.key])).values[0]
        head = live_policy(head_ref.codec.decode(kv) if kv else None, name)
        for newest in range(head.next_revision_number - 1, 0, -_LOOKED_AT):
            numbers = range(newest, max(0, newest - _LOOKED_AT), -1)
            refs = [self._tables.revision(RevisionName(name.tenant, name.policy, number)) for number in numbers]
            values = (await self._store.get([ref.key for ref in refs])).values
            for ref, found in zip(refs, values, strict=True):
                revision = ref.codec.decode(found) if found else None
                if revision is None or revision.policy_uid != head.uid:
                    continue
                if revision.state is RevisionState.READY:
                    return revision.name.number
        raise WrongState(
            f"{name} has no READY revision to promote: train it or publish one first",
            metadata={"resource": str(name), "state": head.state.name},
        )

    # Ending

    async def _end(self, duty: Duty, name: FleetOperationName) -> None:
        operation = await self._read(duty, name)
        if operation.state is FleetState.RUNNING:
            done = replace(operation, state=FleetState.DONE, end_time=now())
            ref = self._tables.fleet_operation(name)
            await self._write(
                duty, operation, [Put(ref.key, ref.codec.encode(done)), Delete(self._keys.fleet_open(name))]
            )
        else:
            await self._clear_items(duty, name)
            await self._write(duty, operation, [Delete(self._keys.fleet_open(name))])

    async def _clear_items(self, duty: Duty, name: FleetOperationName) -> None:
        prefix = self._keys.fleet_items(name)
        await clear(self._store, prefix, prefix_end(prefix), compares=[duty.compare])


def _move(operation: FleetOperation, name: PolicyName, alias: str, number: int) -> Move:
    alias_name = AliasName(name.tenant, name.policy, alias)
    return Move(
        name=alias_name,
        revision_number=number,
        etag="",
        reason=operation.reason or f"by {operation.name}",
        principal=operation.principal,
    )


def _request(operation: FleetOperation, name: PolicyName) -> Request | None:
    """What makes trying an item again the same request: of this operation and policy, whenever and wherever."""
    identity = f"{operation.name}\0{operation.create_time}\0{name}".encode()
    digest = hashlib.sha256(identity).digest()
    return Request.of(
        tenant=name.tenant,
        principal=operation.principal,
        method=_METHOD,
        request_id=str(uuid.UUID(bytes=digest[:16], version=4)),
        payload=identity,
    )
