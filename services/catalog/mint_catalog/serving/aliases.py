"""Aliases: movable names, moved by compare-and-set.

An alias embeds the number, digest, object key and base of what it points at, and of its canary, so that resolving it
is one read. It keeps its last 32 targets with who moved it there, when and why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from mint_catalog.model.checks import check_active, check_text, live_policy, not_found
from mint_catalog.model.records import (
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    Canary,
    Gate,
    Policy,
    Revision,
    RevisionState,
    check_etag,
    now,
)
from mint_catalog.model.tables import Tables
from mint_catalog.policies.heads import MAX_ALIASES
from mint_catalog.policies.revisions import own_revision
from mint_catalog.serving.canaries import (
    MAX_HISTORY,
    canary_shortfalls,
    check_canary,
    taken_back,
    with_canary,
    without_canary,
)
from mint_catalog.serving.gates import Shortfall, check_gate, gate_not_met, read_evidence, shortfalls, told
from mint_catalog.serving.residency import Residency
from mint_catalog.serving.split import resolution_of
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import check_revision, list_all
from mint_catalog.storage.recent import Recent
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Store, prefix_end
from mint_core import failpoints
from mint_core.errors import InvalidArgument, ResourceExhausted, WrongState
from mint_core.names import AliasName, PolicyName, RevisionName

__all__ = ["Aliases", "Edit", "Move"]

_MAX_REASON: Final = 1024
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
    ignore_gate: bool = False
    """Promote although the gate is not met; needs a reason."""
    min_resident_replicas: int = 0
    """Promote when as many READY engine replicas hold the revision; 0 waits for none."""
    residency_timeout_s: float = 0.0
    """How long to wait for them; 0 means 60 s."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Which alias is asked to be changed, and why."""

    name: AliasName
    etag: str = ""
    reason: str = ""


