"""Reading a scorer's options: text by name, every complaint names option, value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["choice_option", "known_options", "number_option"]


def known_options(options: Mapping[str, str], *known: str) -> None:
    """Raise :class:`ValueError` for an option that is not among ``known``: a typing mistake must not be silent."""
    for name in sorted(set(options) - set(known)):
        raise ValueError(f"option {name!r} is not known; known are {', '.join(sorted(known))}")


def choice_option(options: Mapping[str, str], name: str, choices: Sequence[str], *, default: str) -> str:
    """One of ``choices``."""
    value = options.get(name, default)
    if value not in choices:
        raise ValueError(f"option {name} is {value!r}: expected one of {', '.join(choices)}")
    return value


def number_option(options: Mapping[str, str], name: str, *, default: float, low: float, high: float) -> float:
    """A number from ``low`` to ``high``, both allowed."""
    text = options.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ValueError(f"option {name} is {text!r}: expected a number from {low:g} to {high:g}")
    return value
