"""Evaluations against a world in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.runs.memory_world import BASE, DIGEST, POLICY, RUN, Killed, MemoryWorld

from mint_api.v1 import common_pb2, revision_service_pb2, run_service_pb2
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_runs.attempt import RunCancelled
from mint_runs.recipes import evaluation
from mint_runs.recipes.evaluation import EvaluationPlan, evaluation_metrics, run_evaluation
from mint_runs.scoring import Scored
from mint_scorers import Sample

NUM_PROMPTS = 70
LINES = [json.dumps({"prompt": f"p{i}", "completion": "x"}).encode() + b"\n" for i in range(NUM_PROMPTS)]
REVISION = f"{POLICY}/revisions/1"


class MemoryScoring:
    """Every third sample fails, the others score 1 and 0 in turn."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        first = len(self.samples)
        self.samples += samples
        places = range(first, first + len(samples))
        return [Scored(None, "no") if place % 3 == 0 else Scored(float(place % 3 == 1)) for place in places]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> MemoryScoring:
    scoring = MemoryScoring()

    @contextlib.asynccontextmanager
    async def open_scorer(name: str, options: Any, *, timeout_s: float, settings: Any) -> AsyncIterator[MemoryScoring]:
        assert (name, timeout_s) == ("exact_match", 10.0)
        yield scoring

    monkeypatch.setattr(evaluation, "open_scorer", open_scorer)
    return scoring


def evaluation_world(tmp_path: Path, **recipe: Any) -> MemoryWorld:
    world = MemoryWorld(tmp_path, LINES)
    world.revisions.publish(revision_service_pb2.Lineage(run="tenants/acme/runs/r0", step=1), "weights")
    values = {"revision": REVISION, "scorer": "exact_match", "seed": 3} | recipe
    world.run.evaluation.CopyFrom(run_service_pb2.EvaluationRecipe(data=common_pb2.BlobRef(digest=DIGEST), **values))
    return world


async def test_a_revision_is_scored_and_recorded_under_the_runs_id(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = evaluation_world(tmp_path)
    attempt = world.attempt()
    await run_evaluation(attempt)
    await attempt.reporter.flush()
    (kept,) = world.evaluations.kept.items()
    assert kept[0] == f"{POLICY}/evaluations/r1"
    assert (kept[1].revision, kept[1].run, kept[1].scorer) == (REVISION, RUN, "exact_match")
    assert (kept[1].data_digest, kept[1].num_examples) == (DIGEST, NUM_PROMPTS)
    assert dict(kept[1].metrics) == pytest.approx(
        {
            "num_unscored": 24,
            "score_mean": 0.5,
            "score_std": (46 * 0.25 / 45) ** 0.5,
            "score_standard_error": (0.25 / 45) ** 0.5,
            "pass_rate": 0.5,
        }
    )
    assert (world.run.progress.step, world.run.progress.num_steps) == (NUM_PROMPTS, NUM_PROMPTS)
    assert world.events == ["evaluated"]
    assert {(sampling.temperature, sampling.max_new_tokens) for sampling in world.asked} == {(0.0, 128)}
    assert [sample.prompt for sample in scoring.samples] == [f"p{i}" for i in range(NUM_PROMPTS)]
    assert scoring.samples[0].example == {"completion": "x"}


async def test_the_base_is_asked_when_it_is_named(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = evaluation_world(tmp_path, revision=BASE, temperature=0.7, max_new_tokens=2)
    await run_evaluation(world.attempt())
    (kept,) = world.evaluations.kept.values()
    assert kept.revision == ""
    assert set(world.models) == {BASE}
    assert {sampling.temperature for sampling in world.asked} == {0.7}
    assert len({sampling.seed for sampling in world.asked}) == NUM_PROMPTS


async def test_a_killed_evaluation_starts_again(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = evaluation_world(tmp_path)
    world.interrupts.coming = iter([None] * 30 + [Killed()])
    with pytest.raises(Killed):
        await run_evaluation(world.attempt())
    scoring.samples.clear()
    await run_evaluation(world.attempt())
    assert len(world.evaluations.kept) == 1
    num_asked = len(world.asked)
    await run_evaluation(world.attempt())  # what was recorded is not asked again
    assert len(world.asked) == num_asked


async def test_a_cancel_ends_an_evaluation(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = evaluation_world(tmp_path)
    attempt = world.attempt()
    attempt.reporter.cancel_requested = True
    with pytest.raises(RunCancelled):
        await run_evaluation(attempt)
    assert not world.asked


async def test_the_base_never_answers_for_a_revision(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = evaluation_world(tmp_path)
    world.answered_by = f"{POLICY}/revisions/2"
    with pytest.raises(FailedPrecondition, match=r"revisions/1  was asked and .*revisions/2 sha256:.* answered"):
        await run_evaluation(world.attempt())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"revision": "tenants/acme/policies/other/revisions/1"}, f"expected a revision of {POLICY}, or {BASE}"),
        ({"revision": "baseModels/other"}, f"{POLICY} is over {BASE}, name that"),
        ({"revision": f"{POLICY}/aliases/live"}, "evaluation.revision is"),
        ({"temperature": -1.0}, "evaluation.temperature is -1.0"),
        ({"max_new_tokens": -1}, "evaluation.max_new_tokens is -1"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        EvaluationPlan.of(evaluation_world(tmp_path, **values).run, base_model=BASE)
    assert problem in caught.value.message


def test_figures_of_few_samples() -> None:
    assert evaluation_metrics([]) == {"num_unscored": 0.0}
    assert evaluation_metrics([Scored(None, "no")]) == {"num_unscored": 1.0}
    assert evaluation_metrics([Scored(0.5)]) == {
        "num_unscored": 0.0,
        "score_mean": 0.5,
        "score_std": 0.0,
        "score_standard_error": 0.0,
        "pass_rate": 0.0,
    }
