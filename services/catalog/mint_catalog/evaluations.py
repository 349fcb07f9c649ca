"""Evaluations: what scoring a revision gave. Written once, never changed."""

from __future__ import annotations

import math
from dataclasses import replace

from mint_catalog.checks import check_range, check_text, live_policy, not_found
from mint_catalog.draft import Answer, Draft, Transactions, Written
from mint_catalog.leases import require_fence
from mint_catalog.paging import Page, list_page
from mint_catalog.records import Evaluation, Fence, Policy, now
from mint_catalog.revisions import own_revision
from mint_catalog.store import Store
from mint_catalog.tables import Tables
from mint_core.errors import AlreadyExists, InvalidArgument
from mint_core.names import EvaluationName, PolicyName, RevisionName, RunName, check_digest, check_id

__all__ = ["Evaluations"]

_MAX_METRICS = 256


class Evaluations:
    """Create, read and list evaluations."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def create(self, wanted: Evaluation, fence: Fence | None) -> Written[Evaluation]:
        """Record an evaluation, under the policy's fence if one is given.

        Raises ``InvalidArgument``, ``NotFound`` (policy, revision), ``AlreadyExists``, ``LeaseLost``.
        """
        policy = wanted.name.parent
        revision_name = _check(wanted, policy)
        head_ref, lease_ref = self._tables.policy(policy), self._tables.lease(policy)

        async def body(draft: Draft) -> Answer[Evaluation]:
            # An evaluation changes no revision and no alias, so the head may move meanwhile.
            await draft.fetch(head_ref, lease_ref, compare=False)
            head = live_policy(draft.get(head_ref), policy)
            if fence is not None:
                require_fence(draft, lease_ref, policy, fence)
            record = replace(wanted, create_time=now())
            if revision_name is not None:
                record = await self._with_digest(draft, head, record, revision_name)
            ref = self._tables.evaluation(wanted.name, head.uid)
            await draft.fetch(ref)
            if draft.get(ref) is not None:
                raise AlreadyExists(f"{wanted.name} exists; choose another id", metadata={"resource": str(wanted.name)})
            return draft.put(ref, record)

        return await self._transactions.run(body, self._tables.codecs.evaluation)

    async def _with_digest(self, draft: Draft, head: Policy, record: Evaluation, name: RevisionName) -> Evaluation:
        ref = self._tables.revision(name)
        await draft.fetch(ref, compare=False)
        revision = own_revision(draft.get(ref), head, name)
        digest = revision.blob.digest if revision.blob else ""
        if record.revision_digest not in ("", digest):
            raise InvalidArgument(
                f"evaluation.revision_digest is {record.revision_digest}: {name} has {digest}",
                field="evaluation.revision_digest",
            )
        return replace(record, revision_digest=digest)

    async def _uid(self, policy: PolicyName) -> str:
        ref = self._tables.policy(policy)
        kv = (await self._store.get([ref.key])).values[0]
        return live_policy(ref.codec.decode(kv) if kv else None, policy).uid

    async def get(self, name: EvaluationName) -> Evaluation:
        """Read one evaluation. Raises ``NotFound``."""
        ref = self._tables.evaluation(name, await self._uid(name.parent))
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)

    async def list(self, policy: PolicyName, *, page_size: int, page_token: str) -> Page[Evaluation]:
        """One page of a policy's evaluations by id. Raises ``NotFound``, ``InvalidArgument``, ``RevisionCompacted``."""
        uid = await self._uid(policy)
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
    if len(wanted.metrics) > _MAX_METRICS:
        raise InvalidArgument(
            f"evaluation.metrics has {len(wanted.metrics)} figures: at most {_MAX_METRICS}", field="evaluation.metrics"
        )
    for key, value in wanted.metrics.items():
        check_id(key, field="evaluation.metrics")
        if not math.isfinite(value):
            raise InvalidArgument(
                f"evaluation.metrics[{key!r}] is {value}: figures must be finite; leave it out",
                field=f"evaluation.metrics[{key!r}]",
            )
    if wanted.data_digest:
        check_digest(wanted.data_digest, field="evaluation.data_digest")
    if wanted.run:
        RunName.parse(wanted.run, field="evaluation.run")
    if not wanted.revision:
        return None
    name = RevisionName.parse(wanted.revision, field="evaluation.revision")
    if name.parent != policy:
        raise InvalidArgument(f"evaluation.revision is {name}: it must belong to {policy}", field="evaluation.revision")
    return name
