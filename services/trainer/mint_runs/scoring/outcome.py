"""What scoring a sample came to, wherever the scorer runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mint_scorers import Sample

__all__ = ["Scored", "Scoring", "one_line", "seconds", "unscored"]

_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Scored:
    """Outcome for one sample: a reward or the reason why there is none."""

    value: float | None
    """The reward, finite; None if there is none."""
    error: str = ""
    """One sentence; empty if there is a reward."""


class Scoring(Protocol):
    """A scorer that is ready."""

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """One outcome for each sample, in order. What the scorer does wrong is an outcome and never raised.

        Give it all samples of a step at once: they are scored side by side where that is quicker, while calls wait for
        each other.
        """


def unscored(error: str) -> Scored:
    """No reward, and why."""
    return Scored(None, one_line(error))


def one_line(text: str) -> str:
    """A scorer's words as one line of a sane length, and as valid Unicode."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= _MAX_ERROR_CHARS else f"{line[: _MAX_ERROR_CHARS - 1]}…"


def seconds(duration_s: float) -> str:
    """A duration for an error's sentence: ``2.5 s``."""
    return f"{round(duration_s, 3):g} s"
