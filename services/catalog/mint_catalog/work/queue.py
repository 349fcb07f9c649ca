"""The queue of runs: who works on what, and what happens to a run whose worker is gone.

A claim acquires a lease in the same transaction, so the lease's key, the claim's key and the run's new state are of one
revision, and that revision is the fence. Every later write of the worker compares that both keys still are of it. A
claim whose lease is gone goes back to the queue.

A run that trains leases its policy, so a policy is trained by one at a time. An evaluation changes no policy and
leases itself: a policy is evaluated while it is trained, by as many as there are.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from typing import Final

from mint_catalog.model.checks import check_holder
from mint_catalog.model.records import Holder, Policy, PolicyState, now
from mint_catalog.model.run_records import Run, RunEvent, RunState
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Answer, Draft, Written
from mint_catalog.storage.erasing import not_erasing
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, LeaseGone, Operation, Put, Store
from mint_catalog.trail.audit import RawChange, audit_put
from mint_catalog.work.leases import LazyLease
from mint_catalog.work.reports import Outcome, Reports
from mint_catalog.work.retries import Retries
from mint_catalog.work.runs import ended, with_events
from mint_catalog.work.turns import Turns, read_claims
from mint_catalog.work.waiting import Waiting, leased_resource
from mint_core import failpoints
from mint_core.errors import WrongState
from mint_core.log import get_logger
from mint_core.names import BaseModelName, PolicyName, RunName

__all__ = ["Claim", "Outcome", "RunQueue"]

_logger = get_logger(__name__)
_POLL_S: Final = 1.0
_CLAIMED = failpoints.declare("catalog.claim.after", "the run is claimed, the worker does not know yet")


@dataclass(frozen=True, slots=True)
class Claim:
    """A run, and the lease under which it is worked on."""

    run: Run
    resource: PolicyName | RunName
    """What is leased: the run's policy, or the run itself."""
    holder: Holder


