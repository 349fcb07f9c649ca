"""Shipped scorer ``json_fields``: how much of a reference object the completion has right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mint_scorers.options import known_options
from mint_scorers.scorer import Sample, field_of
from mint_scorers.strict_json import parse_json

__all__ = ["JsonFields"]


@dataclass(frozen=True, slots=True)
class JsonFields:
    """Reward from 0 to 1: the share of fields that the completion, one JSON object, and the reference have equal.

    The share is of all fields that either has, so a field too many costs as much as a wrong one. A completion that is
    no JSON object gets 0. Where an exact match comes rarely, the share tells a policy which of two wrong answers is
    the better one.

    Options:

    * ``field``: the example's field that holds the reference, an object or its JSON text. Default ``completion``.
    """

    field: str = "completion"

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The factory. Raises :class:`ValueError` for bad options."""
        known_options(options, "field")
        return cls(field=options.get("field", "completion"))

    def __call__(self, sample: Sample) -> float:
        """Raises :class:`ValueError` or :class:`TypeError` if the example has no reference, or none that is an object
        with fields."""
        reference = _reference(field_of(sample.example, self.field), self.field)
        try:
            answer = parse_json(sample.completion)
        except ValueError:
            return 0.0
        if not isinstance(answer, dict):
            return 0.0
        equal = sum(1 for name, value in reference.items() if name in answer and _same(answer[name], value))
        return equal / len(reference.keys() | answer.keys())


def _reference(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"the example's field {name!r} is not JSON: {error}") from None
    if not isinstance(value, dict) or not value:
        raise TypeError(f"the example's field {name!r} is {value!r}: expected a JSON object with at least one field")
    return value


def _same(answer: Any, reference: Any) -> bool:
    # In Python true equals 1, in JSON it does not.
    return isinstance(answer, bool) == isinstance(reference, bool) and bool(answer == reference)
