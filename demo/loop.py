"""What one GRPO run's steps say about its loop."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HANDOFF", "PHASES", "LoopFigures"]

PHASES = ("sample", "score", "persist", "update", "save", "export", "load", "first_token")
"""In the order of a step. ``sample`` begins with the load of the new revision and its first token, which are phases of
their own here; ``load`` and ``first_token`` of a step are those of the batch it was updated with."""

HANDOFF = ("export", "load", "first_token")
"""From a saved state to the first token of the revision made of it."""


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """Times and rewards over all steps of one run."""

    num_steps: int
    handoff_fraction: float
    """Share of the steps' time that went into :data:`HANDOFF`."""
    handoff_and_save_fraction: float
    """The same with the time in which the trainer saved its state."""
    phase_ms: Mapping[str, float]
    """Median over the steps, by phase."""
    step_ms: float
    """Median over the steps."""
    rewards: Sequence[float]
    """Mean reward of each step's samples."""
    behavior_kl: float
    """Median over the steps: divergence between the engine's and the trainer's log-probabilities, per token."""
    tokens_per_s: float
    """Median over the steps: tokens sampled and trained on, by the time of the whole step."""

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]]) -> LoopFigures:
        """Of the metrics of all steps, oldest first."""
        total_ms = sum(step["step_ms"] for step in steps)

        def share(phases: Sequence[str]) -> float:
            # A step that another attempt finished lacks the phases of the first.
            return sum(step.get(f"{phase}_ms", 0.0) for step in steps for phase in phases) / total_ms

        def median(name: str) -> float:
            return statistics.median(step[name] for step in steps if name in step)

        return cls(
            num_steps=len(steps),
            handoff_fraction=share(HANDOFF),
            handoff_and_save_fraction=share(("save", *HANDOFF)),
            phase_ms={phase: median(f"{phase}_ms") for phase in PHASES},
            step_ms=median("step_ms"),
            rewards=[step["reward_mean"] for step in steps],
            behavior_kl=median("behavior_kl"),
            tokens_per_s=median("tokens_per_s"),
        )

    @property
    def reward_gain(self) -> float:
        """Mean reward of the last quarter of the steps minus that of the first."""
        quarter = max(1, len(self.rewards) // 4)
        return statistics.fmean(self.rewards[-quarter:]) - statistics.fmean(self.rewards[:quarter])

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_steps": self.num_steps,
            "handoff_fraction": self.handoff_fraction,
            "handoff_and_save_fraction": self.handoff_and_save_fraction,
            "phase_ms": dict(self.phase_ms),
            "step_ms": self.step_ms,
            "rewards": list(self.rewards),
            "reward_gain": self.reward_gain,
            "behavior_kl": self.behavior_kl,
            "tokens_per_s": self.tokens_per_s,
        }
