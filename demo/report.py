"""What the demo claims, and whether it is true."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.loop import LoopFigures
from demo.statistics import Interval, paired_bootstrap
from mint_scorers import Sample, make_scorer

__all__ = ["PolicyStory", "Report", "Served"]

MIN_HELDOUT = 100
MAX_HANDOFF_FRACTION = 0.15


@dataclass(slots=True)
class Served:
    """The answers of one served version to the held-out prompts."""

    version: str
    """``base``, ``revision_1``, ``revision_2`` or ``rolled_back``."""
    revision: str
    """The revision that every answer's first message named; empty for the base."""
    digest: str
    answers: list[str]
    exact_token_ids: list[list[int]] = field(default_factory=list)
    """Tokens of the first answers, generated one request at a time with an empty prefix cache."""


@dataclass(slots=True)
class PolicyStory:
    """One policy's life: which versions were served, and what they answered."""

    policy: str
    prompts: list[str]
    references: list[str]
    scorer: str
    """The scorer that judges the answers, the same that a GRPO run is rewarded by."""
    served: dict[str, Served] = field(default_factory=dict)

    def scores(self) -> dict[str, float]:
        """Mean reward of each version."""
        return {name: sum(one) / len(one) for name, one in self._rewards().items()}

    def gains(self) -> dict[str, Interval]:
        """Difference between each version and the one before it."""
        rewards = self._rewards()
        order = [version for version in ("base", "revision_1", "revision_2") if version in rewards]
        return {
            f"{after} - {before}": paired_bootstrap(rewards[before], rewards[after])
            for before, after in itertools.pairwise(order)
        }

    def rollback_identical(self) -> bool:
        """Whether the rolled-back answers are revision 1's, token for token, under equal conditions."""
        before, after = (self.served[version].exact_token_ids for version in ("revision_1", "rolled_back"))
        return bool(before) and before == after

    def _rewards(self) -> dict[str, list[float]]:
        scorer = make_scorer(self.scorer, {})
        return {
            name: [
                scorer(Sample(prompt, answer, {"completion": reference}))
                for prompt, answer, reference in zip(self.prompts, one.answers, self.references, strict=True)
            ]
            for name, one in self.served.items()
        }


