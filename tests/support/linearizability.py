"""Is a concurrent history one that a sequential object could have had?

The search of Wing & Gong ("Testing and Verifying Concurrent Objects", JPDC 1993) with the memoisation of Lowe
("Testing for Linearizability", 2017): operations are put in order one by one, each only while it is pending, and a
configuration (what was ordered already, and the object's state) that has failed once is not tried again. Histories of
several objects are checked object by object, since linearizability is local (Herlihy & Wing 1990).

An operation whose outcome nobody knows has no end: it may take effect at any time after its call, or never. Known
operations are tried first, so that an unknown one is used only where it explains something; and a configuration is
also given up where one with the same known operations and state has failed with fewer unknown ones used up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, Protocol, TypeVar

__all__ = ["Model", "Operation", "Outcome", "Undecided", "Verdict", "check"]

S = TypeVar("S")
_MAX_CONFIGURATIONS: Final = 2_000_000


class Outcome(Enum):
    """What its caller learned about an operation."""

    OK = "ok"
    FAILED = "failed"
    """Refused, and without effect; the refusal itself may tell something about the state."""
    UNKNOWN = "unknown"
    """No answer: it may take effect at any later time, or never."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call, with the times between which it took effect if it did."""

    client: int
    asked: Any
    answer: Any
    """What was answered; the reason of the error for a failed one, None for an unknown one."""
    outcome: Outcome
    invoked_s: float
    returned_s: float

    @property
    def until_s(self) -> float:
        """The latest time of its effect."""
        return math.inf if self.outcome is Outcome.UNKNOWN else self.returned_s


class Model(Protocol[S]):
    """A sequential object; states are hashable."""

    def initial(self) -> S:
        """The state before the first operation."""
        ...

    def step(self, state: S, operation: Operation) -> Sequence[S]:
        """The states that the operation may lead to with the answer it had; none where it cannot have had it."""
        ...


@dataclass(frozen=True)
class Verdict(Generic[S]):
    """Outcome of a check."""

    linearizable: bool
    order: tuple[Operation, ...]
    """An order that explains the history; of one that has none, the longest beginning found."""
    state: S
    """The object's state after ``order``."""
    stuck: tuple[Operation, ...] = ()
    """What could not be put next after ``order``, though one of them must."""

    def explain(self) -> str:
        """The end of the order, and what does not fit, for people."""
        if self.linearizable:
            return f"linearizable: {len(self.order)} operations"
        lines = [f"not linearizable: after {len(self.order)} operations the state is {self.state}; the last ones"]
        lines += [f"    {_line(each)}" for each in self.order[-6:]]
        lines += ["  and none of these can be next", *(f"    {_line(each)}" for each in self.stuck)]
        return "\n".join(lines)


def _line(operation: Operation) -> str:
    times = f"{operation.invoked_s:.4f}–{operation.until_s:.4f}"
    return f"client {operation.client} {times} {operation.asked} → {operation.outcome.value} {operation.answer}"


class Undecided(Exception):
    """The search was given up: too many configurations."""


class _Search(Generic[S]):
    def __init__(self, operations: Sequence[Operation], model: Model[S]) -> None:
        by_call = sorted(operations, key=lambda operation: operation.invoked_s)
        self._model = model
        self._known = [each for each in by_call if each.outcome is not Outcome.UNKNOWN]
        self._unknown = [each for each in by_call if each.outcome is Outcome.UNKNOWN]
        self._goal = (1 << len(self._known)) - 1
        self._failed: dict[tuple[int, S], list[int]] = {}
        self.num_configurations = 0

    def pending(self, done: int, used: int) -> tuple[list[int], list[int]]:
        """Indices of the known and of the unknown operations that may be next: called before any other's end."""
        index = (~done & (done + 1)).bit_length() - 1
        horizon = math.inf
        known: list[int] = []
        while index < len(self._known) and self._known[index].invoked_s <= horizon:
            if not done >> index & 1:
                known.append(index)
                horizon = min(horizon, self._known[index].until_s)
            index += 1
        known.sort(key=lambda each: self._known[each].until_s)
        unknown = [
            each
            for each, operation in enumerate(self._unknown)
            if operation.invoked_s <= horizon and not used >> each & 1
        ]
        return known, unknown

    def _moves(self, done: int, used: int, state: S) -> Iterator[tuple[int, int, S, Operation]]:
        known, unknown = self.pending(done, used)
        for index in known:
            for after in self._model.step(state, self._known[index]):
                yield done | 1 << index, used, after, self._known[index]
        for index in unknown:
            for after in self._model.step(state, self._unknown[index]):
                yield done, used | 1 << index, after, self._unknown[index]

    def _is_new(self, done: int, used: int, state: S) -> bool:
        tried = self._failed.setdefault((done, state), [])
        if any(other & ~used == 0 for other in tried):
            return False
        tried[:] = [other for other in tried if used & ~other]
        tried.append(used)
        self.num_configurations += 1
        if self.num_configurations > _MAX_CONFIGURATIONS:
            raise Undecided(f"gave up after {_MAX_CONFIGURATIONS} configurations of {len(self._known)} operations")
        return True

    def run(self) -> Verdict[S]:
        initial = self._model.initial()
        stack = [(0, 0, initial, self._moves(0, 0, initial))]
        order: list[Operation] = []
        best: tuple[int, int, S, tuple[Operation, ...]] = (0, 0, initial, ())
        while stack:
            done, used, state, moves = stack[-1]
            if done == self._goal:
                return Verdict(True, tuple(order), state)
            for next_done, next_used, after, operation in moves:
                if self._is_new(next_done, next_used, after):
                    stack.append((next_done, next_used, after, self._moves(next_done, next_used, after)))
                    order.append(operation)
                    if next_done.bit_count() > best[0].bit_count():
                        best = (next_done, next_used, after, tuple(order))
                    break
            else:
                stack.pop()
                if order:
                    order.pop()
        done, used, state, beginning = best
        known, unknown = self.pending(done, used)
        stuck = [self._known[each] for each in known] + [self._unknown[each] for each in unknown]
        return Verdict(False, beginning, state, tuple(stuck))


def check(operations: Sequence[Operation], model: Model[S]) -> Verdict[S]:
    """Look for an order of one object's operations that its sequential model allows. Raises :class:`Undecided`."""
    return _Search(operations, model).run()
