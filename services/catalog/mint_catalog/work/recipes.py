"""Checks of a run's recipe: sane figures, and which blobs it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from mint_catalog.model.checks import check_own_revision, check_range, check_text
from mint_catalog.model.records import BlobRef
from mint_catalog.model.run_records import (
    DpoRecipe,
    EvaluationRecipe,
    GrpoRecipe,
    LossFunction,
    OptimizerConfig,
    Recipe,
    Run,
    SftRecipe,
)
from mint_core.errors import InvalidArgument
from mint_core.names import BaseModelName, PolicyName, RevisionName, check_digest, check_id

__all__ = ["MAX_STEPS", "check_recipe", "data_blobs", "evaluated", "num_steps", "with_blobs"]

_KINDS: Final = ("sft", "grpo", "dpo", "evaluation")
MAX_STEPS: Final = 10_000_000
"""Steps of one run."""
_MAX_BATCH: Final = 65_536
_MAX_SAMPLES: Final = 65_536
_MAX_TOKENS: Final = 1 << 20
_MAX_CLIP: Final = 1000
_MAX_TEMPERATURE: Final = 100
_MAX_STOPS: Final = 16
_MAX_STOP_CHARS: Final = 256
_MAX_OPTIONS: Final = 64
_MAX_OPTIONS_CHARS: Final = 65_536
_MAX_SCORER_TIMEOUT_S: Final = 3600
_MAX_ROLLOUT_TTL_S: Final = 366 * 86_400


def check_recipe(run: Run, policy: PolicyName) -> None:
    """Raise ``InvalidArgument`` unless the run has exactly one recipe and its figures make sense."""
    kinds = [kind for kind in _KINDS if getattr(run, kind) is not None]
    if len(kinds) != 1:
        raise InvalidArgument(f"run.recipe is {kinds or 'missing'}: set one of {', '.join(_KINDS)}", field="run.recipe")
    recipe, path = run.recipe, f"run.{kinds[0]}"
    match recipe:
        case SftRecipe():
            _check_sft(recipe, path)
        case GrpoRecipe():
            _check_grpo(recipe, path)
        case DpoRecipe():
            _check_dpo(recipe, path)
        case EvaluationRecipe():
            _check_evaluation(recipe, path, policy)
    _check_result(run, path)


def _check_result(run: Run, path: str) -> None:
    """What is to become of what was trained: publish and promote."""
    recipe = run.recipe
    if isinstance(recipe, EvaluationRecipe) and (run.publish or run.promote_alias or run.continue_from_latest):
        raise InvalidArgument(
            "an evaluation trains nothing: leave publish, promote_alias and continue_from_latest out",
            field="run.publish",
        )
    if isinstance(recipe, GrpoRecipe) and not run.publish:
        raise InvalidArgument(
            "run.publish is not set: a GRPO run publishes a revision after each step, since the next step samples from "
            "it; set it",
            field="run.publish",
        )
    if isinstance(recipe, GrpoRecipe) and recipe.promote_every_steps and not run.promote_alias:
        raise InvalidArgument(
            f"{path}.promote_every_steps is {recipe.promote_every_steps} without run.promote_alias: name the alias to "
            "promote",
            field=f"{path}.promote_every_steps",
        )
    if run.promote_alias:
        check_id(run.promote_alias, field="run.promote_alias")
        if not run.publish:
            raise InvalidArgument(
                f"run.promote_alias is {run.promote_alias!r} without run.publish: nothing would be there to promote",
                field="run.promote_alias",
            )


def _check_steps(steps: int, path: str) -> None:
    check_range(steps, field=f"{path}.num_steps", least=1, most=MAX_STEPS)


def _check_sft(recipe: SftRecipe, path: str) -> None:
    _check_steps(recipe.num_steps, path)
    check_range(recipe.batch_size, field=f"{path}.batch_size", least=0, most=_MAX_BATCH)
    check_range(recipe.max_tokens, field=f"{path}.max_tokens", least=0, most=_MAX_TOKENS)
    check_range(recipe.save_every_steps, field=f"{path}.save_every_steps", least=0)
    check_range(recipe.eval_every_steps, field=f"{path}.eval_every_steps", least=0)
    _check_blob(recipe.train_data, f"{path}.train_data", required=True)
    _check_blob(recipe.eval_data, f"{path}.eval_data", required=False)
    _check_optimizer(recipe.optimizer, f"{path}.optimizer")


def _check_grpo(recipe: GrpoRecipe, path: str) -> None:
    _check_steps(recipe.num_steps, path)
    check_range(recipe.num_prompts_per_step, field=f"{path}.num_prompts_per_step", least=1, most=_MAX_SAMPLES)
    check_range(recipe.group_size, field=f"{path}.group_size", least=2, most=_MAX_SAMPLES)
    num_samples = recipe.num_prompts_per_step * recipe.group_size
    if num_samples > _MAX_SAMPLES:
        raise InvalidArgument(
            f"{path}.group_size is {recipe.group_size}: with {recipe.num_prompts_per_step} prompts a step has "
            f"{num_samples} samples, at most {_MAX_SAMPLES}",
            field=f"{path}.group_size",
        )
    check_range(recipe.max_new_tokens, field=f"{path}.max_new_tokens", least=1, most=_MAX_TOKENS)
    if not 0 <= recipe.clip_epsilon < 1:
        raise InvalidArgument(
            f"{path}.clip_epsilon is {recipe.clip_epsilon}: it must be in [0, 1); 0 means 0.2",
            field=f"{path}.clip_epsilon",
        )
    check_range(recipe.clip_epsilon_high, field=f"{path}.clip_epsilon_high", least=0, most=_MAX_CLIP)
    check_range(recipe.kl_coefficient, field=f"{path}.kl_coefficient", least=0)
    if recipe.loss is LossFunction.CROSS_ENTROPY:
        raise InvalidArgument(
            f"{path}.loss is CROSS_ENTROPY, which takes no advantages: choose PPO, IMPORTANCE_SAMPLING, CISPO or DRO",
            field=f"{path}.loss",
        )
    check_range(recipe.max_staleness, field=f"{path}.max_staleness", least=0, most=1)
    check_range(recipe.promote_every_steps, field=f"{path}.promote_every_steps", least=0)
    check_range(recipe.rollout_ttl_s, field=f"{path}.rollout_ttl_s", least=0, most=_MAX_ROLLOUT_TTL_S)
    _check_sampling(recipe, path)
    _check_scorer(recipe, path)
    _check_blob(recipe.prompts, f"{path}.prompts", required=True)
    _check_optimizer(recipe.optimizer, f"{path}.optimizer")


def _check_dpo(recipe: DpoRecipe, path: str) -> None:
    _check_steps(recipe.num_steps, path)
    check_range(recipe.batch_size, field=f"{path}.batch_size", least=0, most=_MAX_BATCH)
    check_range(recipe.beta, field=f"{path}.beta", least=0)
    _check_blob(recipe.train_data, f"{path}.train_data", required=True)
    _check_optimizer(recipe.optimizer, f"{path}.optimizer")


def _check_evaluation(recipe: EvaluationRecipe, path: str, policy: PolicyName) -> None:
    evaluated(recipe, policy)
    check_range(recipe.max_new_tokens, field=f"{path}.max_new_tokens", least=0, most=_MAX_TOKENS)
    _check_sampling(recipe, path)
    _check_scorer(recipe, path)
    _check_blob(recipe.data, f"{path}.data", required=True)


def evaluated(recipe: EvaluationRecipe, policy: PolicyName) -> RevisionName | BaseModelName:
    """What an evaluation scores: a revision of the policy, or a base model."""
    field = "run.evaluation.revision"
    if recipe.revision.startswith("baseModels/"):
        return BaseModelName.parse(recipe.revision, field=field)
    return check_own_revision(recipe.revision, policy, field=field)


def _check_sampling(recipe: GrpoRecipe | EvaluationRecipe, path: str) -> None:
    check_range(recipe.temperature, field=f"{path}.temperature", least=0, most=_MAX_TEMPERATURE)
    if len(recipe.stop) > _MAX_STOPS:
        raise InvalidArgument(f"{path}.stop has {len(recipe.stop)} texts: at most {_MAX_STOPS}", field=f"{path}.stop")
    for index, text in enumerate(recipe.stop):
        if not 0 < len(text) <= _MAX_STOP_CHARS:
            raise InvalidArgument(
                f"{path}.stop[{index}] has {len(text)} characters: it must have 1 to {_MAX_STOP_CHARS}",
                field=f"{path}.stop[{index}]",
            )


def _check_scorer(recipe: GrpoRecipe | EvaluationRecipe, path: str) -> None:
    if not recipe.scorer:
        raise InvalidArgument(
            f"{path}.scorer is missing: name an installed scorer, or a remote one that the operator configured",
            field=f"{path}.scorer",
        )
    check_text(recipe.scorer, field=f"{path}.scorer", max_chars=128)
    options = recipe.scorer_options
    num_chars = sum(len(key) + len(value) for key, value in options.items())
    if len(options) > _MAX_OPTIONS or num_chars > _MAX_OPTIONS_CHARS:
        raise InvalidArgument(
            f"{path}.scorer_options has {len(options)} entries of together {num_chars} characters: at most "
            f"{_MAX_OPTIONS} of together {_MAX_OPTIONS_CHARS}",
            field=f"{path}.scorer_options",
        )
    check_range(
        recipe.scorer_timeout_s,
        field=f"{path}.scorer_timeout_s",
        least=0,
        most=_MAX_SCORER_TIMEOUT_S,
        hint="0 means 10",
    )


def _check_blob(blob: BlobRef | None, field: str, *, required: bool) -> None:
    if blob is None:
        if required:
            raise InvalidArgument(f"{field} is missing: upload a JSONL blob and name its digest", field=field)
        return
    check_digest(blob.digest, field=f"{field}.digest")


def _check_optimizer(optimizer: OptimizerConfig | None, field: str) -> None:
    if optimizer is None:
        return
    for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm", "num_warmup_steps"):
        check_range(getattr(optimizer, name), field=f"{field}.{name}", least=0)
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        if not (math.isfinite(value) and 0 <= value < 1):
            raise InvalidArgument(f"{field}.{name} is {value}: it must be in [0, 1)", field=f"{field}.{name}")


def num_steps(recipe: Recipe | None) -> int:
    """Optimizer steps planned; 0 for an evaluation."""
    return 0 if recipe is None or isinstance(recipe, EvaluationRecipe) else recipe.num_steps


def data_blobs(run: Run) -> Mapping[str, BlobRef]:
    """The blobs a run reads, by the path of the field that names each."""
    recipe = run.recipe
    named: dict[str, BlobRef | None] = {}
    match recipe:
        case SftRecipe():
            named = {"run.sft.train_data": recipe.train_data, "run.sft.eval_data": recipe.eval_data}
        case GrpoRecipe():
            named = {"run.grpo.prompts": recipe.prompts}
        case DpoRecipe():
            named = {"run.dpo.train_data": recipe.train_data}
        case EvaluationRecipe():
            named = {"run.evaluation.data": recipe.data}
    return {field: blob for field, blob in named.items() if blob is not None}


def with_blobs(run: Run, stored: Callable[[BlobRef], BlobRef]) -> Run:
    """The run with each blob reference replaced by what ``stored`` makes of it (its true size)."""

    def known(blob: BlobRef | None) -> BlobRef | None:
        return None if blob is None else stored(blob)

    sft, grpo, dpo, evaluation = run.sft, run.grpo, run.dpo, run.evaluation
    return replace(
        run,
        sft=sft and replace(sft, train_data=known(sft.train_data), eval_data=known(sft.eval_data)),
        grpo=grpo and replace(grpo, prompts=known(grpo.prompts)),
        dpo=dpo and replace(dpo, train_data=known(dpo.train_data)),
        evaluation=evaluation and replace(evaluation, data=known(evaluation.data)),
    )