class Aliases:
    """Promote, roll back, try out, guard, read, list and delete aliases."""

    def __init__(
        self, store: Store, tables: Tables, residency: Residency | None = None, recent: Recent | None = None
    ) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys, recent)
        self._residency = residency or Residency(store, tables)

    async def promote(self, move: Move, request: Request | None = None) -> Written[Alias]:
        """Point an alias at a READY revision, making the alias if needed.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``WrongState``, ``GateNotMet``,
        ``DeadlineExceeded`` (too few replicas hold it in time), ``ResourceExhausted`` (too many aliases, or too many
        wait), ``RequestIdReused``.
        """
        if move.revision_number < 1:
            raise InvalidArgument(
                f"revision_number is {move.revision_number}: revisions are numbered from 1", field="revision_number"
            )
        if move.ignore_gate and not move.reason:
            raise InvalidArgument(
                "reason is empty: say why the gate is ignored; the alias's history keeps it", field="reason"
            )
        if move.min_resident_replicas:
            self._residency.check(move.min_resident_replicas, move.residency_timeout_s)
            # Whatever can be refused is refused before the wait; what was decided is decided again after it.
            if await self._transactions.would_write(self._body(move, may_create=True), request):
                head, revision = await self._wanted(move)
                await self._residency.wait(head, revision, move.min_resident_replicas, move.residency_timeout_s)
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

    async def _wanted(self, move: Move) -> tuple[Policy, Revision]:
        draft = Draft(self._store, self._tables.keys, None)
        head_ref = self._tables.policy(move.name.parent)
        await draft.fetch(head_ref)
        head = live_policy(draft.get(head_ref), move.name.parent)
        return head, await self._ready(draft, head, move.revision_number)

    async def _move(self, move: Move, request: Request | None, *, may_create: bool) -> Written[Alias]:
        body = self._body(move, may_create=may_create)
        written = await self._transactions.run(body, self._tables.codecs.alias, request)
        await _AFTER.reached()
        return written

    def _body(self, move: Move, *, may_create: bool) -> Callable[[Draft], Awaitable[Answer[Alias]]]:
        check_text(move.reason, field="reason", max_chars=_MAX_REASON)
        policy = move.name.parent
        head_ref, ref = self._tables.policy(policy), self._tables.alias(move.name)
        number = move.revision_number
        named = [self._tables.revision(RevisionName(policy.tenant, policy.policy, number))] if number else []

        async def body(draft: Draft) -> Answer[Alias]:
            await draft.fetch(head_ref, ref, *named)  # all in one read
            draft.reason = move.reason
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
            ignored = await self._pass_gate(move, head, revision, alias) if may_create and alias else []
            draft.touch(head_ref)
            await _BEFORE.reached()
            if ignored:
                draft.reason = _ignoring(move.reason, ignored)
            return draft.put(ref, _moved(replace(move, reason=draft.reason), head, revision, alias))

        return body

    async def _pass_gate(self, move: Move, head: Policy, revision: Revision, alias: Alias) -> list[Shortfall]:
        """What the revision lacks of the alias's gate and is ignored; raises ``GateNotMet`` where it is not."""
        if alias.gate is None:
            return []
        active = _active_name(alias)
        evidence = await read_evidence(self._store, self._tables, head, {str(revision.name), active})
        found = shortfalls(alias.gate, evidence, str(revision.name), active)
        if found and not move.ignore_gate:
            advice = "evaluate it (`mint eval`), promote another revision, or set ignore_gate and say why"
            raise gate_not_met(alias.name, found, advice=advice)
        return found

    async def set_canary(self, edit: Edit, canary: Canary | None, request: Request | None = None) -> Written[Alias]:
        """Try a READY revision on a share of the sticky keys, or (None) end the trial.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``WrongState``, ``GateNotMet`` (an evaluation of it
        falls short already; that none was made yet is no reason), ``RequestIdReused``.
        """
        if canary is not None:
            check_canary(canary)

        async def change(draft: Draft, head: Policy, alias: Alias) -> Alias:
            if canary is None:
                return without_canary(alias) if alias.canary is not None else alias
            check_active(head)
            target = canary.target or AliasTarget()
            revision = await self._ready(draft, head, target.revision_number)
            digest = revision.blob.digest if revision.blob else ""
            if target.digest not in ("", digest):
                raise InvalidArgument(
                    f"canary.target.digest is {target.digest[:80]!r}: {revision.name} has {digest}; leave it out",
                    field="canary.target.digest",
                )
            if alias.active is not None and alias.active.revision_number == revision.number:
                raise InvalidArgument(
                    f"canary.target.revision_number is {revision.number}: {alias.name} points there already; try "
                    "another revision",
                    field="canary.target.revision_number",
                )
            wanted = replace(canary, target=AliasTarget(revision.number, digest))
            changed = with_canary(alias, wanted, resolution_of(head, revision))
            found = await self._canary_shortfalls(head, changed)
            if found:
                raise gate_not_met(alias.name, found, advice="try another revision, or change the gate")
            return changed if changed.canary != alias.canary else alias

        return await self._edit(edit, change, request)

    async def set_gate(self, edit: Edit, gate: Gate | None, request: Request | None = None) -> Written[Alias]:
        """Set what promotions and the canary must show, or (None) nothing; a canary that falls short is taken back.

        Raises ``InvalidArgument``, ``NotFound``, ``EtagMismatch``, ``RequestIdReused``.
        """
        if gate is not None:
            check_gate(gate)

        async def change(_: Draft, head: Policy, alias: Alias) -> Alias:
            if gate == alias.gate:
                return alias
            changed = replace(alias, gate=gate, update_time=now())
            found = await self._canary_shortfalls(head, changed)
            return taken_back(changed, found) if found else changed

        return await self._edit(edit, change, request)

    async def _canary_shortfalls(self, head: Policy, alias: Alias) -> list[Shortfall]:
        if alias.gate is None or alias.canary_resolution is None:
            return []
        revisions = {alias.canary_resolution.revision, _active_name(alias)}
        return canary_shortfalls(alias, await read_evidence(self._store, self._tables, head, revisions))

    async def _edit(
        self, edit: Edit, change: Callable[[Draft, Policy, Alias], Awaitable[Alias]], request: Request | None
    ) -> Written[Alias]:
        """Write what ``change`` makes of an alias that exists."""
        check_text(edit.reason, field="reason", max_chars=_MAX_REASON)
        head_ref, ref = self._tables.policy(edit.name.parent), self._tables.alias(edit.name)

        async def body(draft: Draft) -> Answer[Alias]:
            await draft.fetch(head_ref, ref)
            draft.reason = edit.reason
            head, alias = live_policy(draft.get(head_ref), edit.name.parent), draft.get(ref)
            if alias is None:
                raise not_found(edit.name, "promote a revision to make it")
            check_etag(edit.etag, alias.mod_revision, resource=edit.name)
            changed = await change(draft, head, alias)
            if changed is alias:
                return Answer(ref, alias)
            draft.touch(head_ref)
            return draft.put(ref, changed)

        return await self._transactions.run(body, self._tables.codecs.alias, request)

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
        was_active = (entry.target for entry in alias.history if not entry.rolled_back_canary)
        past = dict.fromkeys(target.revision_number for target in was_active if target)
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


def _active_name(alias: Alias) -> str:
    """Name of the revision the alias points at; empty for none."""
    return f"{alias.name.parent}/revisions/{alias.active.revision_number}" if alias.active else ""


def _ignoring(reason: str, ignored: list[Shortfall]) -> str:
    return f"{reason} (ignoring the gate: {told(ignored)})"


def _moved(move: Move, head: Policy, revision: Revision, alias: Alias | None) -> Alias:
    time = now()
    target = AliasTarget(revision.number, revision.blob.digest if revision.blob else "")
    entry = AliasHistoryEntry(target, Attribution(move.principal, time, move.reason))
    history = (entry, *(alias.history if alias else ()))[:MAX_HISTORY]
    known = alias or Alias(move.name, policy_uid=head.uid)
    if (
        known.canary is not None
        and known.canary.target is not None
        and known.canary.target.revision_number == revision.number
    ):
        known = without_canary(known)  # the trial is over: it has won
    return replace(known, active=target, history=history, update_time=time, resolution=resolution_of(head, revision))
