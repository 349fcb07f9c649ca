"""Rollout batches: pointers to what a policy's training sampled, under keys of their own.

A rollout is written once, under the fence of the policy's lease, and never changes. It moves no revision and no
alias, so it leaves the head alone, however many steps a run has. One that is past its ``expire_time`` stays listed
until it is deleted: the list is how whoever deletes old batches finds them. The object goes first and the pointer
after it, so that a crash in between leaves a pointer that is deleted again and never an object that nothing names.
"""

from __future__ import annotations

from dataclasses import replace

from mint_catalog.model.checks import (
    check_finite,
    check_object_key,
    check_own_revision,
    check_range,
    check_text,
    live_policy,
    not_found,
)
from mint_catalog.model.records import Fence, Numerics, Rollout, now
from mint_catalog.model.tables import Tables
from mint_catalog.policies.heads import live_uid
from mint_catalog.policies.revisions import own_digest
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, list_page
from mint_catalog.storage.store import Store
from mint_catalog.work.leases import require_fence
from mint_core.errors import AlreadyExists, InvalidArgument
from mint_core.names import PolicyName, RevisionName, RolloutName, RunName, check_digest

__all__ = ["Rollouts"]


class Rollouts:
    """Create, read, list and delete rollouts."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def create(self, wanted: Rollout, fence: Fence) -> Written[Rollout]:
        """Record a batch whose object is stored. The same batch again answers the stored record.

        Raises ``InvalidArgument``, ``NotFound`` (policy, revision), ``AlreadyExists`` (another batch has the name),
        ``LeaseLost``.
        """
        policy = wanted.name.parent
        revision = _check(wanted, policy)
        head_ref, lease_ref = self._tables.policy(policy), self._tables.lease(policy)

        async def body(draft: Draft) -> Answer[Rollout]:
            # The head may move meanwhile; a deletion of the policy takes the lease along, which is compared.
            await draft.fetch(head_ref, lease_ref, compare=False)
            head = live_policy(draft.get(head_ref), policy)
            field = "rollout.revision_digest"
            digest = await own_digest(draft, self._tables, head, revision, wanted.revision_digest, field=field)
            record = replace(wanted, revision_digest=digest, create_time=now())
            ref = self._tables.rollout(wanted.name, head.uid)
            await draft.fetch(ref)
            stored = draft.get(ref)
            if stored is not None and stored == _as_stored(record, stored):
                # A retry, maybe after the lease was given back: nothing is written, so the fence does not matter.
                return Answer(ref, stored)
            require_fence(draft, lease_ref, policy, fence)
            if stored is not None:
                raise _taken(stored, record)
            return draft.put(ref, record)

        return await self._transactions.run(body, self._tables.codecs.rollout)

    async def get(self, name: RolloutName) -> Rollout:
        """Read one rollout. Raises ``NotFound``."""
        ref = self._tables.rollout(name, await live_uid(self._store, self._tables, name.parent))
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)

    async def list(self, policy: PolicyName, *, page_size: int, page_token: str, run: str = "") -> Page[Rollout]:
        """One page of a policy's rollouts by id, only those of ``run`` (a run name) if it is given.

        Raises ``NotFound``, ``InvalidArgument``, ``RevisionCompacted``.
        """
        if run:
            RunName.parse(run, field="run")
        uid = await live_uid(self._store, self._tables, policy)
        return await list_page(
            self._store,
            self._tables.keys.rollouts(policy, uid),
            self._tables.codecs.rollout,
            bound=f"rollouts\0{policy}\0{uid}\0{run}",
            page_size=page_size,
            page_token=page_token,
            keep=(lambda rollout: rollout.run == run) if run else None,
        )

    async def delete(self, name: RolloutName, fence: Fence) -> None:
        """Forget a rollout; one that is not there is a no-op. Raises ``NotFound`` (policy), ``LeaseLost``."""
        policy = name.parent
        head_ref, lease_ref = self._tables.policy(policy), self._tables.lease(policy)

        async def body(draft: Draft) -> Answer[Rollout]:
            await draft.fetch(head_ref, lease_ref, compare=False)
            head = live_policy(draft.get(head_ref), policy)
            require_fence(draft, lease_ref, policy, fence)
            return draft.delete(self._tables.rollout(name, head.uid))

        await self._transactions.run_delete(body, self._tables.codecs.rollout)


def _as_stored(record: Rollout, stored: Rollout) -> Rollout:
    """The record with what the catalog gave the stored one."""
    return replace(record, create_time=stored.create_time, mod_revision=stored.mod_revision)


def _taken(stored: Rollout, record: Rollout) -> AlreadyExists:
    told = _as_stored(record, stored)
    fields = [each for each in stored.__dataclass_fields__ if getattr(stored, each) != getattr(told, each)]
    return AlreadyExists(
        f"{stored.name} is another batch: it differs in {', '.join(fields)}; read it and go on from it, or choose "
        "another id",
        metadata={"resource": str(stored.name), "digest": stored.blob.digest if stored.blob else ""},
    )


def _check(wanted: Rollout, policy: PolicyName) -> RevisionName:
    revision = check_own_revision(wanted.revision, policy, field="rollout.revision")
    run = RunName.parse(wanted.run, field="rollout.run")
    if run.tenant != policy.tenant:
        raise InvalidArgument(f"rollout.run is {run}: it must belong to tenants/{policy.tenant}", field="rollout.run")
    check_range(wanted.step, field="rollout.step", least=1)
    check_object_key(wanted.object_key, policy.tenant, field="rollout.object_key")
    if wanted.blob is None:
        raise InvalidArgument("rollout.blob is missing: name the batch's digest and size", field="rollout.blob")
    check_digest(wanted.blob.digest, field="rollout.blob.digest")
    check_range(wanted.blob.size_bytes, field="rollout.blob.size_bytes", least=1)
    numerics = wanted.numerics or Numerics()
    for field in ("base_digest", "dtype", "quantization", "engine_version"):
        check_text(getattr(numerics, field), field=f"rollout.numerics.{field}", max_chars=256)
    check_range(wanted.num_samples, field="rollout.num_samples", least=0)
    check_range(wanted.num_unscored, field="rollout.num_unscored", least=0, most=wanted.num_samples)
    check_range(wanted.num_tokens, field="rollout.num_tokens", least=0)
    check_finite(wanted.reward_mean, field="rollout.reward_mean")
    if wanted.expire_time is None:
        raise InvalidArgument(
            "rollout.expire_time is missing: say until when the batch is kept", field="rollout.expire_time"
        )
    return revision
