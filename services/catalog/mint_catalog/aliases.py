"""Aliases: movable names, moved by compare-and-set.

An alias embeds the number, digest, object key and base of what it points at, so that resolving it is one read. It
keeps its last 32 targets with who moved it there, when and why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from mint_catalog.checks import check_active, check_text, live_policy, not_found
from mint_catalog.draft import Answer, Draft, Transactions, Written
from mint_catalog.paging import check_revision, list_all
from mint_catalog.policies import MAX_ALIASES
from mint_catalog.records import (
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    Policy,
    Resolution,
    Revision,
    RevisionState,
    check_etag,
    now,
)
from mint_catalog.requests import Request
from mint_catalog.revisions import own_revision
from mint_catalog.store import Store, prefix_end
from mint_catalog.tables import Tables
from mint_core import failpoints
from mint_core.errors import InvalidArgument, ResourceExhausted, WrongState
from mint_core.names import AliasName, PolicyName, RevisionName

__all__ = ["Aliases", "Move"]

_MAX_HISTORY: Final = 32
_BEFORE = failpoints.declare("catalog.alias.before", "the alias's move is decided, not written yet")
_AFTER = failpoints.declare("catalog.alias.after", "the alias has moved, the answer is not sent yet")


@dataclass(frozen=True, slots=True)
class Move:
    """How an alias is asked to move."""

    name: AliasName
    revision_number: int
    """0 in a rollback: the previous distinct READY revision."""
    etag: str
    reason: str
    principal: str


class Aliases:
    """Promote, roll back, read, list and delete aliases."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def promote(self, move: Move, request: Request | None = None) -> Written[Alias]:
        """Point an alias at a READY revision, making the alias if needed.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``WrongState``, ``ResourceExhausted`` (too many
        aliases), ``RequestIdReused``.
        """
        if move.revision_number < 1:
            raise InvalidArgument(
                f"revision_number is {move.revision_number}: revisions are numbered from 1", field="revision_number"
            )
        return await self._move(move, request, may_create=True)

    async def rollback(self, move: Move, request: Request | None = None) -> Written[Alias]:
        """Point an alias back at the previous distinct READY revision of its history, or at a named one.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``WrongState``, ``RequestIdReused``.
        """
        if move.revision_number < 0:
            raise InvalidArgument(
                f"revision_number is {move.revision_number}: name a revision, or 0 for the previous one",
                field="revision_number",
            )
        return await self._move(move, request, may_create=False)

    async def _move(self, move: Move, request: Request | None, *, may_create: bool) -> Written[Alias]:
        check_text(move.reason, field="reason", max_chars=1024)
        policy = move.name.parent
        head_ref, ref = self._tables.policy(policy), self._tables.alias(move.name)

        async def body(draft: Draft) -> Answer[Alias]:
            await draft.fetch(head_ref, ref)
            head, alias = live_policy(draft.get(head_ref), policy), draft.get(ref)
            if alias is None and not may_create:
                raise not_found(move.name)
            check_etag(move.etag, alias.mod_revision if alias else 0, resource=move.name)
            if may_create:
                check_active(head)  # a rollback is allowed where a promotion is not
            if alias is None:
                await self._check_room(policy)
            if alias is not None and not move.revision_number:
                revision = await self._previous(draft, head, alias)
            else:
                revision = await self._ready(draft, head, move.revision_number)
            if alias is not None and alias.active is not None and alias.active.revision_number == revision.number:
                return Answer(ref, alias)
            draft.touch(head_ref)
            await _BEFORE.reached()
            return draft.put(ref, _moved(move, head, revision, alias))

        written = await self._transactions.run(body, self._tables.codecs.alias, request)
        await _AFTER.reached()
        return written

    async def _check_room(self, policy: PolicyName) -> None:
        # Another new alias would bump the head, so this count is as good as compared.
        prefix = self._tables.keys.aliases(policy)
        found = await self._store.scan(prefix, prefix_end(prefix), limit=MAX_ALIASES)
        if len(found.values) >= MAX_ALIASES:
            raise ResourceExhausted(
                f"{policy} has {MAX_ALIASES} aliases, the most a policy can have; delete one first",
                metadata={"resource": str(policy)},
            )

    async def _ready(self, draft: Draft, head: Policy, number: int) -> Revision:
        name = RevisionName(head.name.tenant, head.name.policy, number)
        ref = self._tables.revision(name)
        await draft.fetch(ref)
        revision = own_revision(draft.get(ref), head, name)
        if revision.state is not RevisionState.READY:
            raise WrongState(
                f"{name} is {revision.state.name}: an alias can only be pointed at a READY revision",
                metadata={"resource": str(name), "state": revision.state.name},
            )
        return revision

    async def _previous(self, draft: Draft, head: Policy, alias: Alias) -> Revision:
        """The newest entry of the history that is another revision than the present one, and READY."""
        present = alias.active.revision_number if alias.active else 0
        past = dict.fromkeys(entry.target.revision_number for entry in alias.history if entry.target)
        numbers = [number for number in past if number != present]
        refs = {
            number: self._tables.revision(RevisionName(head.name.tenant, head.name.policy, number))
            for number in numbers
        }
        if refs:
            # Whatever changes a revision bumps the head, which is compared.
            await draft.fetch(*refs.values(), compare=False)
        for ref in refs.values():
            revision = draft.get(ref)
            if revision is not None and revision.policy_uid == head.uid and revision.state is RevisionState.READY:
                return revision
        raise WrongState(
            f"{alias.name} has no earlier READY revision to roll back to; name one with revision_number",
            metadata={"resource": str(alias.name)},
        )

    async def get(self, name: AliasName, *, min_revision: int = 0) -> Alias:
        """Read one alias with its history. Raises ``NotFound``."""
        return (await self.read(name, min_revision=min_revision))[0]

    async def read(self, name: AliasName, *, min_revision: int = 0) -> tuple[Alias, int]:
        """One alias and the catalog revision it was read at, in one read. Raises ``NotFound``."""
        ref = self._tables.alias(name)
        result = await self._store.get([ref.key])
        check_revision(result.revision, min_revision)
        kv = result.values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv), result.revision

    async def list(self, policy: PolicyName) -> tuple[list[Alias], int]:
        """All aliases of a policy, and the catalog revision they were read at. Raises ``NotFound``."""
        ref = self._tables.policy(policy)
        result = await self._store.get([ref.key])
        kv = result.values[0]
        live_policy(ref.codec.decode(kv) if kv else None, policy)
        prefix = self._tables.keys.aliases(policy)
        return await list_all(self._store, prefix, self._tables.codecs.alias, revision=result.revision)

    async def delete(self, name: AliasName, etag: str = "", request: Request | None = None) -> int:
        """Delete an alias; returns the catalog revision. Raises ``NotFound``, ``EtagMismatch``."""
        head_ref, ref = self._tables.policy(name.parent), self._tables.alias(name)

        async def body(draft: Draft) -> Answer[Alias]:
            await draft.fetch(head_ref, ref)
            live_policy(draft.get(head_ref), name.parent)
            alias = draft.get(ref)
            if alias is None:
                raise not_found(name)
            check_etag(etag, alias.mod_revision, resource=name)
            draft.touch(head_ref)
            return draft.delete(ref)

        return await self._transactions.run_delete(body, self._tables.codecs.alias, request)


def _moved(move: Move, head: Policy, revision: Revision, alias: Alias | None) -> Alias:
    time = now()
    target = AliasTarget(revision.number, revision.blob.digest if revision.blob else "")
    entry = AliasHistoryEntry(target, Attribution(move.principal, time, move.reason))
    resolution = Resolution(
        revision=str(revision.name),
        blob=revision.blob,
        object_key=revision.object_key,
        base_model=head.base_model,
        base_digest=revision.base_digest,
    )
    history = (entry, *(alias.history if alias else ()))[:_MAX_HISTORY]
    known = alias or Alias(move.name, policy_uid=head.uid)
    return replace(known, active=target, history=history, update_time=time, resolution=resolution)
