"""Gates: what evaluations must show of a revision before an alias may point at it.

A condition looks at the newest evaluation of the revision by one scorer, and at that of the active revision for how
far the figure may lie below it. Evaluations of a policy lie in the order of their ids, so all of them are read when a
gate is judged: the cost grows with the policy's evaluations, and only where there is a gate.

An evaluation of a policy that has a gated alias or a canary bumps the policy's head. Whoever judges under a head that
is still the same on commit has therefore missed none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.checks import check_finite, check_range, check_text
from mint_catalog.model.records import Evaluation, Gate, GateCondition, Policy
from mint_catalog.model.tables import Tables
from mint_catalog.storage.store import Store, prefix_end
from mint_core.errors import GateNotMet, InvalidArgument
from mint_core.names import check_digest, check_id

__all__ = ["Evidence", "Shortfall", "check_gate", "gate_not_met", "read_evidence", "shortfalls", "told"]

_MAX_CONDITIONS: Final = 8
_MAX_TOLD: Final = 2
_CHUNK: Final = 500
_ABSENT: Final = "no evaluation"


def check_gate(gate: Gate, *, field: str = "gate") -> None:
    """One to eight conditions that an evaluation can meet. Raises ``InvalidArgument``."""
    if not 1 <= len(gate.conditions) <= _MAX_CONDITIONS:
        raise InvalidArgument(
            f"{field}.conditions has {len(gate.conditions)} entries: 1 to {_MAX_CONDITIONS}; leave {field} out to "
            "clear it",
            field=f"{field}.conditions",
        )
    for index, condition in enumerate(gate.conditions):
        _check_condition(condition, f"{field}.conditions[{index}]")


def _check_condition(condition: GateCondition, field: str) -> None:
    check_text(condition.scorer, field=f"{field}.scorer", max_chars=128)
    if not condition.scorer:
        raise InvalidArgument(f"{field}.scorer is empty: name the scorer of the evaluations", field=f"{field}.scorer")
    check_id(condition.metric, field=f"{field}.metric")
    if condition.data_digest:
        check_digest(condition.data_digest, field=f"{field}.data_digest")
    if condition.min_value is not None:
        check_finite(condition.min_value, field=f"{field}.min_value")
    if condition.max_regression is not None:
        check_range(condition.max_regression, field=f"{field}.max_regression", least=0)
    check_range(condition.min_examples, field=f"{field}.min_examples", least=0)


class Evidence:
    """The newest evaluations of some revisions, by scorer and data set."""

    def __init__(self, revisions: Iterable[str]) -> None:
        self._revisions = frozenset(revisions)
        self._newest: dict[tuple[str, str, str], Evaluation] = {}

    def add(self, evaluation: Evaluation, *, is_newest: bool = False) -> None:
        """Take an evaluation into account; with ``is_newest`` it is that whatever the clock said."""
        if evaluation.revision not in self._revisions:
            return
        for data_digest in {evaluation.data_digest, ""}:
            key = (evaluation.revision, evaluation.scorer, data_digest)
            known = self._newest.get(key)
            if is_newest or known is None or _age(known) < _age(evaluation):
                self._newest[key] = evaluation

    def newest(self, revision: str, scorer: str, data_digest: str) -> Evaluation | None:
        """The newest evaluation of a revision by a scorer, on a data set if one is named."""
        return self._newest.get((revision, scorer, data_digest))


def _age(evaluation: Evaluation) -> tuple[float, int]:
    created = evaluation.create_time
    return (created.timestamp() if created else 0.0, evaluation.mod_revision)


async def read_evidence(store: Store, tables: Tables, head: Policy, revisions: Iterable[str]) -> Evidence:
    """What is known of some revisions (names) of a policy, read at one revision of the store."""
    evidence = Evidence(revisions)
    start = tables.keys.evaluations(head.name, head.uid)
    end = prefix_end(start)
    revision, more = 0, True
    while more:
        result = await store.scan(start, end, limit=_CHUNK, revision=revision)
        revision, more = revision or result.revision, result.more
        for kv in result.values:
            evidence.add(tables.codecs.evaluation.decode(kv))
            start = kv.key + b"\0"
    return evidence


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A condition that a revision does not meet."""

    revision: str
    condition: str
    expected: str
    actual: str
    is_missing: bool = False
    """Nothing was measured, or on too few examples to tell: no reason to promote, and none to take a canary back."""

    def __str__(self) -> str:
        return f"{self.condition} of {self.revision}: expected {self.expected}, found {self.actual}"


def shortfalls(gate: Gate, evidence: Evidence, revision: str, active: str) -> list[Shortfall]:
    """The conditions that ``revision`` does not meet; ``active`` is what the alias points at, empty for nothing."""
    found = [_shortfall(condition, evidence, revision, active) for condition in gate.conditions]
    return [each for each in found if each is not None]


def _shortfall(condition: GateCondition, evidence: Evidence, revision: str, active: str) -> Shortfall | None:
    name = f"{condition.metric} by {condition.scorer}"
    if condition.data_digest:
        name += f" on {condition.data_digest}"
    newest = evidence.newest(revision, condition.scorer, condition.data_digest)
    if newest is None:
        return Shortfall(revision, name, "an evaluation", _ABSENT, is_missing=True)
    if newest.num_examples < condition.min_examples:
        expected = f"at least {condition.min_examples} examples"
        return Shortfall(revision, name, expected, f"{newest.num_examples} in {newest.name}", is_missing=True)
    value = newest.metrics.get(condition.metric)
    if value is None:
        return Shortfall(revision, name, f"a figure {condition.metric}", f"none in {newest.name}", is_missing=True)
    if condition.min_value is not None and value < condition.min_value:
        return Shortfall(revision, name, f"at least {condition.min_value:g}", f"{value:g} in {newest.name}")
    if condition.max_regression is None or not active:
        return None
    # The bound is measured on the data set of the figure that it bounds.
    reference = evidence.newest(active, condition.scorer, newest.data_digest)
    bound = reference.metrics.get(condition.metric) if reference else None
    if reference is None or bound is None or value >= bound - condition.max_regression:
        return None
    return Shortfall(
        revision,
        name,
        f"at least {bound - condition.max_regression:g}, {condition.max_regression:g} below the active revision's "
        f"{bound:g} in {reference.name}",
        f"{value:g} in {newest.name}",
    )


def told(found: list[Shortfall]) -> str:
    """What is missing, for a record: the first few conditions, since a record keeps many of these."""
    more = f"; and {len(found) - _MAX_TOLD} more" if len(found) > _MAX_TOLD else ""
    return "; ".join(map(str, found[:_MAX_TOLD])) + more


def gate_not_met(alias: object, found: list[Shortfall], *, advice: str) -> GateNotMet:
    """The error for a revision that falls short; its metadata tell the first condition."""
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return GateNotMet(
        f"the gate of {alias} is not met by {first}{more}; {advice}",
        metadata={
            "resource": str(alias),
            "condition": first.condition,
            "expected": first.expected,
            "actual": first.actual,
        },
    )
