"""Evaluations: what scoring a revision gave. Written once, never changed."""

from __future__ import annotations

from dataclasses import replace

from mint_catalog.model.checks import check_metrics, check_own_revision, check_range, check_text, live_policy, not_found
from mint_catalog.model.records import Evaluation, Fence, Policy, now
from mint_catalog.model.tables import Tables
from mint_catalog.policies.heads import live_uid
from mint_catalog.policies.revisions import own_digest
from mint_catalog.serving.canaries import judge_canaries
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, list_page
from mint_catalog.storage.store import Store
from mint_catalog.work.leases import require_fence
from mint_core.errors import AlreadyExists, InvalidArgument
from mint_core.names import EvaluationName, PolicyName, RevisionName, RunName, check_digest

__all__ = ["Evaluations"]

_MAX_METRICS = 256


class Evaluations:
    """Create, read and list evaluations."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def create(self, wanted: Evaluation, fence: Fence | None) -> Written[Evaluation]:
        """Record an evaluation; with a fence only while that lease is held, on the policy or on ``wanted.run``.

        A canary of the policy that breaks its alias's gate with it is taken back by the same transaction.
        What a run has recorded is answered again when the run records the same. Raises ``InvalidArgument``,
        ``NotFound`` (policy, revision, run), ``AlreadyExists``, ``LeaseLost``.
        """
        policy = wanted.name.parent
        revision = _check(wanted, policy)
        resource = _fenced_resource(wanted, policy, fence)
        head_ref, lease_ref = self._tables.policy(policy), self._tables.lease(resource)

        async def body(draft: Draft) -> Answer[Evaluation]:
            await draft.fetch(head_ref, lease_ref)
            head = live_policy(draft.get(head_ref), policy)
            record = replace(wanted, create_time=now())
            if revision is not None:
                field = "evaluation.revision_digest"
                digest = await own_digest(draft, self._tables, head, revision, wanted.revision_digest, field=field)
                record = replace(record, revision_digest=digest)
            ref = self._tables.evaluation(wanted.name, head.uid)
            await draft.fetch(ref)
            stored = draft.get(ref)
            if stored is not None and stored.run and stored == _as_stored(record, stored):
                # A retry, maybe after the lease was given back: nothing is written, so the fence does not matter.
                return Answer(ref, stored)
            if fence is not None:
                if isinstance(resource, RunName):
                    await self._check_run(draft, resource, head)
                require_fence(draft, lease_ref, resource, fence)
            if stored is not None:
                raise AlreadyExists(f"{wanted.name} exists; choose another id", metadata={"resource": str(wanted.name)})
            # In one transaction, so that no evaluation is kept whose canary stays out against its gate.
            await judge_canaries(draft, self._store, self._tables, head, record)
            return draft.put(ref, record)

        return await self._transactions.run(body, self._tables.codecs.evaluation)

    async def _check_run(self, draft: Draft, name: RunName, head: Policy) -> None:
        """The run whose fence it is must be of this very policy: another one's grants nothing here."""
        ref = self._tables.run(name)
        await draft.fetch(ref, compare=False)
        run = draft.get(ref)
        if run is None:
            raise not_found(name)
        if run.policy != str(head.name) or run.policy_uid != head.uid:
            raise InvalidArgument(
                f"evaluation.run is {name}: it is a run of {run.policy} ({run.policy_uid}), not of {head.name} "
                f"({head.uid})",
                field="evaluation.run",
            )

    async def get(self, name: EvaluationName) -> Evaluation:
        """Read one evaluation. Raises ``NotFound``."""
        ref = self._tables.evaluation(name, await live_uid(self._store, self._tables, name.parent))
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)

    async def list(self, policy: PolicyName, *, page_size: int, page_token: str) -> Page[Evaluation]:
        """One page of a policy's evaluations by id. Raises ``NotFound``, ``InvalidArgument``, ``RevisionCompacted``."""
        uid = await live_uid(self._store, self._tables, policy)
        return await list_page(
            self._store,
            self._tables.keys.evaluations(policy, uid),
            self._tables.codecs.evaluation,
            bound=f"evaluations\0{policy}\0{uid}",
            page_size=page_size,
            page_token=page_token,
        )


def _check(wanted: Evaluation, policy: PolicyName) -> RevisionName | None:
    check_text(wanted.scorer, field="evaluation.scorer", max_chars=128)
    check_range(wanted.num_examples, field="evaluation.num_examples", least=0)
    check_metrics(wanted.metrics, field="evaluation.metrics", most=_MAX_METRICS)
    if wanted.data_digest:
        check_digest(wanted.data_digest, field="evaluation.data_digest")
    if wanted.run:
        RunName.parse(wanted.run, field="evaluation.run")
    if not wanted.revision:
        return None
    return check_own_revision(wanted.revision, policy, field="evaluation.revision")


def _fenced_resource(wanted: Evaluation, policy: PolicyName, fence: Fence | None) -> PolicyName | RunName:
    """Whose lease the fence is of: the evaluating run's, or the policy's."""
    if fence is None or "/runs/" not in fence.resource:
        return policy
    if fence.resource != wanted.run:
        raise InvalidArgument(
            f"fence.resource is {fence.resource[:120]!r}: expected the fence of evaluation.run, {wanted.run!r}, or of "
            f"{policy}",
            field="fence.resource",
        )
    return RunName.parse(fence.resource, field="fence.resource")


def _as_stored(record: Evaluation, stored: Evaluation) -> Evaluation:
    """The record with what the catalog gave the stored one."""
    return replace(record, create_time=stored.create_time, mod_revision=stored.mod_revision)