@dataclass(slots=True)
class Report:
    """Everything that was measured."""

    seed: int
    base_model: str
    base_digest: str
    base_bytes: int
    main: PolicyStory
    """The policy that is trained twice and rolled back."""
    other: PolicyStory
    """Its neighbour on the same resident base, of another tenant."""
    bytes_moved: int = 0
    """All four transfers: weights to the store and to the exporter, the packed blob to the store and to the node."""
    blob_bytes: int = 0
    """The packed blob alone."""
    handoff_ms: float = 0.0
    """Last optimizer step of revision 2's run to the first token that revision 2 served."""
    handoff_parts_ms: dict[str, float] = field(default_factory=dict)
    grpo: LoopFigures | None = None
    """The loop that made revision 2."""
    seconds: dict[str, float] = field(default_factory=dict)

    def claims(self) -> dict[str, bool]:
        """Each claim and whether it holds."""
        gains = self.main.gains()
        neighbours = {self.main.served["revision_1"].digest, self.other.served["revision_1"].digest}
        return {
            f"at least {MIN_HELDOUT} held-out prompts": len(self.main.prompts) >= MIN_HELDOUT,
            "revision 1 beats the base": gains["revision_1 - base"].is_gain,
            "revision 2 beats revision 1": gains["revision_2 - revision_1"].is_gain,
            "the neighbour's revision 1 beats the base": self.other.gains()["revision_1 - base"].is_gain,
            "two policies, two revisions, one base": len(neighbours) == 2,
            "rolled back to revision 1's digest": self.main.served["rolled_back"].digest
            == self.main.served["revision_1"].digest,
            "rolled-back answers equal revision 1's token for token": self.main.rollback_identical(),
            "all transfers together moved less than a fifth of the base": 0 < self.bytes_moved < self.base_bytes / 5,
            "the new revision's first token was timed": self.handoff_ms > 0,
            f"export, load and first token took under {MAX_HANDOFF_FRACTION:.0%} of the GRPO steps": self.grpo
            is not None
            and 0 < self.grpo.handoff_fraction < MAX_HANDOFF_FRACTION,
        }

    def as_dict(self) -> dict[str, Any]:
        def story(one: PolicyStory) -> dict[str, Any]:
            return {
                "policy": one.policy,
                "scorer": one.scorer,
                "scores": one.scores(),
                "gains": {
                    name: {"mean": gain.mean, "low": gain.low, "high": gain.high} for name, gain in one.gains().items()
                },
                "digests": {name: served.digest for name, served in one.served.items()},
                "num_heldout": len(one.prompts),
            }

        return {
            "seed": self.seed,
            "base_model": self.base_model,
            "base_digest": self.base_digest,
            "base_bytes": self.base_bytes,
            "scores": self.main.scores(),
            "rollback_identical": self.main.rollback_identical(),
            "num_compared": len(self.main.served["rolled_back"].exact_token_ids),
            "bytes_moved": self.bytes_moved,
            "blob_bytes": self.blob_bytes,
            "handoff_ms": self.handoff_ms,
            "handoff_parts_ms": self.handoff_parts_ms,
            "grpo": self.grpo.as_dict() if self.grpo else None,
            "digests": {name: served.digest for name, served in self.main.served.items()},
            "policies": [story(self.main), story(self.other)],
            "seconds": self.seconds,
            "claims": self.claims(),
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def show(self, console: Console) -> None:
        for story in (self.main, self.other):
            _show_answers(console, story)
            _show_scores(console, story)
        console.print(
            f"\nfrom trainer to engine: an adapter of [bold]{self.blob_bytes / 1e6:.1f} MB[/], "
            f"{self.bytes_moved / 1e6:.1f} MB with every transfer counted "
            f"(the base has {self.base_bytes / 1e6:.0f} MB); last optimizer step → first token of the new revision: "
            f"[bold]{self.handoff_ms:.0f} ms[/]"
        )
        if self.grpo:
            _show_loop(console, self.grpo)
        for claim, holds in self.claims().items():
            console.print(f"  [{'green]✓' if holds else 'red]✗'}[/] {claim}")


def _show_answers(console: Console, story: PolicyStory, num_shown: int = 4) -> None:
    table = Table(title=f"{story.policy}: held-out prompts", show_lines=True, expand=True)
    table.add_column("prompt", ratio=3)
    for version in story.served:
        table.add_column(version.replace("_", " "), ratio=2)
    for i in range(num_shown):
        answers = [_short(served.answers[i]) for served in story.served.values()]
        table.add_row(_short(story.prompts[i], 120), *answers)
    console.print(table)


def _show_scores(console: Console, story: PolicyStory) -> None:
    shown = "   ".join(f"{name.replace('_', ' ')} [bold]{score:.3f}[/]" for name, score in story.scores().items())
    console.print(f"{story.policy}: mean reward ({story.scorer}) on {len(story.prompts)} held-out prompts: {shown}")
    for name, gain in story.gains().items():
        console.print(
            f"  {name.replace('_', ' ')}: {gain.mean:+.3f}, 95% interval [{gain.low:+.3f}, {gain.high:+.3f}]",
            markup=False,
        )


def _show_loop(console: Console, loop: LoopFigures) -> None:
    phases = ", ".join(f"{phase.replace('_', ' ')} {ms:.0f}" for phase, ms in loop.phase_ms.items())
    console.print(
        f"GRPO: {loop.num_steps} steps of {loop.step_ms / 1000:.1f} s; median ms of the phases: {phases}; export, load "
        f"and first token are [bold]{loop.handoff_fraction:.1%}[/] of the time"
    )


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
