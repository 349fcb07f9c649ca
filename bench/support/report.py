"""The report of a benchmark: a table for people while it runs, one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["RESULTS", "Report", "Target"]

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should be."""

    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(slots=True)
class Report:
    """Figures as they come, with their targets."""

    bench: str
    settings: Mapping[str, Any]
    targets: Mapping[str, Target] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    """What the figures were computed from."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def figure(self, key: str, value: float) -> None:
        """A figure of the bench."""
        self.figures[key] = _rounded(value)
        target = self.targets.get(key)
        verdict = "" if target is None else f"   target {target}: {'met' if target.is_met(value) else 'MISSED'}"
        self.say(f"  {key:32} {_rounded(value):>14}{verdict}")

    def detail(self, key: str, value: float) -> None:
        """A number behind a figure."""
        self.details[key] = _rounded(value)
        self.say(f"    {key:30} {_rounded(value):>14}")

    def finish(self) -> None:
        """Print the JSON object and write it to ``bench/results``."""
        result = {
            "bench": self.bench,
            "machine": _machine(),
            "settings": dict(self.settings),
            "figures": self.figures,
            "details": self.details,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.bench}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result), flush=True)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def _machine() -> dict[str, Any]:
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {
        "cpu": model or platform.processor(),
        "num_cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": "none",
    }
