"""Curves of a run: one figure over its steps, with a running mean where there are many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mint_api.v1 import run_service_pb2
from mint_core.errors import FailedPrecondition, InvalidArgument

__all__ = ["Curve", "curves_of"]

_DEFAULT_METRICS = ("loss", "reward_mean")
_MAX_RAW = 20
"""More points than this are shown with their running mean."""

_LABELS = {
    "behavior_kl": "KL of engine and trainer (nats per token)",
    "clip_fraction": "share of clipped tokens",
    "entropy": "entropy (nats per token)",
    "loss": "loss per token",
    "reward_mean": "mean reward",
    "reward_std": "standard deviation of rewards",
    "tokens_per_s": "tokens per second",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One figure over the steps at which it is finite; there is at least one."""

    metric: str
    """As the run names it."""
    steps: tuple[int, ...]
    """Ascending."""
    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """What it is, for people, with its unit."""
        if self.metric.endswith("_ms"):
            return f"{self.metric.removesuffix('_ms').replace('_', ' ')} (ms)"
        return _LABELS.get(self.metric, self.metric.replace("_", " "))

    @property
    def window(self) -> int:
        """Points that one point of the running mean covers; 0 where there are too few to smooth."""
        return max(5, len(self.values) // 10) if len(self.values) > _MAX_RAW else 0

    @property
    def running_mean(self) -> tuple[float, ...]:
        """At each point the mean of the last :attr:`window`, of fewer where so many have not been; empty without."""
        if not self.window:
            return ()
        ends = range(1, len(self.values) + 1)
        return tuple(statistics.fmean(self.values[max(0, end - self.window) : end]) for end in ends)


def curves_of(run: str, steps: Sequence[run_service_pb2.RunStep], metrics: Sequence[str] | None = None) -> list[Curve]:
    """A curve for each of ``metrics``; without, for the loss and, where there is one, the reward.

    Raises :class:`FailedPrecondition` for a run without steps, :class:`InvalidArgument` for a figure it does not have.
    """
    if not steps:
        raise FailedPrecondition(f"run {run} has no figures of steps yet: there is nothing to draw")
    known = {"loss"}.union(*(step.metrics for step in steps))
    curves = []
    for metric in dict.fromkeys(metrics or [name for name in _DEFAULT_METRICS if name in known]):
        points = [(step.step, value) for step in steps if (value := _value(step, metric)) is not None]
        if not points:
            raise InvalidArgument(
                f"metric is {metric!r}: no step of run {run} has a number for it; there are {', '.join(sorted(known))}",
                field="metric",
            )
        curves.append(Curve(metric, *zip(*points, strict=True)))
    return curves


def _value(step: run_service_pb2.RunStep, metric: str) -> float | None:
    """None where the step does not have it, or has no number for it."""
    value = step.loss if metric == "loss" else step.metrics.get(metric, math.nan)
    return value if math.isfinite(value) else None
