"""What a worker tells about the run it has claimed: reports, states, its end.

Every write compares that the claim and its lease still are of one revision, the fence that the worker holds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Final

from mint_catalog.model.checks import check_finite, check_metrics, check_object_key, check_range, not_found
from mint_catalog.model.records import Fence, Holder, PolicyState, TrainingState, now
from mint_catalog.model.run_records import Run, RunEvent, RunProgress, RunState, RunStep
from mint_catalog.model.tables import Ref, Tables
from mint_catalog.storage.draft import Answer, Draft, Transactions
from mint_catalog.storage.store import Store
from mint_catalog.work.leases import lease_lost, parse_resource, require_fence
from mint_catalog.work.recipes import MAX_STEPS
from mint_catalog.work.retries import Retries
from mint_catalog.work.runs import ended, with_events
from mint_catalog.work.waiting import leased_resource
from mint_core import failpoints
from mint_core.errors import InvalidArgument, Unavailable, WrongState
from mint_core.names import PolicyName, RevisionName, RunName, check_digest

__all__ = ["Outcome", "Reports"]

_MAX_REPORTED_STEPS: Final = 100
_MAX_METRICS: Final = 64
_COMMITTED = failpoints.declare("catalog.state.after", "the training state is current, the worker does not know yet")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker says that a run ended; QUEUED: the worker goes away and gives it back, which is no failure."""

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


class Reports:
    """Everything a worker tells about a claimed run."""

    def __init__(self, store: Store, tables: Tables, retries: Retries) -> None:
        self._store = store
        self._tables = tables
        self._retries = retries
        self._transactions = Transactions(store, tables.keys)

    async def _fenced(self, draft: Draft, name: RunName, fence: Fence) -> tuple[_Refs, Run]:
        """Let the draft commit only while the worker holds this very claim."""
        resource = parse_resource(fence.resource, field="fence.resource")
        refs = _Refs(self._tables.run(name), self._tables.claim(name), self._tables.lease(resource))
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
        """End a run, or give it back, and its lease with it, in one transaction.

        Raises ``InvalidArgument``, ``NotFound``, ``LeaseLost``, ``WrongState``.
        """
        if not outcome.state.ended and outcome.state is not RunState.QUEUED:
            raise InvalidArgument(
                f"state is {outcome.state.name}: expected SUCCEEDED, FAILED, CANCELLED, or QUEUED to give it back",
                field="state",
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
            if outcome.state is RunState.QUEUED:
                return self._retries.give_back(draft, refs.claim, run, outcome.error or "given back by its worker")
            if outcome.state is RunState.FAILED and outcome.retriable:
                return self._retries.after_failure(draft, refs.claim, run, outcome.error or "failed")
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
