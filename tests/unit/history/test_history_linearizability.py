"""The search against histories made by hand, against trying every order, and against executions known to be right."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import linearizability
from support.catalog_models import (
    AliasModel,
    AliasSeen,
    AliasState,
    Entry,
    Labelled,
    MoveAlias,
    NumberSeen,
    PolicyModel,
    PolicySeen,
    Publish,
    Published,
    Read,
    UpdateLabel,
)
from support.linearizability import Operation, Outcome, Undecided, check


class Register:
    """Holds a number: asked ("write", n), ("read",) or ("swap", old, new), which answers whether it did."""

    def initial(self) -> int:
        return 0

    def step(self, state: int, operation: Operation) -> Sequence[int]:
        unknown = operation.outcome is Outcome.UNKNOWN
        match operation.asked:
            case ("write", value):
                return (value,)
            case ("swap", old, new):
                if unknown:
                    return (new,) if state == old else ()
                return (new if operation.answer else state,) if operation.answer == (state == old) else ()
        return (state,) if operation.answer == state else ()


def op(asked: Any, answer: Any, start: float, end: float, outcome: Outcome = Outcome.OK, client: int = 0) -> Operation:
    return Operation(client, asked, answer, outcome, start, end)


def unknown(asked: Any, start: float) -> Operation:
    return op(asked, None, start, start + 1, Outcome.UNKNOWN)


W1, W2, READ = ("write", 1), ("write", 2), ("read",)
BY_HAND = {
    "empty": ([], True),
    "one after the other": ([op(W1, None, 0, 1), op(READ, 1, 2, 3)], True),
    "read from the past": ([op(W1, None, 0, 1), op(READ, 0, 2, 3)], False),
    "read beside the write sees either": ([op(W1, None, 0, 9), op(READ, 0, 1, 2), op(READ, 1, 3, 4)], True),
    "new value, then the old one": ([op(W1, None, 0, 9), op(READ, 1, 1, 2), op(READ, 0, 3, 4)], False),
    "two writes, seen in two orders": (
        [op(W1, None, 0, 9), op(W2, None, 0, 9), op(READ, 1, 10, 11), op(READ, 2, 12, 13)],
        False,
    ),
    "both swaps won": ([op(("swap", 0, 1), True, 0, 9), op(("swap", 0, 2), True, 0, 9)], False),
    "one swap won": ([op(("swap", 0, 1), True, 0, 9), op(("swap", 0, 2), False, 0, 9)], True),
    "unknown write that never happened": ([unknown(W1, 0), op(READ, 0, 2, 3), op(READ, 0, 4, 5)], True),
    "unknown write that happened late": ([unknown(W1, 0), op(READ, 0, 5, 6), op(READ, 1, 7, 8)], True),
    "unknown write does not happen twice": (
        [unknown(W1, 0), op(READ, 1, 2, 3), op(W2, None, 4, 5), op(READ, 1, 6, 7)],
        False,
    ),
    "unknown write before its call": ([op(READ, 1, 0, 1), unknown(W1, 2)], False),
    "unknown swap explains a lost race": ([unknown(("swap", 0, 1), 0), op(("swap", 0, 2), False, 1, 2)], True),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_histories_made_by_hand(case: str) -> None:
    history, expected = BY_HAND[case]
    verdict = check(history, Register())
    assert verdict.linearizable == expected, verdict.explain()


def test_what_does_not_fit_is_told() -> None:
    verdict = check([op(W1, None, 0, 1), op(READ, 1, 2, 3), op(READ, 0, 4, 5, client=7)], Register())
    assert len(verdict.order) == 2
    assert verdict.state == 1
    assert "client 7 4.0000–5.0000 ('read',) → ok 0" in verdict.explain()


def test_a_search_without_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizability, "_MAX_CONFIGURATIONS", 100)
    history = [op(("write", number), None, 0, 9) for number in range(20)]
    with pytest.raises(Undecided, match="gave up after 100"):
        check([*history, op(READ, 99, 10, 11)], Register())


VALUES = st.integers(0, 2)
ASKED = st.one_of(
    st.tuples(st.just("write"), VALUES), st.just(READ), st.tuples(st.just("swap"), VALUES, st.integers(0, 2))
)


@st.composite
def _any_history(draw: st.DrawFn) -> list[Operation]:
    history = []
    for _ in range(draw(st.integers(1, 5))):
        asked = draw(ASKED)
        start, length = draw(st.integers(0, 12)), draw(st.integers(1, 6))
        outcome = Outcome.OK if asked == READ else draw(st.sampled_from([Outcome.OK, Outcome.OK, Outcome.UNKNOWN]))
        answer: Any = None
        if outcome is Outcome.OK and asked[0] != "write":
            answer = draw(st.booleans() if asked[0] == "swap" else VALUES)
        history.append(op(asked, answer, start, start + length + 0.5, outcome))
    return history


def _by_trying_every_order(history: list[Operation]) -> bool:
    known = [each for each in history if each.outcome is not Outcome.UNKNOWN]
    maybe = [each for each in history if each.outcome is Outcome.UNKNOWN]
    chosen = itertools.chain.from_iterable(itertools.combinations(maybe, count) for count in range(len(maybe) + 1))
    return any(_explains(order) for used in chosen for order in itertools.permutations([*known, *used]))


def _explains(order: Sequence[Operation]) -> bool:
    state, latest_start = 0, -math.inf
    for operation in order:
        if operation.until_s < latest_start:
            return False
        latest_start = max(latest_start, operation.invoked_s)
        after = Register().step(state, operation)
        if not after:
            return False
        state = after[0]
    return True


@settings(max_examples=300, deadline=None)
@given(_any_history())
def test_it_decides_as_trying_every_order_does(history: list[Operation]) -> None:
    assert check(history, Register()).linearizable == _by_trying_every_order(history)


# -- the catalog's models


def _execution(rng: random.Random, num: int) -> list[Operation]:
    """An alias moved and read by clients whose calls overlap; every effect happens inside its call."""
    state, version, operations = AliasState(), 0, []
    for number in range(num):
        time = 10.0 * number
        start, end = time - rng.random() * 40, time + rng.random() * 40
        asked: MoveAlias | Read = Read()
        if rng.random() < 0.6:
            compare = rng.choice([0, 0, version, version - 1]) if version else 0
            target, rollback = rng.choice([1, 2, 3, 4]), rng.random() < 0.3
            asked = MoveAlias(f"t{number}", 0 if rollback and rng.random() < 0.5 else target, max(compare, 0), rollback)
        answer: Any
        outcome = Outcome.OK
        if isinstance(asked, Read):
            answer = AliasSeen(version, state.history) if version else None
            if version and rng.random() < 0.3:
                answer = NumberSeen(state.number, version + rng.randint(0, 3))
        else:
            refusal = _refusal(state, version, asked)
            if refusal:
                outcome, answer = Outcome.FAILED, refusal
            else:
                wanted = asked.number or state.previous
                if wanted != state.number:
                    version += rng.randint(1, 5)
                    state = AliasState(history=(Entry(wanted, asked.tag), *state.history)[:32])
                answer = AliasSeen(version, state.history)
            if rng.random() < 0.15:
                outcome, answer = Outcome.UNKNOWN, None
        operations.append(Operation(number % 5, asked, answer, outcome, start, end))
    rng.shuffle(operations)
    return operations


def _refusal(state: AliasState, version: int, asked: MoveAlias) -> str:
    if asked.rollback and not state.history:
        return "RESOURCE_NOT_FOUND"
    if asked.version and asked.version != version:
        return "ETAG_MISMATCH"
    return "WRONG_STATE" if not asked.number and not state.previous else ""


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 60))
def test_executions_with_overlapping_calls_are_accepted(seed: int, num: int) -> None:
    verdict = check(_execution(random.Random(seed), num), AliasModel())
    assert verdict.linearizable, verdict.explain()


def test_executions_with_one_wrong_answer_are_mostly_rejected() -> None:
    num_rejected = 0
    for seed in range(200):
        rng = random.Random(seed)
        operations = _execution(rng, 40)
        index = rng.choice([at for at, each in enumerate(operations) if isinstance(each.answer, AliasSeen)])
        wrong = operations[index]
        history = (Entry(wrong.answer.history[0].number + 1, "other"), *wrong.answer.history[1:])
        answer = rng.choice(
            [AliasSeen(wrong.answer.version + 1, wrong.answer.history), AliasSeen(wrong.answer.version, history)]
        )
        operations[index] = Operation(
            wrong.client, wrong.asked, answer, wrong.outcome, wrong.invoked_s, wrong.returned_s
        )
        num_rejected += not check(operations, AliasModel()).linearizable
    assert num_rejected > 170  # a version that nobody else saw can be any


def seen(version: int, *history: tuple[int, str]) -> AliasSeen:
    return AliasSeen(version, tuple(Entry(number, tag) for number, tag in history))


FIRST = op(MoveAlias("a", 1), seen(10, (1, "a")), 0, 1)
ALIASES = {
    "promote, then back": (
        [
            op(MoveAlias("b", 2, 10), seen(12, (2, "b"), (1, "a")), 2, 3),
            op(MoveAlias("c", 0, rollback=True), seen(14, (1, "c"), (2, "b"), (1, "a")), 4, 5),
        ],
        True,
    ),
    "two promotes of one etag": (
        [
            op(MoveAlias("b", 2, 10), seen(12, (2, "b"), (1, "a")), 2, 9),
            op(MoveAlias("c", 3, 10), seen(13, (3, "c"), (2, "b"), (1, "a")), 2, 9),
        ],
        False,
    ),
    "a lost update": (
        [
            op(MoveAlias("b", 2), seen(12, (2, "b"), (1, "a")), 2, 9),
            op(MoveAlias("c", 3), seen(13, (3, "c"), (1, "a")), 2, 9),
        ],
        False,
    ),
    "an older resolution": (
        [op(MoveAlias("b", 2), seen(12, (2, "b"), (1, "a")), 2, 3), op(Read(), NumberSeen(1, 12), 4, 5)],
        False,
    ),
    "an unknown move is seen by its tag": (
        [
            unknown(MoveAlias("b", 2), 2),
            op(Read(), NumberSeen(2, 20), 4, 5),
            op(Read(), seen(11, (2, "b"), (1, "a")), 6, 7),
        ],
        True,
    ),
    "an unknown move lies after what it compared": (
        [unknown(MoveAlias("b", 2, 9), 2), op(Read(), NumberSeen(2, 20), 4, 5)],
        False,
    ),
    "refused for an etag that was right": (
        [op(MoveAlias("b", 2, 10), "ETAG_MISMATCH", 2, 3, Outcome.FAILED)],
        False,
    ),
    "nothing to roll back to": ([op(MoveAlias("b", 0, rollback=True), "WRONG_STATE", 2, 3, Outcome.FAILED)], True),
    "gone": ([op(Read(), None, 2, 3)], False),
}


@pytest.mark.parametrize("case", ALIASES)
def test_aliases_by_hand(case: str) -> None:
    history, expected = ALIASES[case]
    verdict = check([FIRST, *history], AliasModel())
    assert verdict.linearizable == expected, verdict.explain()


POLICIES = {
    "an alias moved between": (
        [op(UpdateLabel("b", 15), Labelled(16), 2, 3), op(Read(), PolicySeen("b", 1, 20), 4, 5)],
        True,
    ),
    "a lost update": (
        [op(UpdateLabel("b", 10), Labelled(16), 2, 9), op(UpdateLabel("c", 10), Labelled(17), 2, 9)],
        False,
    ),
    "numbers in order": (
        [op(Publish("p"), Published(1, 11), 2, 9), op(Publish("q"), Published(2, 12), 2, 9)],
        True,
    ),
    "a number given twice": (
        [op(Publish("p"), Published(1, 11), 2, 3), op(Publish("q"), Published(1, 12), 4, 5)],
        False,
    ),
    "a number left out": ([op(Publish("p"), Published(2, 11), 2, 3)], False),
    "a number used by an unknown publication": (
        [unknown(Publish("p"), 2), op(Publish("q"), Published(2, 14), 3, 4)],
        True,
    ),
    "an older record": (
        [op(UpdateLabel("b"), Labelled(16), 2, 3), op(Read(), PolicySeen("b", 1, 15), 4, 5)],
        False,
    ),
}


@pytest.mark.parametrize("case", POLICIES)
def test_policy_records_by_hand(case: str) -> None:
    history, expected = POLICIES[case]
    verdict = check([op(UpdateLabel("a"), Labelled(10), 0, 1), *history], PolicyModel())
    assert verdict.linearizable == expected, verdict.explain()
