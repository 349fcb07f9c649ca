"""Shipped scorer ``exact_match``: the completion is the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from mint_scorers.options import choice_option, known_options
from mint_scorers.scorer import Sample, field_of

__all__ = ["ExactMatch"]

_NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "strip": str.strip,
    "whitespace": lambda text: " ".join(text.split()),
    "casefold": lambda text: " ".join(text.split()).casefold(),
}


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """Reward 1 if the completion equals the example's reference after normalization, else 0.

    Options:

    * ``field``: the example's field that holds the reference, a text. Default ``completion``.
    * ``normalize``: what is done to both texts before they are compared. ``none``; ``strip``, the default: no white
      space at the ends; ``whitespace``: also each run of white space becomes one space; ``casefold``: also letter case
      does not count.
    """

    field: str = "completion"
    normalize: str = "strip"

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The factory. Raises :class:`ValueError` for bad options."""
        known_options(options, "field", "normalize")
        return cls(
            field=options.get("field", "completion"),
            normalize=choice_option(options, "normalize", list(_NORMALIZERS), default="strip"),
        )

    def __call__(self, sample: Sample) -> float:
        """Raises :class:`ValueError` or :class:`TypeError` if the example has no reference, or none that is text."""
        reference = field_of(sample.example, self.field)
        if not isinstance(reference, str):
            raise TypeError(f"the example's field {self.field!r} is {reference!r}: expected the reference as text")
        normalize = _NORMALIZERS[self.normalize]
        return float(normalize(sample.completion) == normalize(reference))
