"""The recipe against a trainer in memory: whatever is killed wherever, the result is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.runs.memory_world import DIGEST, POLICY, Killed, MemoryWorld

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import common_pb2, revision_service_pb2, run_service_pb2, session_service_pb2
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    BlobMissing,
    DataLoss,
    GateNotMet,
    InvalidArgument,
    LeaseLost,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WrongState,
)
from mint_runs.attempt import RunCancelled, RunDrained
from mint_runs.recipes import RECIPES
from mint_runs.recipes.sft import SftPlan, learning_rate, run_sft
from mint_runs.settings import RunsSettings
from mint_runs.step_session import SessionLost, StepSession
from mint_runs.worker import is_retriable

LINES = [json.dumps({"prompt": f"p{i}", "completion": "c" * (i + 1)}).encode() + b"\n" for i in range(5)]


def sft_world(tmp_path: Path, **recipe: Any) -> MemoryWorld:
    world = MemoryWorld(tmp_path, LINES)
    values = {"num_steps": 7, "batch_size": 2, "save_every_steps": 3, "seed": 5} | recipe
    world.run.sft.CopyFrom(run_service_pb2.SftRecipe(train_data=common_pb2.BlobRef(digest=DIGEST), **values))
    return world


async def test_a_run_trains_saves_publishes_and_promotes(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    await world.finish(run_sft)
    assert world.trainer.opened == [("fresh 4", False)]
    assert sorted(step for _, step in world.trainer.states.values()) == [3, 6, 7]
    assert [step for _, step in world.exported] == [7]
    assert [promotion[:2] for promotion in world.promotions] == [(f"{POLICY}/aliases/live", 1)]
    assert world.events == ["saved", "saved", "trained", "saved", "published", "promoted"]
    assert world.run.progress.step == world.run.progress.saved_step == world.run.progress.num_steps == 7
    assert world.run.progress.loss == pytest.approx(2.0)
    assert sorted(world.steps) == [1, 2, 3, 4, 5, 6, 7]
    assert world.steps[7].loss == pytest.approx(2.0)
    assert set(world.steps[7].metrics) == {"learning_rate", "grad_norm", "step_ms", "tokens_per_s"}
    assert not world.trainer.live


async def test_an_alias_with_a_gate_stays_and_the_run_succeeds(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    world.unmet = GateNotMet("the gate of live is not met")
    await world.finish(run_sft)
    assert world.promotions == []
    assert list(world.revisions.published) == [1]
    assert world.events == ["saved", "saved", "trained", "saved", "published", "not_promoted"]


@pytest.mark.parametrize("at", range(22))
@pytest.mark.parametrize("how", [Killed(), NotFound("the trainer restarted")], ids=["worker", "trainer"])
async def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, at: int, how: BaseException) -> None:
    whole = sft_world(tmp_path)
    expected = await whole.finish(run_sft)
    broken = sft_world(tmp_path)
    (broken.interrupts if isinstance(how, Killed) else broken.trainer.restarts).coming = iter([None] * at + [how])
    assert await broken.finish(run_sft) == expected
    assert broken.run.progress.num_tokens == whole.run.progress.num_tokens
    assert {step for _, step in broken.exported} == {7}
    assert list(broken.revisions.published) == [1]
    if isinstance(how, NotFound) and at < 17:
        assert "session_lost" in broken.events


async def test_a_repeated_promotion_carries_the_same_request_id(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    await world.finish(run_sft)
    await world.finish(run_sft)
    assert world.promotions[0] == world.promotions[1]
    assert world.promotions[0][2][14] == "4"  # a UUID4 in form


async def test_a_session_that_is_lost_again_and_again_fails_the_attempt(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    world.trainer.restarts.coming = iter([NotFound("gone") for _ in range(50)])
    with pytest.raises(Unavailable, match="lost this run's session 4 times after step 0"):
        await run_sft(world.attempt())


async def test_a_continued_run_starts_from_weights_only_and_names_its_parent(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    world.trainer.states["old"] = ("old weights", 20)
    world.run.initial_training_state.CopyFrom(
        common_pb2.TrainingState(run="tenants/acme/runs/r0", step=20, weights_key="old")
    )
    parent = world.revisions.publish(revision_service_pb2.Lineage(run="tenants/acme/runs/r0", step=20), "old weights")
    await world.finish(run_sft)
    assert world.trainer.opened == [("old weights", True)]
    assert world.revisions.published[2].lineage.parent_revision == parent.name


async def test_a_cancel_stops_before_the_next_step(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    attempt = world.attempt()
    attempt.reporter.cancel_requested = True
    with pytest.raises(RunCancelled):
        await run_sft(attempt)
    assert world.trainer.rates == []
    assert not world.trainer.live


async def test_a_drained_worker_saves_what_was_done(tmp_path: Path) -> None:
    expected = await sft_world(tmp_path).finish(run_sft)
    world = sft_world(tmp_path)
    attempt = world.attempt()
    original = world.trainer.optim_step

    async def drain_after_two(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        if result.step == 2:
            attempt.draining.set()
        return result

    world.trainer.optim_step = drain_after_two  # type: ignore[method-assign]
    with pytest.raises(RunDrained):
        await run_sft(attempt)
    assert world.run.latest_training_state.step == 2
    world.trainer.optim_step = original  # type: ignore[method-assign]
    assert await world.finish(run_sft) == expected


async def test_a_lost_lease_stops_the_next_write(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    attempt = world.attempt()
    attempt.lease.lose("superseded")
    with pytest.raises(LeaseLost):
        await run_sft(attempt)
    assert world.trainer.rates == []


@pytest.mark.parametrize(("eval_every_steps", "num_evaluations"), [(0, 1), (3, 3), (7, 1)])
async def test_held_out_loss_is_computed_on_time(tmp_path: Path, eval_every_steps: int, num_evaluations: int) -> None:
    world = sft_world(tmp_path, eval_data=common_pb2.BlobRef(digest=DIGEST), eval_every_steps=eval_every_steps)
    await world.finish(run_sft)
    assert world.events.count("evaluated") == num_evaluations
    assert world.trainer.num_forward == 3 * num_evaluations  # five examples, two at a time
    assert world.run.progress.eval_loss == pytest.approx(2.0)


async def test_data_that_are_not_stored_fail_the_run(tmp_path: Path) -> None:
    world = sft_world(tmp_path)
    for state in (publish_service_pb2.BLOB_STATE_STAGED, publish_service_pb2.BLOB_STATE_UNSPECIFIED):
        world.blob_state = state
        with pytest.raises(BlobMissing, match="train_data is sha256:aaa"):
            await run_sft(world.attempt())


def test_defaults_are_filled_in_and_bad_fields_named() -> None:
    plan = SftPlan.of(run_service_pb2.SftRecipe(num_steps=5))
    assert (plan.batch_size, plan.max_tokens, plan.save_every_steps, plan.eval_every_steps) == (8, 1024, 20, 0)
    assert plan.optimizer.learning_rate == 1e-3
    for recipe in (run_service_pb2.SftRecipe(), run_service_pb2.SftRecipe(num_steps=5, batch_size=-1)):
        with pytest.raises(InvalidArgument, match=r"sft\.(num_steps|batch_size) is (0|-1)"):
            SftPlan.of(recipe)


def test_the_learning_rate_warms_up_and_decays() -> None:
    optimizer = run_service_pb2.OptimizerConfig(learning_rate=1.0, num_warmup_steps=3)
    plan = SftPlan.of(run_service_pb2.SftRecipe(num_steps=7, optimizer=optimizer))
    assert [learning_rate(plan, step) for step in range(7)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    plain = SftPlan.of(run_service_pb2.SftRecipe(num_steps=4))
    assert [learning_rate(plain, step) for step in range(4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("error", "retriable"),
    [
        (Unavailable("x"), True),
        (AlreadyExists("x"), True),
        (ResourceExhausted("x"), True),
        (MintError("x"), True),
        (InvalidArgument("x"), False),
        (BaseModelMismatch("x"), False),
        (WrongState("x"), False),
        (DataLoss("x"), False),
        (Unimplemented("x"), False),
        (NotFound("x"), False),
    ],
)
def test_what_another_attempt_may_mend(error: MintError, retriable: bool) -> None:
    assert is_retriable(error) is retriable


async def test_a_step_is_repeated_under_its_own_seq() -> None:
    calls: list[int] = []

    class Flaky:
        async def forward_backward(self, name: str, seq: int, data: Any, **kwargs: Any) -> Any:
            calls.append(seq)
            if len(calls) == 1:
                raise Unavailable("away", retry_after_s=0.01)
            return session_service_pb2.StepResult()

        async def optim_step(self, name: str, seq: int, **kwargs: Any) -> Any:
            raise WrongState("seq is 2 but the next step is 1", metadata={"next_seq": "1"})

        async def forward(self, name: str, data: Any, **kwargs: Any) -> Any:
            raise WrongState("diverged")

    flaky: Any = Flaky()
    session = StepSession(flaky, session_service_pb2.Session(name="s", next_seq=1), patience_s=5)
    await session.forward_backward([])
    assert calls == [1, 1]
    with pytest.raises(SessionLost):
        await session.optim_step(run_service_pb2.OptimizerConfig(), gradient_scale=1.0)
    with pytest.raises(WrongState, match="diverged"):
        await session.forward([])


def test_the_margin_must_fit_into_the_lease() -> None:
    needed = {
        "base_model_path": "/b",
        "catalog_address": "a",
        "catalog_runtime_address": "a",
        "trainer_address": "a",
        "exporter_runtime_address": "a",
    }
    RunsSettings(**needed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lease_margin_s is 5"):
        RunsSettings(lease_ttl_s=8, **needed)  # type: ignore[arg-type]


def test_recipes_are_named_as_in_the_run() -> None:
    fields = {field.name for field in run_service_pb2.Run.DESCRIPTOR.oneofs_by_name["recipe"].fields}
    assert set(RECIPES) <= fields
