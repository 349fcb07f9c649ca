"""How sure a difference of scores is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "paired_bootstrap"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and the bounds of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """95% percentile interval of ``mean(after - before)`` over prompts (Efron & Tibshirani 1993, ch. 13).

    ``before`` and ``after`` are scores of the same prompts in the same order; prompts are resampled, so that what makes
    a prompt easy or hard cancels.
    """
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(differences), size=(num_resamples, len(differences)))
    means = differences[chosen].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))
