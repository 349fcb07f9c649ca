"""Runs as users see them: queue one, read, list, cancel, retry."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mint_catalog.model.checks import check_active, check_range, check_text, live_policy, not_found
from mint_catalog.model.records import BlobRef, Policy, now
from mint_catalog.model.run_records import Run, RunEvent, RunProgress, RunState, RunStep
from mint_catalog.model.tables import Tables
from mint_catalog.policies.blobs import verified_blob
from mint_catalog.policies.quota import check_open_runs
from mint_catalog.policies.revisions import own_revision
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, list_page
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Store
from mint_catalog.work.recipes import check_recipe, data_blobs, evaluated, num_steps, with_blobs
from mint_catalog.work.waiting import dequeue, enqueue
from mint_core.errors import AlreadyExists, InvalidArgument, WrongState
from mint_core.names import BlobName, PolicyName, RevisionName, RunName, TenantName, check_id

__all__ = ["Runs", "ended", "with_events"]

_MAX_EVENTS: Final = 64
_MAX_PRIORITY: Final = 1_000_000


def with_events(run: Run, *events: RunEvent) -> Run:
    """The run with events appended; the newest 64 are kept."""
    return replace(run, events=(*run.events, *events)[-_MAX_EVENTS:])


def ended(run: Run, state: RunState, *, kind: str, message: str, error: str = "") -> Run:
    """The run in a last state."""
    time = now()
    return with_events(replace(run, state=state, error=error, end_time=time), RunEvent(time, kind, message))


class Runs:
    """Create, read, list, cancel and retry runs."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def create(
        self, tenant: TenantName, run_id: str, wanted: Run, request: Request | None = None
    ) -> Written[Run]:
        """Queue a run; an empty ``run_id`` lets the catalog choose. ``wanted.name`` is ignored.

        Raises ``InvalidArgument``, ``NotFound``, ``AlreadyExists``, ``BlobMissing``, ``WrongState`` (policy not
        ACTIVE), ``ResourceExhausted`` (quota), ``RequestIdReused``.
        """
        policy = PolicyName.parse(wanted.policy, field="run.policy")
        if policy.tenant != tenant.tenant:
            raise InvalidArgument(f"run.policy is {policy}: it must belong to parent, {tenant}", field="run.policy")
        check_recipe(wanted, policy)
        check_range(wanted.priority, field="run.priority", least=-_MAX_PRIORITY, most=_MAX_PRIORITY)
        if run_id:
            check_id(run_id, field="run_id")
        head_ref = self._tables.policy(policy)

        async def body(draft: Draft) -> Answer[Run]:
            name = RunName(tenant.tenant, run_id or f"run-{uuid.uuid4().hex[:12]}")
            ref = self._tables.run(name)
            await draft.fetch(ref, head_ref)
            if draft.get(ref) is not None:
                raise AlreadyExists(f"{name} exists; choose another id", metadata={"resource": str(name)})
            head = live_policy(draft.get(head_ref), policy)
            check_active(head)
            await check_open_runs(self._store, self._tables, draft, head)
            sizes = await self._use_data(draft, tenant.tenant, wanted)
            await self._check_evaluated(draft, wanted, head)
            time = now()
            run = Run(
                name=name,
                policy=str(policy),
                continue_from_latest=wanted.continue_from_latest,
                publish=wanted.publish,
                promote_alias=wanted.promote_alias,
                priority=wanted.priority,
                sft=wanted.sft,
                grpo=wanted.grpo,
                dpo=wanted.dpo,
                evaluation=wanted.evaluation,
                state=RunState.QUEUED,
                progress=RunProgress(num_steps=num_steps(wanted.recipe), update_time=time),
                events=(RunEvent(time, "queued", "waits for a worker"),),
                create_time=time,
                policy_uid=head.uid,
            )
            run = with_blobs(run, lambda blob: sizes[blob.digest])
            enqueue(draft, self._tables, head.base_model, run)
            return draft.put(ref, run)

        return await self._transactions.run(body, self._tables.codecs.run, request)

    async def _use_data(self, draft: Draft, tenant: str, run: Run) -> dict[str, BlobRef]:
        """Let the draft commit only while the run's data is stored; answers it by digest, with its true size."""
        blobs = {blob.digest: BlobName(tenant, blob.digest) for blob in data_blobs(run).values()}
        refs = {digest: self._tables.blob(name) for digest, name in blobs.items()}
        if refs:
            await draft.fetch(*refs.values())
        sizes: dict[str, BlobRef] = {}
        for digest, ref in refs.items():
            record = verified_blob(draft.get(ref), blobs[digest])
            sizes[digest] = record.blob or BlobRef(digest)
            draft.hold(ref)  # a condemnation under way loses
        return sizes

    async def _check_evaluated(self, draft: Draft, wanted: Run, head: Policy) -> None:
        if wanted.evaluation is None:
            return
        name = evaluated(wanted.evaluation, head.name)
        if isinstance(name, RevisionName):
            ref = self._tables.revision(name)
            await draft.fetch(ref)
            own_revision(draft.get(ref), head, name)
        elif str(name) != head.base_model:
            raise InvalidArgument(
                f"run.evaluation.revision is {name}: the base of {head.name} is {head.base_model}",
                field="run.evaluation.revision",
            )

    async def get(self, name: RunName) -> Run:
        """Read one run. Raises ``NotFound``."""
        return (await self.read(name))[0]

    async def read(self, name: RunName) -> tuple[Run, int]:
        """One run and the catalog revision it was read at. Raises ``NotFound``."""
        ref = self._tables.run(name)
        result = await self._store.get([ref.key])
        kv = result.values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv), result.revision

    async def list(
        self,
        tenant: TenantName,
        *,
        page_size: int,
        page_token: str,
        policies: Sequence[str] = (),
        state: RunState = RunState.UNSPECIFIED,
        dead_letter: bool = False,
    ) -> Page[Run]:
        """One page of a tenant's runs: those of ``policies`` if any are named, those in ``state`` if it is not
        UNSPECIFIED, with ``dead_letter`` only those that have failed for good.

        Raises ``InvalidArgument``, ``RevisionCompacted``.
        """

        def keep(run: Run) -> bool:
            return (
                (not policies or run.policy in policies)
                and state in (RunState.UNSPECIFIED, run.state)
                and (run.dead_letter or not dead_letter)
            )

        return await list_page(
            self._store,
            self._tables.keys.family("runs", tenant.tenant),
            self._tables.codecs.run,
            bound=f"runs\0{tenant.tenant}\0{','.join(policies)}\0{int(state)}\0{int(dead_letter)}",
            page_size=page_size,
            page_token=page_token,
            sharded=True,
            keep=keep if policies or state or dead_letter else None,
        )

    async def steps(self, name: RunName, *, page_size: int, page_token: str) -> Page[RunStep]:
        """One page of the figures of a run's steps, oldest first.

        Raises ``NotFound``, ``InvalidArgument``, ``RevisionCompacted``.
        """
        await self.get(name)
        return await list_page(
            self._store,
            self._tables.keys.run_steps(name),
            self._tables.codecs.run_step,
            bound=f"runSteps\0{name}",
            page_size=page_size,
            page_token=page_token,
        )

    async def cancel(self, name: RunName, reason: str) -> Run:
        """Ask a run to stop: a queued one ends at once, a claimed one is told by its next report.

        Raises ``NotFound``, ``WrongState`` when it has ended.
        """
        check_text(reason, field="reason", max_chars=1024)
        ref = self._tables.run(name)

        async def body(draft: Draft) -> Answer[Run]:
            await draft.fetch(ref)
            run = draft.get(ref)
            if run is None:
                raise not_found(name)
            if run.state.ended:
                raise WrongState(
                    f"{name} has {run.state.name}: there is nothing to cancel",
                    metadata={"resource": str(name), "state": run.state.name},
                )
            draft.reason = reason
            message = reason or "cancelled"
            if run.state is RunState.CANCELLING:
                return Answer(ref, run)
            if run.state is RunState.RUNNING:
                event = RunEvent(now(), "cancelling", message)
                return draft.put(ref, with_events(replace(run, state=RunState.CANCELLING), event))
            head_ref = self._tables.policy(PolicyName.parse(run.policy))
            await draft.fetch(head_ref, compare=False)
            head = draft.get(head_ref)
            if head is not None:
                # A tombstone still knows the base; a queue entry that is left over is dropped by the next claim.
                dequeue(draft, self._tables, head.base_model, run)
            return draft.put(ref, ended(run, RunState.CANCELLED, kind="cancelled", message=message))

        return (await self._transactions.run(body, self._tables.codecs.run)).record

    async def retry(self, name: RunName, reason: str, actor: str, request: Request | None = None) -> Run:
        """Queue a run that has failed again, with its failures counted anew; it goes on from its newest state.

        Raises ``NotFound`` (also for a policy that was deleted), ``WrongState`` (not FAILED, or the policy is not
        ACTIVE), ``BlobMissing``, ``ResourceExhausted`` (quota), ``RequestIdReused``.
        """
        check_text(reason, field="reason", max_chars=1024)
        ref = self._tables.run(name)

        async def body(draft: Draft) -> Answer[Run]:
            draft.reason = reason
            await draft.fetch(ref)
            run = draft.get(ref)
            if run is None:
                raise not_found(name)
            if run.state is not RunState.FAILED:
                raise WrongState(
                    f"{name} is {run.state.name}: only a FAILED run is retried; create a new one instead",
                    metadata={"resource": str(name), "state": run.state.name},
                )
            policy = PolicyName.parse(run.policy)
            head_ref = self._tables.policy(policy)
            await draft.fetch(head_ref)
            head = live_policy(draft.get(head_ref), policy)
            if head.uid != run.policy_uid:
                raise not_found(policy, f"the policy of {name} was deleted, and this is another one of its name")
            check_active(head)
            await check_open_runs(self._store, self._tables, draft, head)
            await self._use_data(draft, name.tenant, run)
            await self._check_evaluated(draft, run, head)
            run = replace(
                run, state=RunState.QUEUED, error="", end_time=None, dead_letter=False, num_failures=0, worker=""
            )
            enqueue(draft, self._tables, head.base_model, run)
            message = f"by {actor}: {reason}" if reason else f"by {actor}"
            return draft.put(ref, with_events(run, RunEvent(now(), "retried", message)))

        return (await self._transactions.run(body, self._tables.codecs.run, request)).record
