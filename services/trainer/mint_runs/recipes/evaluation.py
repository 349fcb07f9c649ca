"""Evaluation: a revision answers held-out prompts, a scorer judges the answers, the catalog keeps the figures.

Nothing is trained and nothing is kept between attempts: with the seed of the recipe a killed evaluation that starts
again asks the same questions in the same way.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mint_api.v1 import evaluation_service_pb2, run_service_pb2
from mint_core.errors import InvalidArgument, NotFound
from mint_core.names import BaseModelName, RevisionName, RunName
from mint_runs.attempt import Attempt, Outcome
from mint_runs.prompts import PromptExample, parse_prompts
from mint_runs.rollouts.making import score_samples
from mint_runs.rollouts.sampling import Sampler, SamplingPlan, sample_seed
from mint_runs.scoring import Scored, Scoring, open_scorer

__all__ = ["EvaluationPlan", "evaluation_metrics", "run_evaluation"]

_DEFAULT_MAX_NEW_TOKENS = 128
_DEFAULT_SCORER_TIMEOUT_S = 10.0
_BATCH_SIZE = 64
"""Prompts that are sampled before they are scored and progress is told."""
_PASS_SCORE = 1.0


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """A recipe, checked and with its defaults filled in."""

    model: str
    """What answers: a revision name of the run's policy, or the name of its base model."""
    sampling: SamplingPlan
    scorer_timeout_s: float

    @classmethod
    def of(cls, run: run_service_pb2.Run, *, base_model: str) -> Self:
        """Fill in defaults; ``base_model`` is the policy's. Raises :class:`InvalidArgument` naming the field."""
        recipe = run.evaluation
        for name in ("max_new_tokens", "temperature", "scorer_timeout_s"):
            value = getattr(recipe, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(
                    f"evaluation.{name} is {value}: expected 0 for the default, or more", field=f"evaluation.{name}"
                )
        _check_model(recipe.revision, policy=run.policy, base_model=base_model)
        return cls(
            model=recipe.revision,
            sampling=SamplingPlan(
                recipe.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS, recipe.temperature, tuple(recipe.stop)
            ),
            scorer_timeout_s=recipe.scorer_timeout_s or _DEFAULT_SCORER_TIMEOUT_S,
        )


def evaluation_metrics(scores: Sequence[Scored]) -> dict[str, float]:
    """Figures over the samples that have a score: ``score_mean``, ``score_std`` (of a sample, n - 1),
    ``score_standard_error`` of the mean, ``pass_rate`` (score of at least 1); and ``num_unscored``, which is all there
    is without a score."""
    values = [scored.value for scored in scores if scored.value is not None]
    metrics = {"num_unscored": float(len(scores) - len(values))}
    if values:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        metrics |= {
            "score_mean": statistics.fmean(values),
            "score_std": std,
            "score_standard_error": std / math.sqrt(len(values)),
            "pass_rate": sum(value >= _PASS_SCORE for value in values) / len(values),
        }
    return metrics


async def run_evaluation(attempt: Attempt) -> Outcome:
    """Sample, score, and record the evaluation that has the run's id."""
    recipe = attempt.run.evaluation
    plan = EvaluationPlan.of(attempt.run, base_model=attempt.policy.base_model)
    if attempt.run.num_attempts > 1 and await _is_recorded(attempt):
        return Outcome()
    prompts = await attempt.read_lines(recipe.data, lambda lines: parse_prompts(lines, source="data"), source="data")
    async with open_scorer(
        recipe.scorer, dict(recipe.scorer_options), timeout_s=plan.scorer_timeout_s, settings=attempt.settings
    ) as scoring:
        scores = await _score_all(attempt, plan, prompts, scoring)
    metrics = evaluation_metrics(scores)
    await _record(attempt, len(prompts), metrics)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    attempt.reporter.event("evaluated", f"{plan.model} on {len(prompts)} prompts: {shown}")
    return Outcome()


async def _score_all(
    attempt: Attempt, plan: EvaluationPlan, prompts: Sequence[PromptExample], scoring: Scoring
) -> list[Scored]:
    seed = attempt.run.evaluation.seed
    sampler = Sampler(attempt.client, attempt.settings, model=plan.model, tenant=attempt.tenant, check=attempt.check)
    scores: list[Scored] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[start : start + _BATCH_SIZE]
        wanted = [(prompt, sample_seed(seed, 0, start + place, 0)) for place, prompt in enumerate(batch)]

        def note(num_sampled: int, *, num_done: int = start) -> None:
            progress = run_service_pb2.RunProgress(step=num_done + num_sampled, num_steps=len(prompts))
            progress.metrics.update(evaluation_metrics(scores))
            attempt.reporter.progress(progress)

        sampled = await sampler.sample(wanted, plan.sampling, note=note)
        pairs = list(zip(batch, sampled.generations, strict=True))
        scores.extend(await score_samples(scoring, pairs, attempt.check))
        note(len(batch))
    return scores


async def _is_recorded(attempt: Attempt) -> bool:
    """Whether an earlier attempt ended between recording and telling so."""
    name = f"{attempt.run.policy}/evaluations/{_evaluation_id(attempt)}"
    try:
        evaluation = await attempt.patiently("catalog", lambda: attempt.client.evaluations.get(name))
    except NotFound:
        return False
    return evaluation.run == attempt.run.name


async def _record(attempt: Attempt, num_examples: int, metrics: dict[str, float]) -> None:
    run, recipe = attempt.run, attempt.run.evaluation
    evaluation = evaluation_service_pb2.Evaluation(
        revision="" if _is_base(recipe.revision) else recipe.revision,
        scorer=recipe.scorer,
        data_digest=recipe.data.digest,
        num_examples=num_examples,
        metrics=metrics,
        run=run.name,
    )
    attempt.lease.check()
    await attempt.patiently(
        "catalog",
        lambda: attempt.client.evaluations.create(run.policy, _evaluation_id(attempt), evaluation, fence=attempt.fence),
    )


def _evaluation_id(attempt: Attempt) -> str:
    return RunName.parse(attempt.run.name).run


def _check_model(name: str, *, policy: str, base_model: str) -> None:
    if _is_base(name):
        if str(BaseModelName.parse(name, field="evaluation.revision")) != base_model:
            raise InvalidArgument(
                f"evaluation.revision is {name}: {policy} is over {base_model}, name that to score its base",
                field="evaluation.revision",
            )
        return
    if str(RevisionName.parse(name, field="evaluation.revision").parent) != policy:
        raise InvalidArgument(
            f"evaluation.revision is {name}: expected a revision of {policy}, or {base_model} to score the base",
            field="evaluation.revision",
        )


def _is_base(name: str) -> bool:
    return name.startswith("baseModels/")
