"""A GRPO recipe, checked and with its defaults filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mint_api.v1 import common_pb2, run_service_pb2
from mint_core.errors import InvalidArgument

__all__ = ["DEFAULT_LEARNING_RATE", "GrpoPlan"]

DEFAULT_LEARNING_RATE = 1e-4
"""For adapters of rank 8 to 16 on small bases: LoRA wants about ten times what full fine-tuning does, also with
policy gradients (Schulman et al. 2025, "LoRA Without Regret")."""

_DEFAULT_CLIP_EPSILON = 0.2
_DEFAULT_SCORER_TIMEOUT_S = 10.0
_DEFAULT_ROLLOUT_TTL_S = 7 * 24 * 3600

_CLIPPED = (common_pb2.LOSS_FUNCTION_PPO, common_pb2.LOSS_FUNCTION_CISPO)
_WITH_RATIO = (*_CLIPPED, common_pb2.LOSS_FUNCTION_IMPORTANCE_SAMPLING)
_LOSSES = (*_WITH_RATIO, common_pb2.LOSS_FUNCTION_DRO)


@dataclass(frozen=True, slots=True)
class GrpoPlan:
    """What :mod:`mint_runs.recipes.grpo` does; fields as in ``GrpoRecipe``."""

    num_steps: int
    num_prompts_per_step: int
    group_size: int
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    seed: int
    optimizer: run_service_pb2.OptimizerConfig
    loss: common_pb2.LossFunction.ValueType
    loss_parameters: Mapping[str, float]
    """As the trainer takes them."""
    kl_coefficient: float
    advantage: run_service_pb2.GroupAdvantage.ValueType
    weighting: run_service_pb2.TokenWeighting.ValueType
    max_staleness: int
    promote_every_steps: int
    """0 means at the end only."""
    scorer_timeout_s: float
    rollout_ttl_s: int

    @classmethod
    def of(cls, recipe: run_service_pb2.GrpoRecipe) -> Self:
        """Fill in defaults. Raises :class:`InvalidArgument` naming the field."""
        for name, least in (("num_steps", 1), ("num_prompts_per_step", 1), ("group_size", 2), ("max_new_tokens", 1)):
            _check(getattr(recipe, name) >= least, name, getattr(recipe, name), f"at least {least}")
        for name in ("temperature", "clip_epsilon", "clip_epsilon_high", "kl_coefficient", "scorer_timeout_s"):
            value = getattr(recipe, name)
            _check(math.isfinite(value) and value >= 0, name, value, "0 for the default, or more")
        for name in ("promote_every_steps", "rollout_ttl_s"):
            _check(getattr(recipe, name) >= 0, name, getattr(recipe, name), "0 for the default, or more")
        _check(recipe.max_staleness in (0, 1), "max_staleness", recipe.max_staleness, "0 or 1")
        _check(recipe.clip_epsilon < 1, "clip_epsilon", recipe.clip_epsilon, "less than 1")
        loss = recipe.loss or common_pb2.LOSS_FUNCTION_PPO
        _check(loss in _LOSSES, "loss", _loss_name(loss), f"one of {', '.join(map(_loss_name, _LOSSES))}")
        optimizer = run_service_pb2.OptimizerConfig()
        optimizer.CopyFrom(recipe.optimizer)
        optimizer.learning_rate = optimizer.learning_rate or DEFAULT_LEARNING_RATE
        return cls(
            num_steps=recipe.num_steps,
            num_prompts_per_step=recipe.num_prompts_per_step,
            group_size=recipe.group_size,
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature or 1.0,
            stop=tuple(recipe.stop),
            seed=recipe.seed,
            optimizer=optimizer,
            loss=loss,
            loss_parameters=_loss_parameters(recipe, loss),
            kl_coefficient=recipe.kl_coefficient,
            advantage=recipe.advantage or run_service_pb2.GROUP_ADVANTAGE_STANDARDIZED,
            weighting=recipe.weighting or run_service_pb2.TOKEN_WEIGHTING_TOKEN_MEAN,
            max_staleness=recipe.max_staleness,
            promote_every_steps=recipe.promote_every_steps,
            scorer_timeout_s=recipe.scorer_timeout_s or _DEFAULT_SCORER_TIMEOUT_S,
            rollout_ttl_s=recipe.rollout_ttl_s or _DEFAULT_ROLLOUT_TTL_S,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 1): linear warm-up to the peak, constant after it."""
        peak, num_warmup = self.optimizer.learning_rate, self.optimizer.num_warmup_steps
        return peak * min(1.0, step / (num_warmup + 1))

    def is_promoted(self, step: int) -> bool:
        """Whether the run's alias follows to the revision of ``step``."""
        if step == self.num_steps:
            return True
        return self.promote_every_steps > 0 and step > 0 and step % self.promote_every_steps == 0


def _loss_parameters(recipe: run_service_pb2.GrpoRecipe, loss: common_pb2.LossFunction.ValueType) -> dict[str, float]:
    parameters: dict[str, float] = {}
    if loss in _CLIPPED:
        below = recipe.clip_epsilon or _DEFAULT_CLIP_EPSILON
        parameters |= {"clip_low": 1.0 - below, "clip_high": 1.0 + (recipe.clip_epsilon_high or below)}
    for name in ("clip_epsilon", "clip_epsilon_high"):
        _check(
            loss in _CLIPPED or not getattr(recipe, name),
            name,
            getattr(recipe, name),
            f"0, since {_loss_name(loss)} clips nothing",
        )
    if recipe.sequence_level_ratio:
        _check(loss in _WITH_RATIO, "sequence_level_ratio", True, f"false, since {_loss_name(loss)} has no ratio")
        parameters["sequence_level"] = 1.0
    if recipe.kl_coefficient:
        parameters["kl_coefficient"] = recipe.kl_coefficient
    return parameters


def _loss_name(loss: int) -> str:
    known = common_pb2.LossFunction.DESCRIPTOR.values_by_number.get(loss)
    return known.name.removeprefix("LOSS_FUNCTION_") if known else str(loss)


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidArgument(f"grpo.{name} is {value}: expected {expected}", field=f"grpo.{name}")
