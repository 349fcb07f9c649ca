"""Gates: what a promotion needs, and canaries that are taken back because they break one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from unit.catalog.catalog_lab import POLICY, Lab, digest_of

from mint_catalog.model.records import Alias, AliasTarget, Canary, Evaluation, Gate, GateCondition
from mint_catalog.serving.aliases import Edit
from mint_catalog.serving.gates import Evidence, shortfalls
from mint_catalog.storage.draft import Written
from mint_catalog.storage.store import Put
from mint_core.errors import EtagMismatch, GateNotMet, InvalidArgument, MintError, NotFound, Unavailable, WrongState
from mint_core.names import AliasName, EvaluationName, RevisionName

LIVE = AliasName("acme", "tone", "live")
EDIT = Edit(LIVE)
DATA = digest_of("held out")
SCORE = GateCondition(scorer="exact", metric="score")


def _evaluation(evaluation_id: str, number: int, score: float, **changes: object) -> Evaluation:
    fields: dict[str, object] = {
        "revision": f"{POLICY}/revisions/{number}",
        "scorer": "exact",
        "metrics": {"score": score},
        "num_examples": 100,
        "data_digest": DATA,
    }
    return Evaluation(EvaluationName("acme", "tone", evaluation_id), **(fields | changes))  # type: ignore[arg-type]


class GateLab(Lab):
    """Three revisions; ``live`` points at the first."""

    num_evaluations = 0

    async def begin(self, *conditions: GateCondition) -> GateLab:
        await self.policy()
        for number in (1, 2, 3):
            await self.publish(f"bytes {number}")
        await self.promote(1)
        if conditions:
            await self.aliases.set_gate(EDIT, Gate(conditions))
        return self

    async def evaluate(self, number: int, score: float, **changes: object) -> Written[Evaluation]:
        self.num_evaluations += 1
        evaluation_id = str(changes.pop("evaluation_id", f"e{100 - self.num_evaluations:03d}"))
        return await self.evaluations.create(_evaluation(evaluation_id, number, score, **changes), None)

    async def canary(self, number: int = 2) -> Alias:
        return (await self.aliases.set_canary(EDIT, Canary(AliasTarget(number), 0.5))).record

    async def refused(self, number: int = 2) -> GateNotMet:
        before = await self.aliases.get(LIVE)
        with pytest.raises(GateNotMet) as refused:
            await self.promote(number)
        assert await self.aliases.get(LIVE) == before
        return refused.value


async def test_a_gate_is_stored_changed_and_cleared() -> None:
    lab = await GateLab().begin()
    head = await lab.policies.get(POLICY)
    gate = Gate((GateCondition("exact", "score", DATA, 0.0, 0.5, 10), SCORE))
    written = (await lab.aliases.set_gate(EDIT, gate)).record
    assert written.gate == gate, "a bound of zero is a bound"
    assert await lab.aliases.get(LIVE) == written
    assert (await lab.policies.get(POLICY)).mod_revision > head.mod_revision
    num_txns = lab.store.num_txns
    assert (await lab.aliases.set_gate(EDIT, gate)).record == written
    assert lab.store.num_txns == num_txns
    assert (await lab.aliases.set_gate(EDIT, None)).record.gate is None
    await lab.promote(2)


@pytest.mark.parametrize(
    ("conditions", "field"),
    [
        ((), "gate.conditions"),
        ((SCORE,) * 9, "gate.conditions"),
        ((replace(SCORE, scorer=""),), "gate.conditions[0].scorer"),
        ((replace(SCORE, scorer="x" * 129),), "gate.conditions[0].scorer"),
        ((SCORE, replace(SCORE, metric="")), "gate.conditions[1].metric"),
        ((replace(SCORE, metric="Bad Key"),), "gate.conditions[0].metric"),
        ((replace(SCORE, data_digest="sha256:x"),), "gate.conditions[0].data_digest"),
        ((replace(SCORE, min_value=float("nan")),), "gate.conditions[0].min_value"),
        ((replace(SCORE, min_value=float("inf")),), "gate.conditions[0].min_value"),
        ((replace(SCORE, max_regression=-0.1),), "gate.conditions[0].max_regression"),
        ((replace(SCORE, max_regression=float("nan")),), "gate.conditions[0].max_regression"),
        ((replace(SCORE, min_examples=-1),), "gate.conditions[0].min_examples"),
    ],
)
async def test_a_bad_gate_is_refused(conditions: tuple[GateCondition, ...], field: str) -> None:
    lab = await GateLab().begin()
    with pytest.raises(InvalidArgument) as refused:
        await lab.aliases.set_gate(EDIT, Gate(conditions))
    assert refused.value.field == field
    assert (await lab.aliases.get(LIVE)).gate is None


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (Edit(AliasName("acme", "tone", "none")), NotFound),
        (Edit(AliasName("acme", "none", "live")), NotFound),
        (Edit(LIVE, etag="1"), EtagMismatch),
        (Edit(LIVE, reason="two\nlines"), InvalidArgument),
    ],
)
async def test_what_set_gate_refuses(edit: Edit, error: type[MintError]) -> None:
    lab = await GateLab().begin()
    for gate in (Gate((SCORE,)), None):
        with pytest.raises(error):
            await lab.aliases.set_gate(edit, gate)


async def test_a_promotion_needs_an_evaluation() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    error = await lab.refused()
    assert error.metadata == {
        "resource": str(LIVE),
        "condition": "score by exact",
        "expected": "an evaluation",
        "actual": "no evaluation",
    }
    assert "mint eval" in error.message
    await lab.evaluate(2, 0.5)
    await lab.promote(2)


@pytest.mark.parametrize(
    ("condition", "changes", "is_met"),
    [
        (SCORE, {}, True),
        (replace(SCORE, min_value=0.6), {}, True),
        (replace(SCORE, min_value=0.61), {}, False),
        (replace(SCORE, min_examples=100), {}, True),
        (replace(SCORE, min_examples=101), {}, False),
        (replace(SCORE, data_digest=DATA), {}, True),
        (replace(SCORE, data_digest=digest_of("other")), {}, False),
        (SCORE, {"scorer": "other"}, False),
        (SCORE, {"metrics": {"loss": 1.0}}, False),
        (SCORE, {"revision": f"{POLICY}/revisions/3"}, False),
        (SCORE, {"revision": ""}, False),
        # The active revision has 0.7 on the same data.
        (replace(SCORE, max_regression=0.11), {}, True),
        (replace(SCORE, max_regression=0.05), {}, False),
        (replace(SCORE, max_regression=0.0), {}, False),
        (replace(SCORE, max_regression=0.0), {"data_digest": digest_of("unlike the active one's")}, True),
        (replace(SCORE, max_regression=0.0), {"metrics": {"score": 0.7}}, True),
        (replace(SCORE, min_value=0.5, max_regression=0.2, min_examples=50, data_digest=DATA), {}, True),
    ],
)
async def test_conditions(condition: GateCondition, changes: dict[str, object], is_met: bool) -> None:
    lab = await GateLab().begin(condition)
    await lab.evaluate(1, 0.7)
    await lab.evaluate(2, 0.6, **changes)
    if is_met:
        await lab.promote(2)
    else:
        await lab.refused()


async def test_every_condition_counts_and_the_error_tells_the_first_that_fails() -> None:
    lab = await GateLab().begin(
        replace(SCORE, min_value=0.1), replace(SCORE, min_value=0.9), replace(SCORE, scorer="judge")
    )
    await lab.evaluate(2, 0.5)
    error = await lab.refused()
    assert (error.metadata["expected"], error.metadata["actual"]) == (
        "at least 0.9",
        f"0.5 in {POLICY}/evaluations/e099",
    )
    assert "(and 1 more)" in error.message


async def test_the_newest_evaluation_counts_whatever_its_id() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    await lab.evaluate(2, 0.9, evaluation_id="zzz")
    await lab.evaluate(2, 0.1, evaluation_id="aaa")
    await lab.refused()
    await lab.evaluate(2, 0.9, evaluation_id="mmm")
    await lab.promote(2)


async def test_an_active_revision_without_an_evaluation_is_no_bound() -> None:
    lab = await GateLab().begin(replace(SCORE, max_regression=0.0))
    await lab.evaluate(2, 0.0)
    await lab.promote(2)


async def test_many_evaluations_are_read_over_pages() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    start = datetime(2026, 1, 1, tzinfo=UTC)
    evidence = Evidence([f"{POLICY}/revisions/2"])
    for number in range(1200):
        each = _evaluation(f"e{number}", 2, 0.9, create_time=start + timedelta(seconds=number))
        evidence.add(each)
        ref = lab.tables.evaluation(each.name, (await lab.policies.get(POLICY)).uid)
        await lab.store.txn([], [Put(ref.key, ref.codec.encode(each))])
    newest = evidence.newest(f"{POLICY}/revisions/2", "exact", "")
    assert newest is not None
    assert newest.name.evaluation == "e1199"
    await lab.promote(2)
    await lab.evaluate(3, 0.1, evaluation_id="e5000")
    await lab.refused(3)


async def test_ignoring_a_gate_needs_a_reason_which_is_kept_with_what_was_ignored() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    move = replace(lab.move(2), ignore_gate=True)
    with pytest.raises(InvalidArgument) as refused:
        await lab.aliases.promote(move)
    assert refused.value.field == "reason"
    moved = (await lab.aliases.promote(replace(move, reason="fire"))).record
    attribution = moved.history[0].attribution
    assert attribution is not None
    assert attribution.principal == "ada"
    assert attribution.reason.startswith("fire (ignoring the gate: score by exact of ")
    await lab.evaluate(3, 0.9)
    met = (await lab.aliases.promote(replace(move, revision_number=3, reason="fine"))).record
    assert met.history[0].attribution is not None
    assert met.history[0].attribution.reason == "fine", "nothing was ignored"


async def test_a_rollback_and_a_first_promotion_are_not_gated() -> None:
    lab = await GateLab().begin()
    await lab.promote(2)
    await lab.aliases.set_gate(EDIT, Gate((SCORE,)))
    assert (await lab.aliases.rollback(lab.move(0))).record.active == AliasTarget(1, digest_of("bytes 1"))
    assert (await lab.aliases.rollback(lab.move(3))).record.active == AliasTarget(3, digest_of("bytes 3"))
    await lab.promote(2, alias="other")


async def test_promoting_what_is_active_asks_for_nothing() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    known = await lab.aliases.get(LIVE)
    assert (await lab.promote(1)).record == known


async def test_a_canary_needs_no_evaluation_but_must_not_have_a_bad_one() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5, min_examples=50))
    await lab.canary(2)
    await lab.evaluate(3, 0.1, num_examples=10)
    await lab.canary(3)  # too few examples tell nothing
    await lab.canary(2)
    await lab.evaluate(3, 0.1)
    with pytest.raises(GateNotMet):
        await lab.canary(3)


async def test_an_evaluation_that_breaks_the_gate_takes_the_canary_back() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    await lab.canary()
    head = await lab.policies.get(POLICY)
    await lab.evaluate(2, 0.7)
    assert (await lab.aliases.get(LIVE)).canary is not None
    written = await lab.evaluate(2, 0.25)
    alias = await lab.aliases.get(LIVE)
    assert (alias.canary, alias.canary_resolution) == (None, None)
    assert alias.mod_revision == written.record.mod_revision, "one transaction"
    assert (await lab.policies.get(POLICY)).mod_revision > head.mod_revision
    entry = alias.history[0]
    assert (entry.target, entry.rolled_back_canary) == (AliasTarget(2, digest_of("bytes 2")), True)
    assert entry.attribution is not None
    assert entry.attribution.principal == "catalog"
    assert "at least 0.5" in entry.attribution.reason
    assert "0.25" in entry.attribution.reason
    assert alias.active == AliasTarget(1, digest_of("bytes 1"))


async def test_a_canary_that_was_taken_back_is_nothing_to_roll_back_to() -> None:
    lab = await GateLab().begin()
    await lab.promote(3)
    await lab.aliases.set_gate(EDIT, Gate((replace(SCORE, min_value=0.5),)))
    await lab.canary(2)
    await lab.evaluate(2, 0.1)
    assert [entry.target.revision_number for entry in (await lab.aliases.get(LIVE)).history if entry.target] == [
        2,
        3,
        1,
    ]
    back = (await lab.aliases.rollback(lab.move(0))).record
    assert back.active == AliasTarget(1, digest_of("bytes 1"))
    for number in (2, 3):
        await lab.revisions.retire(RevisionName("acme", "tone", number))
    await lab.revisions.delete(RevisionName("acme", "tone", 2))
    with pytest.raises(WrongState):
        await lab.revisions.delete(RevisionName("acme", "tone", 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": "other"},
        {"metrics": {"loss": 0.1}},
        {"num_examples": 1},
        {"data_digest": digest_of("another set")},
        {"revision": f"{POLICY}/revisions/3"},
        {"revision": ""},
    ],
)
async def test_an_evaluation_that_says_nothing_about_it_leaves_the_canary(changes: dict[str, object]) -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5, min_examples=10, data_digest=DATA))
    known = await lab.canary()
    await lab.evaluate(2, 0.1, **changes)
    assert await lab.aliases.get(LIVE) == known


async def test_a_better_figure_of_the_active_revision_may_break_the_canary() -> None:
    lab = await GateLab().begin(replace(SCORE, max_regression=0.1))
    await lab.evaluate(2, 0.5)
    await lab.canary()
    await lab.evaluate(1, 0.55)
    assert (await lab.aliases.get(LIVE)).canary is not None
    await lab.evaluate(1, 0.9)
    assert (await lab.aliases.get(LIVE)).canary is None


async def test_only_the_aliases_that_it_breaks_lose_their_canary() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    await lab.canary()
    other = Edit(AliasName("acme", "tone", "other"))
    ungated = Edit(AliasName("acme", "tone", "ungated"))
    for edit in (other, ungated):
        await lab.promote(1, alias=edit.name.alias)
        await lab.aliases.set_canary(edit, Canary(AliasTarget(2), 0.5))
    await lab.aliases.set_gate(other, Gate((replace(SCORE, min_value=0.05),)))
    await lab.evaluate(2, 0.1)
    assert (await lab.aliases.get(LIVE)).canary is None
    for edit in (other, ungated):
        assert (await lab.aliases.get(edit.name)).canary is not None


async def test_setting_a_gate_that_the_canary_breaks_already_takes_it_back() -> None:
    lab = await GateLab().begin()
    await lab.canary()
    await lab.evaluate(2, 0.1)
    assert (await lab.aliases.get(LIVE)).canary is not None
    written = (await lab.aliases.set_gate(EDIT, Gate((replace(SCORE, min_value=0.5),)))).record
    assert written.canary is None
    assert written.history[0].rolled_back_canary


async def test_the_newest_is_what_was_written_last_even_if_the_clock_went_back() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    future = _evaluation("future", 2, 0.9, create_time=datetime(2100, 1, 1, tzinfo=UTC))
    ref = lab.tables.evaluation(future.name, (await lab.policies.get(POLICY)).uid)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(future))])
    await lab.canary()
    await lab.evaluate(2, 0.1)
    assert (await lab.aliases.get(LIVE)).canary is None


async def test_neither_is_lost_without_the_other() -> None:
    lab = await GateLab().begin(replace(SCORE, min_value=0.5))
    await lab.canary()
    for fault in ("before", "after"):
        lab.store.fail_next_txn = fault
        with pytest.raises(Unavailable):
            await lab.evaluate(2, 0.1)
        is_written = bool((await lab.evaluations.list(POLICY, page_size=10, page_token="")).records)
        assert is_written == (fault == "after")
        assert ((await lab.aliases.get(LIVE)).canary is None) == is_written


@pytest.mark.parametrize("what", ["canary", "gate", "promotion"])
async def test_an_evaluation_between_the_look_and_the_write_is_seen(what: str) -> None:
    gate = Gate((replace(SCORE, min_value=0.5),))
    lab = await GateLab().begin()
    await lab.evaluate(2, 0.9)
    if what == "gate":
        await lab.canary()
    else:
        await lab.aliases.set_gate(EDIT, gate)
    txn, num_evaluations = lab.store.txn, lab.num_evaluations

    async def interrupted(*args: Any) -> Any:
        if lab.num_evaluations == num_evaluations:
            await lab.evaluate(2, 0.1)
        return await txn(*args)

    lab.store.txn = interrupted
    if what == "canary":
        with pytest.raises(GateNotMet):
            await lab.canary()
    elif what == "gate":
        await lab.aliases.set_gate(EDIT, gate)
    else:
        await lab.refused()
    alias = await lab.aliases.get(LIVE)
    assert (alias.active, alias.canary) == (AliasTarget(1, digest_of("bytes 1")), None)


async def test_a_canary_between_the_look_and_the_evaluation_is_seen() -> None:
    lab = await GateLab().begin()
    txn = lab.store.txn
    steps: list[Any] = [lab.canary, lambda: lab.aliases.set_gate(EDIT, Gate((replace(SCORE, min_value=0.5),)))]

    async def interrupted(*args: Any) -> Any:
        if steps:
            await steps.pop()()
        return await txn(*args)

    lab.store.txn = interrupted
    await lab.evaluate(2, 0.1)
    alias = await lab.aliases.get(LIVE)
    assert alias.canary is None
    assert alias.history[0].rolled_back_canary


def test_shortfalls_name_their_figures() -> None:
    evidence = Evidence(["one", "two"])
    evidence.add(_evaluation("a", 1, 0.8, revision="one"))
    evidence.add(_evaluation("b", 1, 0.5, revision="two"))
    (found,) = shortfalls(Gate((replace(SCORE, max_regression=0.1),)), evidence, "two", "one")
    assert str(found) == (
        "score by exact of two: expected at least 0.7, 0.1 below the active revision's 0.8 in "
        f"{POLICY}/evaluations/a, found 0.5 in {POLICY}/evaluations/b"
    )
