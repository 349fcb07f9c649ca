"""The queue of runs: claim, report, commit, finish, and what happens to a run whose worker is gone.

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

from mint_catalog.checks import check_finite, check_holder, check_metrics, check_object_key, check_range, not_found
from mint_catalog.draft import Answer, Draft, Transactions, Written
from mint_catalog.leases import LazyLease, lease_lost, parse_resource, require_fence
from mint_catalog.paging import list_all
from mint_catalog.recipes import MAX_STEPS
from mint_catalog.records import Fence, Holder, Policy, PolicyState, TrainingState, now
from mint_catalog.run_records import Run, RunEvent, RunProgress, RunState, RunStep
from mint_catalog.runs import ended, enqueue, leased_resource, waiting_for, with_events
from mint_catalog.signals import Signal
from mint_catalog.store import Compare, Delete, Field, KeyValue, LeaseGone, Operation, Put, Store, prefix_end
from mint_catalog.tables import Ref, Tables
from mint_core import failpoints
from mint_core.errors import InvalidArgument, Unavailable, WrongState
from mint_core.log import get_logger
from mint_core.names import BaseModelName, PolicyName, RevisionName, RunName, check_digest

__all__ = ["Claim", "Outcome", "RunQueue"]

_logger = get_logger(__name__)
_SCAN: Final = 100
_MAX_REPORTED_STEPS: Final = 100
_MAX_METRICS: Final = 64
_POLL_S: Final = 1.0
_CLAIMED = failpoints.declare("catalog.claim.after", "the run is claimed, the worker does not know yet")
_COMMITTED = failpoints.declare("catalog.state.after", "the training state is current, the worker does not know yet")


@dataclass(frozen=True, slots=True)
class Claim:
    """A run, and the lease under which it is worked on."""

    run: Run
    resource: PolicyName | RunName
    """What is leased: the run's policy, or the run itself."""
    holder: Holder


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker says that a run ended."""

    state: RunState
    error: str = ""
    retriable: bool = False
    published_revision: str = ""


@dataclass(frozen=True, slots=True)
class _Refs:
    """What a worker's write reads."""

    run: Ref[Run]
    claim: Ref[bytes]
    lease: Ref[Holder]


