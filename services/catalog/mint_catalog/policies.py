"""Policy records: the heads.

A head is the one serialization point of its policy: every write to the policy's revisions or aliases compares and
bumps it. Deletion leaves a tombstone that keeps the next revision number, so that a name made again is another policy
(another uid) and still never gives a number twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from mint_catalog import policy_filter
from mint_catalog.checks import check_labels, check_lora, check_text, live_policy, not_found
from mint_catalog.draft import Answer, Draft, Transactions, Written
from mint_catalog.paging import Page, check_revision, list_page
from mint_catalog.records import Policy, PolicyState, check_etag, now
from mint_catalog.requests import Request
from mint_catalog.store import Store, prefix_end
from mint_catalog.tables import Tables
from mint_core.errors import AlreadyExists, InvalidArgument, WrongState
from mint_core.names import AliasName, BaseModelName, PolicyName, RevisionName, TenantName

__all__ = ["MAX_ALIASES", "Policies", "live_uid"]

MAX_ALIASES: Final = 50
"""Aliases of one policy; deletion buries them all in one transaction of at most 128 operations."""

_MUTABLE: Final = ("description", "labels", "lora", "owner")


async def live_uid(store: Store, tables: Tables, name: PolicyName) -> str:
    """uid of a policy that is not deleted. Raises ``NotFound``."""
    ref = tables.policy(name)
    kv = (await store.get([ref.key])).values[0]
    return live_policy(ref.codec.decode(kv) if kv else None, name).uid


class Policies:
    """Create, read, change, delete and list policies."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def create(self, name: PolicyName, wanted: Policy, request: Request | None = None) -> Written[Policy]:
        """Create a policy over a registered base model.

        Raises ``InvalidArgument``, ``NotFound`` (base model), ``AlreadyExists``, ``RequestIdReused``.
        """
        base_name = BaseModelName.parse(wanted.base_model, field="policy.base_model")
        lora = check_lora(wanted.lora, field="policy.lora")
        _check_fields(wanted)
        head_ref, base_ref = self._tables.policy(name), self._tables.base_model(base_name)

        async def body(draft: Draft) -> Answer[Policy]:
            await draft.fetch(head_ref, base_ref)
            old, base = draft.get(head_ref), draft.get(base_ref)
            if old is not None and old.state is not PolicyState.DELETED:
                raise AlreadyExists(
                    f"{name} exists; choose another id or update it", metadata={"resource": str(name), "uid": old.uid}
                )
            if base is None:
                raise not_found(base_name, "register the base model first")
            time = now()
            head = Policy(
                name=name,
                uid=str(uuid.uuid4()),
                base_model=str(base_name),
                base_digest=base.digest,
                lora=lora,
                labels=wanted.labels,
                owner=wanted.owner,
                description=wanted.description,
                state=PolicyState.ACTIVE,
                next_revision_number=old.next_revision_number if old else 1,
                create_time=time,
                update_time=time,
            )
            return draft.put(head_ref, head)

        return await self._transactions.run(body, self._tables.codecs.policy, request)

    async def get(self, name: PolicyName, *, min_revision: int = 0) -> Policy:
        """Read one policy. Raises ``NotFound``."""
        ref = self._tables.policy(name)
        result = await self._store.get([ref.key])
        check_revision(result.revision, min_revision)
        kv = result.values[0]
        return live_policy(ref.codec.decode(kv) if kv else None, name)

    async def update(
        self, name: PolicyName, wanted: Policy, mask: Collection[str], etag: str = "", request: Request | None = None
    ) -> Written[Policy]:
        """Take the masked fields of ``wanted``.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``WrongState`` (lora of a policy that has a
        training state or a revision), ``RequestIdReused``.
        """
        _check_mask(mask)
        lora = check_lora(wanted.lora, field="policy.lora") if "lora" in mask else None
        _check_fields(wanted)
        ref = self._tables.policy(name)

        async def body(draft: Draft) -> Answer[Policy]:
            await draft.fetch(ref)
            head = live_policy(draft.get(ref), name)
            check_etag(etag, head.mod_revision, resource=name)
            plain = {path: getattr(wanted, path) for path in mask if path != "lora"}
            changed = replace(head, update_time=now(), **plain)
            if lora is not None and lora != head.lora:
                await self._check_untrained(draft, head)
                changed = replace(changed, lora=lora)
            return draft.put(ref, changed)

        return await self._transactions.run(body, self._tables.codecs.policy, request)

    async def _check_untrained(self, draft: Draft, head: Policy) -> None:
        revision = None
        if head.next_revision_number > 1:
            newest = RevisionName(head.name.tenant, head.name.policy, head.next_revision_number - 1)
            await draft.fetch(self._tables.revision(newest), compare=False)
            revision = draft.get(self._tables.revision(newest))
        if head.latest_training_state is not None or (revision is not None and revision.policy_uid == head.uid):
            raise WrongState(
                f"{head.name} has been trained: lora cannot change any more; create another policy",
                metadata={"resource": str(head.name), "state": head.state.name},
            )

    async def delete(self, name: PolicyName, etag: str = "", request: Request | None = None) -> int:
        """Delete a policy, its aliases and its lease in one transaction; returns the catalog revision.

        The head stays as a tombstone, the aliases go to their grave, where an undelete finds them.
        Raises ``NotFound``, ``EtagMismatch``, ``RequestIdReused``.
        """
        ref, keys = self._tables.policy(name), self._tables.keys

        async def body(draft: Draft) -> Answer[Policy]:
            await draft.fetch(ref)
            head = live_policy(draft.get(ref), name)
            check_etag(etag, head.mod_revision, resource=name)
            aliases = keys.aliases(name)
            # A new alias bumps the head, so this scan is as good as compared.
            for kv in (await self._store.scan(aliases, prefix_end(aliases), limit=MAX_ALIASES)).values:
                alias: AliasName = keys.alias_name(kv.key)
                draft.delete_key(kv.key)
                draft.put_bytes(keys.grave(alias, head.uid), kv.value)
            draft.delete(self._tables.lease(name))
            time = now()
            draft.put(ref, replace(head, state=PolicyState.DELETED, update_time=time, delete_time=time))
            return Answer(ref, None)

        return await self._transactions.run_delete(body, self._tables.codecs.policy, request)

    async def list(
        self,
        tenant: TenantName,
        *,
        page_size: int,
        page_token: str,
        filter_: str = "",
        order_by: str = "",
        min_revision: int = 0,
    ) -> Page[Policy]:
        """One page of a tenant's policies. Raises ``InvalidArgument``, ``RevisionCompacted``."""
        if order_by:
            raise InvalidArgument(
                f"order_by is {order_by[:80]!r}: only the store's own order is offered; leave it empty",
                field="order_by",
            )
        return await list_page(
            self._store,
            self._tables.keys.family("policies", tenant.tenant),
            self._tables.codecs.policy,
            bound=f"policies\0{tenant.tenant}\0{filter_}",
            page_size=page_size,
            page_token=page_token,
            sharded=True,
            keep=policy_filter.parse(filter_),
            min_revision=min_revision,
        )


def _check_fields(policy: Policy) -> None:
    check_labels(policy.labels, field="policy.labels")
    check_text(policy.owner, field="policy.owner", max_chars=256)
    check_text(policy.description, field="policy.description", max_chars=1024)


def _check_mask(mask: Collection[str]) -> None:
    if not mask:
        raise InvalidArgument(
            f"update_mask is empty: name the fields to change, of {', '.join(_MUTABLE)}", field="update_mask"
        )
    for path in mask:
        if path not in _MUTABLE:
            raise InvalidArgument(
                f"update_mask has {path[:80]!r}: only {', '.join(_MUTABLE)} can change", field="update_mask"
            )
