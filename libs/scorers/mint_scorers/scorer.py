"""The interface of a scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

__all__ = ["Sample", "Scorer", "ScorerFactory", "field_of"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to judge."""

    prompt: str
    """What the model was given, as text."""
    completion: str
    """What it answered, as text."""
    example: Mapping[str, Any]
    """The other fields of the data set's line, as JSON values; a reference answer is its ``completion``."""


class Scorer(Protocol):
    """Judges completions, one at a time.

    It may raise: that sample then has no reward, which is not the same as a reward of 0. A wrong completion earns a
    low reward; a sample that cannot be judged, because its example lacks a field, say, is worth an error.
    """

    def __call__(self, sample: Sample) -> float:
        """The reward, a finite number; larger is better."""


ScorerFactory: TypeAlias = Callable[[Mapping[str, str]], Scorer]
"""What an entry point names: options in, a scorer out. Raises :class:`ValueError` for options it does not take."""


def field_of(example: Mapping[str, Any], name: str) -> Any:
    """The example's field ``name``. Raises :class:`ValueError` saying which fields there are if this one is not."""
    if name not in example:
        raise ValueError(f"the example has no field {name!r}; it has {', '.join(sorted(example)) or 'none'}")
    return example[name]