class RunQueue:
    """Claims and everything a worker tells about a claimed run."""

    def __init__(self, store: Store, tables: Tables, signal: Signal, *, max_attempts: int) -> None:
        self._store = store
        self._tables = tables
        self._signal = signal
        self._max_attempts = max_attempts
        self._closed = False
        self._transactions = Transactions(store, tables.keys)

    def close(self) -> None:
        """Let waiting claims answer without a run: the process is about to stop."""
        self._closed = True
        self._signal.notify()

    async def claim(self, base_model: BaseModelName, holder: str, ttl_s: int, *, wait_s: float) -> Claim | None:
        """Claim the first run of the queue whose lease is free; wait for one at most ``wait_s``.

        Raises ``InvalidArgument``, ``Unavailable``.
        """
        check_holder(holder)
        until = asyncio.get_running_loop().time() + wait_s
        while True:
            seen = self._signal.count
            claim = await self._claim_first(base_model, holder, ttl_s)
            remaining_s = until - asyncio.get_running_loop().time()
            if claim is not None or remaining_s <= 0 or self._closed:
                return claim
            await self._signal.wait(seen, timeout_s=min(remaining_s, _POLL_S))

    async def _claim_first(self, base_model: BaseModelName, holder: str, ttl_s: int) -> Claim | None:
        prefix = self._tables.keys.queue(base_model)
        start, end = prefix, prefix_end(prefix)
        async with LazyLease(self._store, ttl_s) as lease:
            while True:
                page = await self._store.scan(start, end, limit=_SCAN)
                if not page.values:
                    return None
                for entry in await self._free(page.values):
                    claim = await self._claim_entry(entry, holder, lease)
                    if claim is not None:
                        lease.taken = True
                        await _CLAIMED.reached()
                        return claim
                if not page.more:
                    return None
                start = page.values[-1].key + b"\0"

    async def _free(self, entries: tuple[KeyValue, ...]) -> list[KeyValue]:
        """The entries whose lease is free; the first one for each lease."""
        first: dict[bytes, KeyValue] = {}
        for entry in entries:
            _, resource = waiting_for(self._tables.keys, entry)
            first.setdefault(self._tables.keys.lease(resource), entry)
        leases = (await self._store.get(list(first))).values
        return [entry for entry, lease in zip(first.values(), leases, strict=True) if lease is None]

    async def _claim_entry(self, entry: KeyValue, holder: str, lease: LazyLease) -> Claim | None:
        policy, resource = waiting_for(self._tables.keys, entry)
        refs, head_ref = self._refs(self._tables.keys.run_name(entry.key), resource), self._tables.policy(policy)
        keys = [entry.key, refs.run.key, head_ref.key, refs.lease.key]
        queued, run_kv, head_kv, lease_kv = (await self._store.get(keys)).values
        if queued is None or lease_kv is not None:
            return None
        run = refs.run.codec.decode(run_kv) if run_kv else None
        head = head_ref.codec.decode(head_kv) if head_kv else None
        compares = [
            Compare(entry.key, Field.MOD, queued.mod_revision),
            Compare(refs.run.key, Field.MOD, run_kv.mod_revision if run_kv else 0),
            Compare(head_ref.key, Field.MOD, head_kv.mod_revision if head_kv else 0),
            Compare(refs.lease.key, Field.CREATE, 0),
            Compare(refs.claim.key, Field.CREATE, 0),
        ]
        if run is None or run.state is not RunState.QUEUED:
            await self._store.txn(compares[:2], [Delete(entry.key)])
            return None
        if head is None or head.state is PolicyState.DELETED or head.uid != run.policy_uid:
            message = f"{policy} was deleted while the run waited"
            failed = ended(run, RunState.FAILED, kind="failed", message=message, error=f"RESOURCE_NOT_FOUND: {message}")
            await self._store.txn(compares[:3], [Put(refs.run.key, refs.run.codec.encode(failed)), Delete(entry.key)])
            return None
        if head.state is not PolicyState.ACTIVE:
            return None
        claimed = _claimed(run, head, holder)
        lease_id = await lease.id()
        held = Holder(holder, lease.ttl_s, lease=lease_id)
        operations: list[Operation] = [
            Put(refs.lease.key, refs.lease.codec.encode(held), lease_id),
            Put(refs.claim.key, f"{policy.policy}/{BaseModelName.parse(head.base_model).base_model}".encode()),
            Put(refs.run.key, refs.run.codec.encode(claimed)),
            Delete(entry.key),
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

    def _refs(self, name: RunName, resource: PolicyName | RunName) -> _Refs:
        return _Refs(self._tables.run(name), self._tables.claim(name), self._tables.lease(resource))

    async def _fenced(self, draft: Draft, name: RunName, fence: Fence) -> tuple[_Refs, Run]:
        """Let the draft commit only while the worker holds this very claim."""
        resource = parse_resource(fence.resource, field="fence.resource")
        refs = self._refs(name, resource)
        await draft.fetch(refs.run, refs.claim, refs.lease)
        run = draft.get(refs.run)
        if run is None:
            raise not_found(name)
        if resource != leased_resource(run):
            raise InvalidArgument(
                f"fence.resource is {resource}: expected the fence of {leased_resource(run)}", field="fence.resource"
            )
        if run.state.ended:
            raise WrongState(
                f"{name} has {run.state.name}: it takes no more reports",
                metadata={"resource": str(name), "state": run.state.name},
            )
        require_fence(draft, refs.lease, resource, fence)
        if draft.create_revision(refs.claim) != fence.token:
            raise lease_lost(resource, fence.token)
        draft.require_created(refs.claim, fence.token)
        return refs, run

    async def report(
        self,
        name: RunName,
        fence: Fence,
        progress: RunProgress | None,
        events: tuple[RunEvent, ...] = (),
        steps: tuple[RunStep, ...] = (),
    ) -> bool:
        """Replace the progress, append events, keep the figures of steps; returns whether a cancel was asked for.

        A step that was reported before is replaced. Raises ``InvalidArgument``, ``NotFound``, ``LeaseLost``,
        ``WrongState``.
        """
        _check_steps(steps)

        async def body(draft: Draft) -> Answer[Run]:
            refs, run = await self._fenced(draft, name, fence)
            time = now()
            if progress is not None:
                run = replace(run, progress=replace(progress, update_time=progress.update_time or time))
            run = with_events(run, *(replace(event, time=event.time or time) for event in events))
            for step in steps:
                draft.put(self._tables.run_step(name, step.step), replace(step, time=step.time or time))
            return draft.put(refs.run, run)

        written = await self._transactions.run(body, self._tables.codecs.run)
        return written.record.state is RunState.CANCELLING

    async def commit_state(self, name: RunName, fence: Fence, state: TrainingState) -> int:
        """Make a saved state current for the run and its policy; returns the catalog revision.

        Raises ``InvalidArgument`` (also for an evaluation, which trains nothing), ``NotFound``, ``LeaseLost``,
        ``WrongState`` (an older step than the current one).
        """
        _check_state(state, name, fence)
        state = replace(state, run=str(name), fence=fence.token, save_time=state.save_time or now())

        async def body(draft: Draft) -> Answer[Run]:
            refs, run = await self._fenced(draft, name, fence)
            if run.evaluation is not None:
                raise InvalidArgument(f"{name} is an evaluation: it trains nothing and has no state", field="name")
            current = run.latest_training_state
            if current is not None and current.step > state.step:
                raise WrongState(
                    f"state.step is {state.step}: {name} has a state of step {current.step} already; continue from it",
                    metadata={"resource": str(name), "step": str(current.step)},
                )
            head_ref = self._tables.policy(PolicyName.parse(run.policy))
            await draft.fetch(head_ref)
            head = draft.get(head_ref)
            if head is None or head.state is PolicyState.DELETED:
                raise not_found(run.policy)
            draft.put(head_ref, replace(head, latest_training_state=state, update_time=now()))
            return draft.put(refs.run, replace(run, latest_training_state=state))

        written = await self._transactions.run(body, self._tables.codecs.run)
        await _COMMITTED.reached()
        return written.catalog_revision

    async def finish(self, name: RunName, fence: Fence, outcome: Outcome) -> Run:
        """End a run and give its lease back, in one transaction.

        Raises ``InvalidArgument``, ``NotFound``, ``LeaseLost``, ``WrongState``.
        """
        if not outcome.state.ended:
            raise InvalidArgument(
                f"state is {outcome.state.name}: expected SUCCEEDED, FAILED or CANCELLED", field="state"
            )
        published = outcome.published_revision
        if published and str(RevisionName.parse(published, field="published_revision").parent) != fence.resource:
            raise InvalidArgument(
                f"published_revision is {published}: it does not belong to {fence.resource}", field="published_revision"
            )
        lease = 0

        async def body(draft: Draft) -> Answer[Run]:
            nonlocal lease
            repeated = await self._finished(draft, name, fence)
            if repeated is not None:
                return repeated
            refs, run = await self._fenced(draft, name, fence)
            held = draft.get(refs.lease)
            lease = held.lease if held else 0
            published_revision = published or run.published_revision
            run = replace(run, published_revision=published_revision, finished_fence=fence.token)
            draft.delete(refs.lease)
            if outcome.state is RunState.FAILED and outcome.retriable:
                return self._requeue(draft, refs, run, outcome.error or "failed")
            draft.delete(refs.claim)
            message = outcome.error or f"after {run.progress.step if run.progress else 0} steps"
            kind = outcome.state.name.lower()
            return draft.put(refs.run, ended(run, outcome.state, kind=kind, message=message, error=outcome.error))

        run = (await self._transactions.run(body, self._tables.codecs.run)).record
        if lease:
            with contextlib.suppress(Unavailable):  # its key is gone; the bare lease runs out by itself
                await self._store.revoke(lease)
        return run

    async def _finished(self, draft: Draft, name: RunName, fence: Fence) -> Answer[Run] | None:
        """The stored run if this very claim was finished before: the answer was lost, the call is repeated."""
        ref = self._tables.run(name)
        await draft.fetch(ref)
        run = draft.get(ref)
        known = (
            run is not None and str(leased_resource(run)) == fence.resource and 0 < fence.token == run.finished_fence
        )
        return Answer(ref, run) if known else None

    def _requeue(self, draft: Draft, refs: _Refs, run: Run, error: str) -> Answer[Run]:
        """Put a claimed run back into the queue, or end it when it was cancelled or has used up its attempts."""
        _, _, base_model = (draft.get(refs.claim) or b"").decode().partition("/")
        draft.delete(refs.claim)
        if run.state is RunState.CANCELLING:
            return draft.put(refs.run, ended(run, RunState.CANCELLED, kind="cancelled", message=error))
        if run.num_attempts >= self._max_attempts:
            message = f"{error} (attempt {run.num_attempts} of {self._max_attempts})"
            return draft.put(refs.run, ended(run, RunState.FAILED, kind="failed", message=message, error=message))
        enqueue(draft, self._tables, f"baseModels/{base_model}", run)
        waiting = replace(run, state=RunState.QUEUED, worker="")
        return draft.put(refs.run, with_events(waiting, RunEvent(now(), "requeued", error)))

    async def reap(self) -> int:
        """Take back every claim whose lease is gone; returns how many."""
        prefix = self._tables.keys.family("claims")
        claims, _ = await list_all(self._store, prefix, _KeyOnly())
        num_reaped = 0
        for kv in claims:
            name = self._tables.keys.run_name(kv.key)
            policy = PolicyName(name.tenant, kv.value.decode().partition("/")[0])
            # Whichever of the two it leased: a claim and its lease are of one revision, and nothing else is.
            leases = (await self._store.get([self._tables.keys.lease(policy), self._tables.keys.lease(name)])).values
            if all(lease is None or lease.create_revision != kv.create_revision for lease in leases):
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
            refs = self._refs(name, leased_resource(run))
            await draft.fetch(refs.lease)
            if draft.create_revision(refs.lease) == token:
                return Answer(run_ref, run)
            draft.require_created(refs.lease, draft.create_revision(refs.lease))
            taken = True
            return self._requeue(draft, refs, run, f"LEASE_LOST: worker {run.worker} did not renew its lease in time")

        written: Written[Run] = await self._transactions.run(body, self._tables.codecs.run)
        if taken:
            state = written.record.state.name
            _logger.info("claim taken back", extra={"fields": {"run": str(name), "fence": token, "state": state}})
        return int(taken)


class _KeyOnly:
    """Leaves keys and values as they are."""

    def encode(self, record: KeyValue) -> bytes:
        return record.value

    def decode(self, kv: KeyValue) -> KeyValue:
        return kv


def _claimed(run: Run, head: Policy, holder: str) -> Run:
    attempt = run.num_attempts + 1
    # Fixed at the first claim: a later attempt must not start from what an earlier one has left behind.
    initial = run.initial_training_state
    if run.num_attempts == 0 and run.continue_from_latest:
        initial = head.latest_training_state
    claimed = replace(
        run, state=RunState.RUNNING, worker=holder, num_attempts=attempt, initial_training_state=initial, error=""
    )
    return with_events(claimed, RunEvent(now(), "claimed", f"attempt {attempt} by worker {holder}"))


def _check_steps(steps: tuple[RunStep, ...]) -> None:
    if len(steps) > _MAX_REPORTED_STEPS:
        raise InvalidArgument(
            f"steps has {len(steps)} entries: at most {_MAX_REPORTED_STEPS} in one report, send more reports",
            field="steps",
        )
    for index, step in enumerate(steps):
        check_range(step.step, field=f"steps[{index}].step", least=1, most=MAX_STEPS)
        check_finite(step.loss, field=f"steps[{index}].loss")
        check_metrics(step.metrics, field=f"steps[{index}].metrics", most=_MAX_METRICS)


def _check_state(state: TrainingState, name: RunName, fence: Fence) -> None:
    if state.step < 0:
        raise InvalidArgument(f"state.step is {state.step}: it must not be negative", field="state.step")
    if state.run not in ("", str(name)):
        raise InvalidArgument(f"state.run is {state.run[:120]}: expected {name}", field="state.run")
    if state.fence not in (0, fence.token):
        raise InvalidArgument(
            f"state.fence is {state.fence}: it was not saved under fence {fence.token}; save it again",
            field="state.fence",
        )
    for field, key, blob in (
        ("weights", state.weights_key, state.weights),
        ("optimizer", state.optimizer_key, state.optimizer),
    ):
        check_object_key(key, name.tenant, field=f"state.{field}_key")
        if blob is None:
            raise InvalidArgument(f"state.{field} is missing: name its digest and size", field=f"state.{field}")
        check_digest(blob.digest, field=f"state.{field}.digest")
