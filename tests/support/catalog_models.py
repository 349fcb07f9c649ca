"""What one alias and one policy record do when they are asked one thing at a time.

Every write of the workload carries a tag of its own, in the alias's history, in a label or in a revision's lineage, so
that an answer tells which writes it has seen. Of an object's revision a state knows a number or only a lower bound:
a write without an answer gave it a revision that nobody has seen yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from support.linearizability import Operation, Outcome

__all__ = [
    "AliasModel",
    "AliasSeen",
    "AliasState",
    "Entry",
    "Labelled",
    "MoveAlias",
    "NumberSeen",
    "PolicyModel",
    "PolicySeen",
    "PolicyState",
    "Publish",
    "Published",
    "Read",
    "UpdateLabel",
    "Version",
]

_MAX_HISTORY: Final = 32


@dataclass(frozen=True, slots=True)
class Version:
    """An object's revision, or the least that it can be."""

    number: int
    exact: bool = True

    def bound(self, number: int) -> Version | None:
        """The version, seen to be ``number``; None if it cannot be that."""
        fits = self.number == number if self.exact else self.number <= number
        return Version(number) if fits else None

    @property
    def next(self) -> Version:
        """What a write makes of it."""
        return Version(self.number + 1, exact=False)


# -- aliases


@dataclass(frozen=True, slots=True)
class Entry:
    """One move: the revision's number, and the tag of the write that moved the alias there."""

    number: int
    tag: str


@dataclass(frozen=True, slots=True)
class MoveAlias:
    """Promote to ``number``, or roll back to it; to the previous one with 0."""

    tag: str
    number: int
    version: int = 0
    """The version that must be the present one; 0 asks for none."""
    rollback: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A read of the present state."""


@dataclass(frozen=True, slots=True)
class AliasSeen:
    """An alias as it was answered."""

    version: int
    history: tuple[Entry, ...]
    """Newest first; the first one is the present target."""


@dataclass(frozen=True, slots=True)
class NumberSeen:
    """What a resolution tells of an alias."""

    number: int
    catalog_revision: int


@dataclass(frozen=True, slots=True)
class AliasState:
    """An alias; without history it is absent."""

    version: Version = Version(0)
    history: tuple[Entry, ...] = ()

    @property
    def number(self) -> int:
        return self.history[0].number if self.history else 0

    @property
    def previous(self) -> int:
        """The newest target before the present one that is another; 0 for none."""
        return next((entry.number for entry in self.history if entry.number != self.number), 0)


class AliasModel:
    """A register that is moved by compare-and-set and keeps its last 32 values. Every revision is READY."""

    def initial(self) -> AliasState:
        return AliasState()

    def step(self, state: AliasState, operation: Operation) -> Sequence[AliasState]:
        asked, answer = operation.asked, operation.answer
        if operation.outcome is Outcome.FAILED:
            return (state,) if _may_refuse_move(state, asked, answer) else ()
        if isinstance(asked, MoveAlias):
            moved = _move(state, asked)
            if moved is None or operation.outcome is Outcome.UNKNOWN:
                return () if moved is None or moved == state else (moved,)
            return _seen(moved, answer)
        return _seen(state, answer)


def _move(state: AliasState, asked: MoveAlias) -> AliasState | None:
    """The state after a move; None where the catalog would have refused it."""
    if asked.version:
        bound = state.version.bound(asked.version)
        if bound is None:
            return None
        state = replace(state, version=bound)
    if asked.rollback and not state.history:
        return None
    number = asked.number or state.previous
    if not number:
        return None
    if number == state.number:
        return state
    return AliasState(state.version.next, (Entry(number, asked.tag), *state.history)[:_MAX_HISTORY])


def _seen(state: AliasState, answer: AliasSeen | NumberSeen | None) -> Sequence[AliasState]:
    if answer is None:  # NOT_FOUND
        return () if state.history else (state,)
    if isinstance(answer, NumberSeen):
        fits = state.number == answer.number and state.version.number <= answer.catalog_revision
        return (state,) if fits else ()
    bound = state.version.bound(answer.version)
    return (replace(state, version=bound),) if bound is not None and state.history == answer.history else ()


def _may_refuse_move(state: AliasState, asked: MoveAlias, reason: str) -> bool:
    if reason == "ETAG_MISMATCH":
        return asked.version > 0 and state.version != Version(asked.version)
    if reason == "WRONG_STATE":
        return asked.rollback and not asked.number and not state.previous
    if reason == "RESOURCE_NOT_FOUND":
        return asked.rollback and not state.history
    return True


# -- policy records


@dataclass(frozen=True, slots=True)
class UpdateLabel:
    """Set the record's label to the tag."""

    tag: str
    version: int = 0
    """The version that must be the present one; 0 asks for none."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the next revision, with the tag in its lineage."""

    tag: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """What an update answers."""

    version: int


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication answers."""

    number: int
    version: int


@dataclass(frozen=True, slots=True)
class PolicySeen:
    """A policy record as it was answered."""

    label: str
    next_number: int
    version: int


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy record. Moves of its aliases change its version too, so that is only ever a lower bound."""

    label: str = ""
    next_number: int = 1
    version: int = 0


class PolicyModel:
    """A register moved by compare-and-set, and a counter that gives every number once."""

    def initial(self) -> PolicyState:
        return PolicyState()

    def step(self, state: PolicyState, operation: Operation) -> Sequence[PolicyState]:
        asked, answer = operation.asked, operation.answer
        if operation.outcome is Outcome.FAILED:
            return () if answer == "ETAG_MISMATCH" and not getattr(asked, "version", 0) else (state,)
        match asked:
            case UpdateLabel(tag, version):
                if version and version < state.version:
                    return ()  # somebody has written since
                least = max(version, state.version) + 1
                written = answer.version if isinstance(answer, Labelled) else least
                return (PolicyState(tag, state.next_number, written),) if written >= least else ()
            case Publish():
                number, written = state.next_number, state.version + 1
                if isinstance(answer, Published):
                    if answer.number != number or answer.version < written:
                        return ()
                    written = answer.version
                return (replace(state, next_number=number + 1, version=written),)
        if not isinstance(answer, PolicySeen) or answer.version < state.version:
            return ()
        if (answer.label, answer.next_number) != (state.label, state.next_number):
            return ()
        return (replace(state, version=answer.version),)
