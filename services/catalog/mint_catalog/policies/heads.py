"""Policy records: the heads.

A head is the one serialization point of its policy: every write to the policy's revisions or aliases compares and
bumps it. Deletion leaves a tombstone that keeps the next revision number, so that a name made again is another policy
(another uid) and still never gives a number twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final

from mint_catalog.model.checks import check_lora, live_policy, not_found
from mint_catalog.model.records import Policy, PolicyState, Revision, check_etag, now
from mint_catalog.model.tables import Tables
from mint_catalog.policies.creation import NewPolicy, Prepared, assemble, check_fields, prepare
from mint_catalog.policies.policy_listing import PolicyQuery, list_policies
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, check_revision
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Store, prefix_end
from mint_core.errors import InvalidArgument, WrongState
from mint_core.names import AliasName, PolicyName, RevisionName

__all__ = ["MAX_ALIASES", "Policies", "live_uid"]

MAX_ALIASES: Final = 50
"""Aliases of one policy; deletion buries them all in one transaction of at most 128 operations."""

_MUTABLE: Final = ("description", "labels", "lora", "owner", "quota", "state")


async def live_uid(store: Store, tables: Tables, name: PolicyName) -> str:
    """uid of a policy that is not deleted. Raises ``NotFound``."""
    ref = tables.policy(name)
    kv = (await store.get([ref.key])).values[0]
    return live_policy(ref.codec.decode(kv) if kv else None, name).uid


class Policies:
    """Create, read, change, delete, undelete and list policies."""

    def __init__(self, store: Store, tables: Tables, *, undelete_grace_s: float = 30 * 86_400.0) -> None:
        self._store = store
        self._tables = tables
        self._undelete_grace = timedelta(seconds=undelete_grace_s)
        self._transactions = Transactions(store, tables.keys)

    async def create(
        self,
        name: PolicyName,
        wanted: Policy,
        request: Request | None = None,
        *,
        revisions: Sequence[Revision] = (),
        aliases: Mapping[str, int] | None = None,
    ) -> Written[Policy]:
        """Create a policy over a registered base model, with adapters that exist already and aliases on them.

        Raises ``InvalidArgument``, ``NotFound`` (base model), ``AlreadyExists``, ``BlobMissing``,
        ``BaseModelMismatch``, ``ResourceExhausted`` (quota), ``RequestIdReused``.
        """
        return await self.create_prepared(prepare(NewPolicy(name, wanted, revisions, aliases or {}, request)))

    async def create_prepared(self, prepared: Prepared) -> Written[Policy]:
        """:meth:`create` after its checks of what does not depend on the store."""
        tables, name = self._tables, prepared.name
        head_ref, base_ref = tables.policy(name), tables.base_model(prepared.base_model)
        blob_refs = {blob: tables.blob(blob) for blob in prepared.blobs}
        # A fresh name's revisions begin at 1: what the audit trail wants to know of them is read with the rest.
        first = [tables.revision(RevisionName(name.tenant, name.policy, n + 1)) for n in range(len(prepared.digests))]
        alias_refs = [tables.alias(alias) for alias, _ in prepared.aliases]

        async def body(draft: Draft) -> Answer[Policy]:
            await draft.fetch(head_ref, base_ref, *blob_refs.values(), *first, *alias_refs)
            old = draft.get(head_ref)
            blobs = {blob.digest: draft.get(ref) for blob, ref in blob_refs.items()}
            made = assemble(prepared, old, draft.get(base_ref), blobs, now())
            for ref in blob_refs.values():
                draft.hold(ref)
            if old is not None and old.uid:  # it cannot come back any more; garbage collection removes what it left
                purge = tables.keys.purge(name, old.uid)
                draft.put_bytes(purge, str(old.next_revision_number).encode())
            for revision in made.revisions:
                draft.put(tables.revision(revision.name), revision)
            for alias in made.aliases:
                draft.put(tables.alias(alias.name), alias)
            return draft.put(head_ref, made.head)

        return await self._transactions.run(body, tables.codecs.policy, prepared.request)

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
        check_fields(wanted)
        if "state" in mask and wanted.state not in (PolicyState.ACTIVE, PolicyState.PAUSED):
            raise InvalidArgument(
                f"policy.state is {wanted.state.name}: an update sets ACTIVE or PAUSED; delete or undelete the policy "
                "for another",
                field="policy.state",
            )
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
            deleted = replace(
                head, state=PolicyState.DELETED, undelete_state=head.state, update_time=time, delete_time=time
            )
            draft.put(ref, deleted)
            return Answer(ref, None)

        return await self._transactions.run_delete(body, self._tables.codecs.policy, request)

    async def undelete(self, name: PolicyName, request: Request | None = None) -> Written[Policy]:
        """Bring back a deleted policy with its aliases, in the state it had, until the grace period is over.

        Raises ``NotFound``, ``WrongState`` (not deleted), ``RequestIdReused``.
        """
        ref, keys = self._tables.policy(name), self._tables.keys

        async def body(draft: Draft) -> Answer[Policy]:
            await draft.fetch(ref)
            head = draft.get(ref)
            if head is None:
                raise not_found(name)
            if head.state is not PolicyState.DELETED:
                raise WrongState(
                    f"{name} is {head.state.name}: only a deleted policy can be undeleted",
                    metadata={"resource": str(name), "state": head.state.name},
                )
            time = now()
            if not head.uid or head.delete_time is None or time - head.delete_time > self._undelete_grace:
                raise not_found(name, f"it was deleted more than {self._undelete_grace} ago and cannot come back")
            graves = keys.graves(name, head.uid)
            # Whatever changes the graves changes the head, so this scan is as good as compared.
            for kv in (await self._store.scan(graves, prefix_end(graves), limit=MAX_ALIASES)).values:
                draft.delete_key(kv.key)
                draft.put_bytes(keys.alias(keys.alias_name(kv.key)), kv.value)
            restored = replace(
                head,
                state=head.undelete_state or PolicyState.ACTIVE,
                undelete_state=PolicyState.UNSPECIFIED,
                update_time=time,
                delete_time=None,
            )
            return draft.put(ref, restored)

        return await self._transactions.run(body, self._tables.codecs.policy, request)

    async def list(self, query: PolicyQuery) -> Page[Policy]:
        """One page of policies. Raises ``InvalidArgument``, ``RevisionCompacted``."""
        return await list_policies(self._store, self._tables, query)


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
