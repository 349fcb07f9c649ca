"""The GRPO loop against a world in memory: whatever is killed wherever, the run goes on from what it has kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.runs.memory_world import DIGEST, POLICY, RUN, Killed, MemoryWorld

from mint_api.v1 import common_pb2, revision_service_pb2, rollout_service_pb2, run_service_pb2
from mint_core.errors import BlobCorrupt, FailedPrecondition, InvalidArgument, LeaseLost, NotFound, Unavailable
from mint_core.names import check_id
from mint_runs.attempt import RunCancelled, RunDrained
from mint_runs.recipes import grpo
from mint_runs.recipes.grpo import run_grpo
from mint_runs.rollouts.codec import read_batch
from mint_runs.rollouts.storage import rollout_id
from mint_runs.scoring import Scored
from mint_scorers import Sample

LINES = [json.dumps({"prompt": f"p{i}", "answer": i}).encode() + b"\n" for i in range(5)]

NUM_CALLS_BEFORE_UPDATE = 3 + 6 + 2
"""Save, commit and export of step 0; six samples; object and pointer."""


class MemoryScoring:
    """The text is the score, except that what ``outcomes`` says comes first."""

    def __init__(self) -> None:
        self.outcomes: list[Scored] = []
        self.samples: list[Sample] = []

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        self.samples += samples
        return [self.outcomes.pop(0) if self.outcomes else Scored(float(sample.completion)) for sample in samples]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> MemoryScoring:
    scoring = MemoryScoring()

    @contextlib.asynccontextmanager
    async def open_scorer(name: str, options: Any, *, timeout_s: float, settings: Any) -> AsyncIterator[MemoryScoring]:
        assert (name, options, timeout_s) == ("exact_match", {"strip": "yes"}, 3.0)
        yield scoring

    monkeypatch.setattr(grpo, "open_scorer", open_scorer)
    return scoring


def grpo_world(tmp_path: Path, **recipe: Any) -> MemoryWorld:
    world = MemoryWorld(tmp_path, LINES)
    values = {
        "num_steps": 3,
        "num_prompts_per_step": 2,
        "group_size": 3,
        "max_new_tokens": 3,
        "seed": 5,
        "scorer": "exact_match",
        "scorer_options": {"strip": "yes"},
        "scorer_timeout_s": 3.0,
        "rollout_ttl_s": 3600,
    }
    world.run.grpo.CopyFrom(run_service_pb2.GrpoRecipe(prompts=common_pb2.BlobRef(digest=DIGEST), **(values | recipe)))
    return world


def batches(world: MemoryWorld) -> dict[int, Any]:
    """The kept batches by step."""
    read = {}
    for pointer in world.rollouts.kept.values():
        path = world.tmp_path / "read"
        path.write_bytes(world.objects[pointer.object_key])
        read[int(pointer.step)] = read_batch(path, key=pointer.object_key)
    return read


async def test_a_run_samples_keeps_updates_and_publishes_every_step(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    await world.finish(run_grpo)
    assert [step for _, step in world.exported] == [0, 1, 2, 3]
    assert [r.lineage.parent_revision for r in world.revisions.published.values()] == [
        "",
        *(f"{POLICY}/revisions/{number}" for number in (1, 2, 3)),
    ]
    assert [promotion[:2] for promotion in world.promotions] == [(f"{POLICY}/aliases/live", 4)]
    kept = batches(world)
    assert {step: batch.revision for step, batch in kept.items()} == {
        step: f"{POLICY}/revisions/{step}" for step in (1, 2, 3)
    }
    for name, pointer in world.rollouts.kept.items():
        assert name == f"{POLICY}/rollouts/r1-{pointer.step:06d}"
        assert pointer.object_key == f"tenants/acme/rollouts/tone/r1/{pointer.step:08d}-11"
        assert (pointer.run, pointer.num_samples, pointer.num_tokens) == (RUN, 6, 18)
        assert pointer.reward_mean == pytest.approx(kept[pointer.step].reward_mean)
        assert pointer.revision_digest == kept[pointer.step].revision_digest
        assert 3000 < pointer.expire_time.seconds - world.steps[1].time.seconds <= 3610
    assert world.trainer.opened == [("fresh 4", False)]
    assert {loss for loss, _ in world.trainer.losses} == {common_pb2.LOSS_FUNCTION_PPO}
    assert world.events == ["saved", "published"] * 4 + ["promoted"]
    assert len(world.asked) == 3 * 6 + 1  # and one request that loads the last revision
    assert world.models[-1] == f"{POLICY}/revisions/4"
    seeds = [sampling.seed for sampling in world.asked[:18]]
    assert len(set(seeds)) == 18


async def test_every_step_has_its_figures(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    await world.finish(run_grpo)
    kept = batches(world)
    assert list(world.steps) == [1, 2, 3]
    for number, step in world.steps.items():
        figures = dict(step.metrics)
        assert figures["reward_mean"] == pytest.approx(kept[number].reward_mean)
        assert figures["entropy"] == pytest.approx(kept[number].entropy)
        assert (figures["num_samples"], figures["num_unscored"], figures["num_tokens"]) == (6, 0, 18)
        assert (figures["clip_fraction"], figures["behavior_kl"]) == (0.5, 0.25)
        assert step.loss == pytest.approx(2.0)
        for name in ("sample", "score", "persist", "update", "save", "export", "load", "first_token", "step"):
            assert figures[f"{name}_ms"] >= 0
        assert figures["tokens_per_s"] > 0
    assert world.run.progress.step == world.run.progress.saved_step == world.run.progress.num_steps == 3
    assert world.run.progress.num_tokens == sum(step.metrics["num_used_samples"] * 3 for step in world.steps.values())
    assert dict(world.run.progress.metrics) == dict(world.steps[3].metrics)


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("at", range(0, 60, 3))
async def test_a_killed_run_ends_with_the_same_weights(
    tmp_path: Path, scoring: MemoryScoring, at: int, max_staleness: int
) -> None:
    whole = grpo_world(tmp_path, max_staleness=max_staleness)
    expected = await whole.finish(run_grpo)
    broken = grpo_world(tmp_path, max_staleness=max_staleness)
    broken.interrupts.coming = iter([None] * at + [Killed()])
    ended = await broken.finish(run_grpo)
    if not max_staleness:
        # Asked again, the same revision draws the same; one that lags behind is not there any more.
        assert ended == expected
    assert [r.lineage.step for r in broken.revisions.published.values()] == [0, 1, 2, 3]
    assert sorted(batches(broken)) == sorted(broken.steps) == [1, 2, 3]
    assert broken.promotions[-1][1] == 4


async def test_no_state_is_current_before_the_figures_of_its_step_are_written(
    tmp_path: Path, scoring: MemoryScoring
) -> None:
    world = grpo_world(tmp_path)
    world.reports.coming = iter([Unavailable("away")])
    with pytest.raises(Unavailable):
        await world.finish(run_grpo)
    assert (world.run.latest_training_state.step, sorted(world.steps)) == (0, [])
    await world.finish(run_grpo)
    assert sorted(world.steps) == [1, 2, 3]


async def test_a_kept_batch_is_never_sampled_again(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    expected = await grpo_world(tmp_path).finish(run_grpo)
    world.interrupts.coming = iter([None] * NUM_CALLS_BEFORE_UPDATE + [Killed()])
    assert await world.finish(run_grpo) == expected
    assert world.events.count("replayed") == 1
    assert "resampled" not in world.events
    assert len(world.asked) == 3 * 6 + 1


async def test_a_batch_that_was_not_kept_is_sampled_anew_and_said_so(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.interrupts.coming = iter([None] * 5 + [Killed()])  # in the middle of the first samples
    await world.finish(run_grpo)
    assert world.events.count("resampled") == 1
    assert "replayed" not in world.events


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("at", range(9))
async def test_a_lost_session_goes_on_from_the_kept_batch(
    tmp_path: Path, scoring: MemoryScoring, at: int, max_staleness: int
) -> None:
    expected = await grpo_world(tmp_path, max_staleness=max_staleness).finish(run_grpo)
    world = grpo_world(tmp_path, max_staleness=max_staleness)
    world.trainer.restarts.coming = iter([None] * (at + 1) + [NotFound("the trainer restarted")])
    assert await world.finish(run_grpo) == expected
    assert world.events.count("session_lost") == 1
    assert len(world.asked) == 3 * 6 + 1


async def test_a_stale_batch_names_its_true_revision(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, max_staleness=1, num_steps=4)
    await world.finish(run_grpo)
    numbers = [batch.revision.rpartition("/")[2] for _, batch in sorted(batches(world).items())]
    assert numbers == ["1", "1", "2", "3"]


async def test_a_continued_run_samples_from_the_revision_before_it(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.trainer.states["old"] = ("old weights", 20)
    start = common_pb2.TrainingState(run="tenants/acme/runs/r0", step=20, weights_key="old")
    world.run.initial_training_state.CopyFrom(start)
    old = world.revisions.publish(revision_service_pb2.Lineage(run=start.run, step=20), "old weights")
    await world.finish(run_grpo)
    assert [step for _, step in world.exported] == [1, 2, 3]
    assert batches(world)[1].revision == old.name
    assert world.revisions.published[2].lineage.parent_revision == old.name


async def test_a_retired_initial_revision_is_exported_anew(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.trainer.states["old"] = ("old weights", 20)
    start = common_pb2.TrainingState(run="tenants/acme/runs/r0", step=20, weights_key="old")
    world.run.initial_training_state.CopyFrom(start)
    old = world.revisions.publish(revision_service_pb2.Lineage(run=start.run, step=20), "old weights")
    old.state = revision_service_pb2.REVISION_STATE_RETIRED
    await world.finish(run_grpo)
    assert [step for _, step in world.exported] == [0, 1, 2, 3]
    assert batches(world)[1].revision == f"{POLICY}/revisions/2"
    assert world.revisions.published[2].lineage.parent_revision == old.name


async def test_promotion_every_so_many_steps(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=5, promote_every_steps=2)
    await world.finish(run_grpo)
    assert [number for _, number, _ in world.promotions] == [3, 5, 6]


async def test_samples_without_a_score_are_left_out(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=1, group_size=4)
    scoring.outcomes = [Scored(None, "timed out"), Scored(1.0), Scored(0.0), Scored(1e300), *[Scored(None, "no")] * 4]
    await world.finish(run_grpo)
    (step,) = world.steps.values()
    assert (step.metrics["num_unscored"], step.metrics["num_used_samples"]) == (6, 2)
    assert step.metrics["num_uninformative_groups"] == 1
    assert world.events.count("unscored") == 1
    errors = [sample.error for sample in batches(world)[1].samples()]
    assert errors[:3] == ["timed out", "", ""]
    assert errors[3] == "the score is 1e+300: expected at most 3.40282e+38 either way"


async def test_equal_rewards_count_as_a_step_that_changes_nothing(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=2)
    scoring.outcomes = [Scored(0.5)] * 12
    await world.finish(run_grpo)
    for step in world.steps.values():
        assert (step.metrics["num_used_samples"], step.metrics["num_uninformative_groups"]) == (0, 2)
        assert step.loss == 0
        assert step.metrics["reward_std"] == 0
    assert world.run.progress.step == 2


async def test_the_penalty_gets_reference_logprobs(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=1, kl_coefficient=0.1, clip_epsilon=0.1)
    scoring.outcomes = [Scored(0.5)] * 6
    await world.finish(run_grpo)
    assert world.trainer.num_forward == 1
    assert world.trainer.losses[0][1] == pytest.approx({"clip_low": 0.9, "clip_high": 1.1, "kl_coefficient": 0.1})
    assert world.steps[1].metrics["num_used_samples"] == 6


def routing_world(tmp_path: Path) -> tuple[MemoryWorld, list[Any]]:
    """A world whose base chooses 2 experts in each of 3 layers, and what the trainer gets as its data."""
    world = grpo_world(tmp_path, num_steps=1)
    (world.base / "config.json").write_text('{"num_experts_per_tok": 2}')
    num_tokens = len(json.dumps("p0")) + 3 - 1
    world.routed_experts = np.arange(num_tokens * 3 * 2, dtype="<i4").tobytes()
    sent: list[Any] = []
    original = world.trainer.forward_backward

    async def note(session: str, seq: int, data: Any, **kwargs: Any) -> Any:
        sent.extend(data)
        return await original(session, seq, data, **kwargs)

    world.trainer.forward_backward = note  # type: ignore[method-assign]
    return world, sent


@pytest.mark.parametrize("replay", [False, True])
async def test_routed_experts_are_kept_always_and_replayed_where_asked(
    tmp_path: Path, scoring: MemoryScoring, replay: bool
) -> None:
    world, sent = routing_world(tmp_path)
    attempt = world.attempt()
    attempt.settings = attempt.settings.model_copy(update={"replay_routed_experts": replay})
    await run_grpo(attempt)
    for sample in batches(world)[1].samples():
        assert sample.routed_experts.shape == (6, 3, 2)
        assert sample.routed_experts.astype("<i4").tobytes() == world.routed_experts
    assert {datum.routed_experts for datum in sent} == {world.routed_experts if replay else b""}


async def test_no_routed_experts_are_asked_for_where_engines_cannot_tell(
    tmp_path: Path, scoring: MemoryScoring
) -> None:
    world, _ = routing_world(tmp_path)
    attempt = world.attempt()
    attempt.settings = attempt.settings.model_copy(update={"record_routed_experts": False})
    await run_grpo(attempt)
    assert world.asked_routed_experts == {False}
    assert all(sample.routed_experts is None for sample in batches(world)[1].samples())


async def test_a_base_that_does_not_route_is_not_asked_for_routes(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=1)
    await world.finish(run_grpo)
    assert world.asked_routed_experts == {False}


async def test_routed_experts_that_do_not_fit_are_refused(tmp_path: Path, scoring: MemoryScoring) -> None:
    world, _ = routing_world(tmp_path)
    world.routed_experts = world.routed_experts[:-4]
    with pytest.raises(FailedPrecondition, match=r"recorded 35 routed experts for 6 tokens, expected 2"):
        await run_grpo(world.attempt())
    assert not world.rollouts.kept


async def test_another_revision_never_answers(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.answered_by = f"{POLICY}/revisions/99"
    with pytest.raises(
        FailedPrecondition, match=r"revisions/1 sha256:.* was asked and .*revisions/99 sha256:.* answered"
    ):
        await run_grpo(world.attempt())
    world.answered_by, world.answered_with = "", "sha256:other"
    with pytest.raises(FailedPrecondition, match=r"revisions/1 sha256:.* was asked and .*revisions/1 sha256:other"):
        await run_grpo(world.attempt())
    assert not world.rollouts.kept


async def test_an_interrupted_sample_is_asked_for_again_with_its_seed(tmp_path: Path, scoring: MemoryScoring) -> None:
    expected = await grpo_world(tmp_path).finish(run_grpo)
    world = grpo_world(tmp_path)
    attempt = world.attempt()
    object.__setattr__(attempt.settings, "patience_s", 5.0)
    world.interrupts.coming = iter([None] * 5 + [Unavailable("the engine was lost", retry_after_s=0.01)])
    await run_grpo(attempt)
    assert world.exported[-1][0] == expected
    assert world.interrupts.num_passed > 0


async def test_a_prompt_that_inference_refuses_is_named_by_its_line(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.interrupts.coming = iter([None] * 3 + [InvalidArgument("the prompt has 9000 tokens", field="prompt")])
    with pytest.raises(InvalidArgument, match=r"the prompt of line [1-5] cannot be sampled: the prompt has 9000"):
        await run_grpo(world.attempt())


async def test_a_damaged_batch_is_told(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.interrupts.coming = iter([None] * NUM_CALLS_BEFORE_UPDATE + [Killed()])
    with pytest.raises(Killed):
        await run_grpo(world.attempt())
    (pointer,) = world.rollouts.kept.values()
    pointer.revision = f"{POLICY}/revisions/7"
    with pytest.raises(BlobCorrupt, match=r"holds step 1 of .* by .*revisions/1, but .* says step 1 of .* by .*/7"):
        await run_grpo(world.attempt())
    world.objects.clear()
    with pytest.raises(BlobCorrupt, match=r"the object of .*rollouts/r1-000001 is gone"):
        await run_grpo(world.attempt())


async def test_a_batch_of_another_shape_is_not_used(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    world.interrupts.coming = iter([None] * NUM_CALLS_BEFORE_UPDATE + [Killed()])
    with pytest.raises(Killed):
        await run_grpo(world.attempt())
    world.run.grpo.group_size = 4
    with pytest.raises(BlobCorrupt, match=r"has groups of \[3, 3\] samples, the recipe asks for 2 of 4"):
        await run_grpo(world.attempt())


@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_a_cancel_or_drain_stops_between_phases(
    tmp_path: Path, scoring: MemoryScoring, max_staleness: int
) -> None:
    world = grpo_world(tmp_path, max_staleness=max_staleness)
    cancelled = world.attempt()
    cancelled.reporter.cancel_requested = True
    with pytest.raises(RunCancelled):
        await run_grpo(cancelled)
    drained = world.attempt()
    original = world.trainer.optim_step

    async def drain(*args: Any, **kwargs: Any) -> Any:
        drained.draining.set()
        return await original(*args, **kwargs)

    world.trainer.optim_step = drain  # type: ignore[method-assign]
    with pytest.raises(RunDrained):
        await run_grpo(drained)
    assert world.run.latest_training_state.step == 1
    assert not world.trainer.live
    assert len(asyncio.all_tasks()) == 1


async def test_a_lost_lease_stops_the_next_write(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path)
    attempt = world.attempt()
    original = scoring.score

    async def lose(samples: Sequence[Sample]) -> list[Scored]:
        attempt.lease.lose("superseded")
        return await original(samples)

    scoring.score = lose  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        await run_grpo(attempt)
    assert not world.objects
    assert not world.rollouts.kept


async def test_expired_and_forgotten_batches_are_swept(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=1)
    orphan = "tenants/acme/rollouts/tone/r1/00000001-7"
    world.objects[orphan] = b"an earlier worker died before its pointer"
    for key, expires_at_s in (("old", 1), ("new", 1 << 33)):
        pointer = rollout_service_pb2.Rollout(run="tenants/acme/runs/r0", step=1, object_key=key)
        pointer.expire_time.FromSeconds(expires_at_s)
        world.objects[key] = b"batch"
        await world.rollouts.create(POLICY, key, pointer, None)
    await world.finish(run_grpo)
    assert set(world.rollouts.kept) == {f"{POLICY}/rollouts/new", f"{POLICY}/rollouts/r1-000001"}
    assert "old" not in world.objects
    assert orphan not in world.objects
    assert "new" in world.objects


def test_ids_of_rollouts_are_legal_and_distinct() -> None:
    assert rollout_id("r1", 7) == "r1-000007"
    long = [f"{'a' * 62}{end}" for end in "bc"]
    ids = {rollout_id(run, step) for run in ("r1", *long) for step in (1, 2, 10**7)}
    assert len(ids) == 9
    for each in ids:
        check_id(each, field="rollout_id")


async def test_the_scorer_sees_prompt_completion_and_fields(tmp_path: Path, scoring: MemoryScoring) -> None:
    world = grpo_world(tmp_path, num_steps=1)
    await world.finish(run_grpo)
    for sample in scoring.samples:
        assert sample.example == {"answer": int(sample.prompt[1:])}
        assert sample.completion in "0123"
