"""Shipped scorer ``json_schema``: the completion is JSON that a schema accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

from mint_scorers.options import known_options, number_option
from mint_scorers.scorer import Sample, field_of
from mint_scorers.strict_json import parse_json

__all__ = ["JsonSchema"]


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """Reward 1 if the whole completion is one JSON value that the schema accepts, else 0.

    White space around the value is allowed; prose or code fences are not, nor are ``NaN`` and ``Infinity``. The schema
    is of the draft that its ``$schema`` names, without one of 2020-12; ``format`` is not checked. A ``$ref`` may point
    into the schema itself or to a draft's own schema. No other is fetched: a schema is a tenant's data, and must not
    make the operator's machine open addresses.

    Options:

    * ``schema``: the schema, as JSON text. Without it each example brings its own in its field ``schema``, as an
      object or as JSON text.
    * ``parses``: reward of a completion that is JSON but not accepted, from 0, the default, to 1. A small one shows a
      policy that hardly ever writes JSON where to begin.
    """

    validator: Any = None
    """Of the option's schema; None where each example brings its own."""
    parses: float = 0.0

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The factory. Raises :class:`ValueError` for bad options."""
        known_options(options, "schema", "parses")
        return cls(
            validator=_validator(options["schema"], "option schema") if "schema" in options else None,
            parses=number_option(options, "parses", default=0.0, low=0.0, high=1.0),
        )

    def __call__(self, sample: Sample) -> float:
        """Raises :class:`ValueError` if there is no usable schema."""
        validator = self.validator
        if validator is None:
            validator = _validator(field_of(sample.example, "schema"), "the example's schema")
        try:
            value = parse_json(sample.completion)
        except ValueError:
            return 0.0
        try:
            return 1.0 if validator.is_valid(value) else self.parses
        except Unresolvable as error:
            raise ValueError(f"the schema refers to {error.ref!r}, which is not in it; nothing is fetched") from error


def _validator(schema: Any, what: str) -> Any:
    if isinstance(schema, str):
        try:
            schema = parse_json(schema)
        except ValueError as error:
            raise ValueError(f"{what} is not JSON: {error}") from None
    cls = validator_for(schema if isinstance(schema, dict) else {}, default=Draft202012Validator)
    try:
        cls.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{what} is not a JSON schema: {error.message} at {error.json_path}") from None
    return cls(schema, registry=REGISTRY)