class RunQueue(Reports):
    """Claims and, by what it inherits, everything a worker tells about a claimed run."""

    def __init__(
        self,
        store: Store,
        tables: Tables,
        signal: Signal,
        *,
        max_attempts: int,
        backoff_s: float,
        backoff_max_s: float,
    ) -> None:
        super().__init__(store, tables, Retries(tables, max_attempts, backoff_s, backoff_max_s))
        self._turns = Turns(store, tables.keys, longest_delay_s=backoff_max_s)
        self._signal = signal
        self._closed = False

    def close(self) -> None:
        """Let waiting claims answer without a run: the process is about to stop."""
        self._closed = True
        self._signal.notify()

    async def claim(self, base_model: BaseModelName, holder: str, ttl_s: int, *, wait_s: float) -> Claim | None:
        """Claim the run whose turn it is and whose lease is free; wait for one at most ``wait_s``.

        Raises ``InvalidArgument``, ``Unavailable``.
        """
        check_holder(holder)
        until = asyncio.get_running_loop().time() + wait_s
        while True:
            seen = self._signal.count
            pause_s = min(_POLL_S, await self._turns.wake(base_model))
            claim = await self._claim_next(base_model, holder, ttl_s)
            remaining_s = until - asyncio.get_running_loop().time()
            if claim is not None or remaining_s <= 0 or self._closed:
                return claim
            await self._signal.wait(seen, timeout_s=min(remaining_s, pause_s))

    async def _claim_next(self, base_model: BaseModelName, holder: str, ttl_s: int) -> Claim | None:
        async with (
            LazyLease(self._store, ttl_s) as lease,
            contextlib.aclosing(self._turns.entries(base_model)) as entries,
        ):
            async for entry in entries:
                claim = await self._claim_entry(entry, holder, lease)
                if claim is not None:
                    lease.taken = True
                    await _CLAIMED.reached()
                    return claim
        return None

    async def _claim_entry(self, entry: KeyValue, holder: str, lease: LazyLease) -> Claim | None:
        waiting = Waiting.of(self._tables.keys, entry)
        policy, resource = waiting.policy, waiting.resource
        run_ref, claim_ref = self._tables.run(waiting.run), self._tables.claim(waiting.run)
        head_ref, lease_ref = self._tables.policy(policy), self._tables.lease(resource)
        erasing = not_erasing(self._tables.keys, waiting.run.tenant)
        keys = [entry.key, run_ref.key, head_ref.key, lease_ref.key, erasing.key]
        queued, run_kv, head_kv, lease_kv, erasing_kv = (await self._store.get(keys)).values
        if queued is None or lease_kv is not None or erasing_kv is not None:
            return None
        run = run_ref.codec.decode(run_kv) if run_kv else None
        head = head_ref.codec.decode(head_kv) if head_kv else None
        compares = [
            Compare(entry.key, Field.MOD, queued.mod_revision),
            Compare(run_ref.key, Field.MOD, run_kv.mod_revision if run_kv else 0),
            Compare(head_ref.key, Field.MOD, head_kv.mod_revision if head_kv else 0),
            erasing,
            Compare(lease_ref.key, Field.CREATE, 0),
            Compare(claim_ref.key, Field.CREATE, 0),
        ]
        if run is None or run_kv is None or run.state is not RunState.QUEUED:
            await self._store.txn(compares[:2], [Delete(entry.key)])
            return None
        if head is None or head.state is PolicyState.DELETED or head.uid != run.policy_uid:
            message = f"{policy} was deleted while the run waited"
            failed = ended(run, RunState.FAILED, kind="failed", message=message, error=f"RESOURCE_NOT_FOUND: {message}")
            put = Put(run_ref.key, run_ref.codec.encode(failed))
            audit = self._audit(run.name, [(put.key, run_kv.value, put.value)], reason=message)
            await self._store.txn(compares[:4], [put, Delete(entry.key), audit])
            return None
        if head.state is not PolicyState.ACTIVE:
            return None
        claimed = _claimed(run, head, holder)
        lease_id = await lease.id()
        held = Holder(holder, lease.ttl_s, lease=lease_id)
        leased = Put(lease_ref.key, lease_ref.codec.encode(held), lease_id)
        running = Put(run_ref.key, run_ref.codec.encode(claimed))
        changes: list[RawChange] = [
            (leased.key, None, leased.value),
            (running.key, run_kv.value, running.value),
        ]
        operations: list[Operation] = [
            leased,
            Put(claim_ref.key, f"{policy.policy}/{BaseModelName.parse(head.base_model).base_model}".encode()),
            running,
            Delete(entry.key),
            self._audit(run.name, changes),
        ]
        try:
            result = await self._store.txn(compares, operations)
        except LeaseGone:
            lease.forget()
            return None
        if not result.succeeded:
            self._signal.notify()  # a rival moved something; look again soon
            return None
        run = replace(claimed, mod_revision=result.revision)
        return Claim(run, resource, replace(held, token=result.revision))

    def _audit(self, name: RunName, changes: list[RawChange], *, reason: str = "") -> Put:
        return audit_put(self._tables.keys, name.tenant, changes=changes, reason=reason)

    async def reap(self) -> int:
        """Take back every claim whose lease is gone; returns how many."""
        num_reaped = 0
        for kv in await read_claims(self._store, self._tables.keys):
            name = self._tables.keys.run_name(kv.key)
            policy = PolicyName(name.tenant, kv.value.decode().partition("/")[0])
            # Whichever of the two it leased: a claim and its lease are of one revision, and nothing else is.
            leases = (await self._store.get([self._tables.keys.lease(policy), self._tables.keys.lease(name)])).values
            if all(lease is None or lease.create_revision != kv.create_revision for lease in leases):
                with contextlib.suppress(WrongState):  # its tenant is being erased, and this claim with it
                    num_reaped += await self._take_back(name, kv.create_revision)
        return num_reaped

    async def _take_back(self, name: RunName, token: int) -> int:
        run_ref, claim_ref = self._tables.run(name), self._tables.claim(name)
        taken = False

        async def body(draft: Draft) -> Answer[Run]:
            nonlocal taken
            taken = False
            await draft.fetch(run_ref, claim_ref)
            run = draft.get(run_ref)
            if draft.create_revision(claim_ref) != token:
                return Answer(run_ref, run or Run(name))
            if run is None or not run.state.claimed:
                draft.delete(claim_ref)
                return Answer(run_ref, run or Run(name))
            lease_ref = self._tables.lease(leased_resource(run))
            await draft.fetch(lease_ref)
            if draft.create_revision(lease_ref) == token:
                return Answer(run_ref, run)
            draft.require_created(lease_ref, draft.create_revision(lease_ref))
            taken = True
            draft.reason = f"LEASE_LOST: worker {run.worker} did not renew its lease in time"
            return self._retries.after_failure(draft, claim_ref, run, draft.reason)

        written: Written[Run] = await self._transactions.run(body, self._tables.codecs.run)
        if taken:
            state = written.record.state.name
            _logger.info("claim taken back", extra={"fields": {"run": str(name), "fence": token, "state": state}})
        return int(taken)


def _claimed(run: Run, head: Policy, holder: str) -> Run:
    attempt = run.num_attempts + 1
    # Fixed at the first claim: a later attempt must not start from what an earlier one has left behind.
    initial = run.initial_training_state
    if run.num_attempts == 0 and run.continue_from_latest:
        initial = head.latest_training_state
    claimed = replace(
        run,
        state=RunState.RUNNING,
        worker=holder,
        num_attempts=attempt,
        not_before_time=None,
        initial_training_state=initial,
        error="",
    )
    return with_events(claimed, RunEvent(now(), "claimed", f"attempt {attempt} by worker {holder}"))
