"""What runs can do, by the name of the recipe's field in the run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from mint_runs.attempt import Attempt, Outcome
from mint_runs.recipes.evaluation import run_evaluation
from mint_runs.recipes.grpo import run_grpo
from mint_runs.recipes.sft import run_sft

__all__ = ["RECIPES", "Recipe"]

Recipe = Callable[[Attempt], Awaitable[Outcome]]
"""Does one attempt, from the run's latest state if it has one. Raises ``RunCancelled`` and ``RunDrained`` when it was
asked to stop, and errors of :mod:`mint_core.errors`."""

RECIPES: Mapping[str, Recipe] = MappingProxyType({"evaluation": run_evaluation, "grpo": run_grpo, "sft": run_sft})
