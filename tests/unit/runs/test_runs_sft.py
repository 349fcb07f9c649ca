"""The recipe against a trainer in memory: whatever is killed wherever, the result is the same."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import exporter_service_pb2, publish_service_pb2
from mint_api.v1 import (
    common_pb2,
    policy_service_pb2,
    revision_service_pb2,
    run_service_pb2,
    session_service_pb2,
)
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    BlobMissing,
    DataLoss,
    InvalidArgument,
    LeaseLost,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WrongState,
)
from mint_runs.attempt import Attempt, RunCancelled, RunDrained
from mint_runs.lease import HeldLease
from mint_runs.progress import Reporter
from mint_runs.recipes import RECIPES
from mint_runs.recipes.sft import SftPlan, learning_rate, run_sft
from mint_runs.settings import RunsSettings
from mint_runs.step_session import SessionLost, StepSession
from mint_runs.worker import is_retriable

POLICY = "tenants/acme/policies/tone"
RUN = "tenants/acme/runs/r1"
LINES = [json.dumps({"prompt": f"p{i}", "completion": "c" * (i + 1)}).encode() + b"\n" for i in range(5)]


class Killed(BaseException):
    """The worker's process ends here."""


class Tokens:
    """A tokenizer of one token for each character."""

    end_token_id = 0

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    encode_part = encode_prompt


class MemoryTrainer:
    """Sessions whose weights are a hash over all they were given; states are kept by key."""

    def __init__(self) -> None:
        self.live: dict[str, dict[str, Any]] = {}
        self.states: dict[str, tuple[str, int]] = {}
        self.interrupts: Iterator[BaseException | None] = iter(())
        self.opened: list[tuple[str, bool]] = []
        self.rates: list[float] = []
        self.num_forward = 0

    def _pass(self) -> None:
        interrupt = next(self.interrupts, None)
        if isinstance(interrupt, NotFound):
            self.live.clear()
        if interrupt is not None:
            raise interrupt

    async def create(
        self,
        tenant: str,
        session_id: str,
        *,
        policy: str,
        base_digest: str,
        lora: Any,
        from_state: Any,
        weights_only: bool,
    ) -> session_service_pb2.Session:
        assert (tenant, policy, base_digest) == ("acme", POLICY, "sha256:base")
        weights, step = self.states[from_state.weights_key] if from_state is not None else (f"fresh {lora.rank}", 0)
        name = f"tenants/{tenant}/sessions/{session_id}"
        assert name not in self.live
        self.live[name] = {"weights": weights, "step": 0 if weights_only else step, "seq": 1, "gathered": ""}
        self.opened.append((weights, weights_only))
        return session_service_pb2.Session(name=name, step=self.live[name]["step"], next_seq=1)

    async def close(self, session: str) -> None:
        self.live.pop(session, None)

    async def forward(self, session: str, data: Any) -> session_service_pb2.StepResult:
        self.num_forward += 1
        return self._result(self._session(session), data)

    async def forward_backward(self, session: str, seq: int, data: Any) -> session_service_pb2.StepResult:
        self._pass()
        state = self._next(session, seq)
        state["gathered"] = repr([(list(d.tokens), list(d.targets), list(d.weights)) for d in data])
        return self._result(state, data)

    async def optim_step(self, session: str, seq: int, *, optimizer: Any, gradient_scale: float) -> Any:
        self._pass()
        state = self._next(session, seq)
        text = f"{state['weights']} {state['gathered']} {optimizer.learning_rate} {gradient_scale}"
        state["weights"] = hashlib.sha256(text.encode()).hexdigest()
        state["step"] += 1
        self.rates.append(optimizer.learning_rate)
        return session_service_pb2.StepResult(step=state["step"], grad_norm=1.0)

    async def save_state(self, session: str, *, run: str, fence: int) -> common_pb2.TrainingState:
        self._pass()
        state = self._session(session)
        key = f"{run}/{state['step']}-{fence}"
        kept = self.states.setdefault(key, (state["weights"], state["step"]))
        assert kept == (state["weights"], state["step"])
        return common_pb2.TrainingState(run=run, step=state["step"], fence=fence, weights_key=key)

    def _session(self, name: str) -> dict[str, Any]:
        if name not in self.live:
            raise NotFound("no such session")
        return self.live[name]

    def _next(self, name: str, seq: int) -> dict[str, Any]:
        state = self._session(name)
        assert seq == state["seq"]
        state["seq"] += 1
        return state

    def _result(self, state: dict[str, Any], data: Any) -> session_service_pb2.StepResult:
        weight_sum = sum(sum(datum.weights) for datum in data)
        return session_service_pb2.StepResult(
            loss_sum=2.0 * weight_sum, weight_sum=weight_sum, num_tokens=round(weight_sum), step=state["step"]
        )


class MemoryWorld:
    """Catalog, exporter and store as far as a recipe sees them; makes attempts at one run."""

    def __init__(self, tmp_path: Path, **recipe: Any) -> None:
        self.trainer = MemoryTrainer()
        values = {"num_steps": 7, "batch_size": 2, "save_every_steps": 3, "seed": 5} | recipe
        self.run = run_service_pb2.Run(name=RUN, policy=POLICY, publish=True, promote_alias="live")
        self.run.sft.CopyFrom(run_service_pb2.SftRecipe(train_data=common_pb2.BlobRef(digest=_DIGEST), **values))
        self.tmp_path = tmp_path
        self.exported: list[tuple[str, int]] = []
        self.promotions: list[tuple[str, int, str]] = []
        self.events: list[str] = []
        self.blob_state = publish_service_pb2.BLOB_STATE_VERIFIED
        self.fence = 10
        self.client = self  # groups below
        self.sessions = self.trainer
        self.aliases = self
        self.revisions = self

    def attempt(self) -> Attempt:
        self.fence += 1
        run = run_service_pb2.Run()
        run.CopyFrom(self.run)
        settings = RunsSettings.model_construct(patience_s=0.0, scratch_path=self.tmp_path)
        lease = HeldLease(POLICY, None, ttl_s=1e6, margin_s=1, acquired_at_s=1e9)  # type: ignore[arg-type]
        policy = policy_service_pb2.Policy(name=POLICY, base_digest="sha256:base", next_revision_number=3)
        policy.lora.rank = 4
        world: Any = self
        return Attempt(
            run=run,
            policy=policy,
            fence=common_pb2.Fence(resource=POLICY, token=self.fence),
            lease=lease,
            client=world,
            work=world,
            exporter=world,
            store=world,
            tokenizer=Tokens(),  # type: ignore[arg-type]
            reporter=Reporter(self._report, interval_s=0),
            settings=settings,
            draining=asyncio.Event(),
        )

    async def finish(self) -> str:
        """Attempt after attempt until one ends; answers the weights that were exported."""
        while True:
            attempt = self.attempt()
            try:
                outcome = await run_sft(attempt)
            except Killed:
                self.trainer.live.clear()  # a later attempt never sees them: sessions are named by fence
                continue
            finally:
                await attempt.reporter.flush()
            assert outcome.published_revision == f"{POLICY}/revisions/9"
            return self.exported[-1][0]

    async def _report(self, progress: Any, events: Any) -> bool:
        self.events += [event.kind for event in events]
        if progress is not None:
            self.run.progress.CopyFrom(progress)
        return False

    # WorkClient, ObjectStore, ExporterClient, groups of MintClient

    async def get_blob(self, name: str) -> publish_service_pb2.BlobRecord:
        assert name == f"tenants/acme/blobs/{_DIGEST}"
        if not self.blob_state:
            raise NotFound("no such blob")
        return publish_service_pb2.BlobRecord(state=self.blob_state, object_key="k")

    async def get_file(self, key: str, path: Path, *, digest: str, size_bytes: int) -> None:
        path.write_bytes(b"".join(LINES))

    async def commit_training_state(self, name: str, fence: Any, state: common_pb2.TrainingState) -> int:
        assert fence.token == state.fence
        self.run.latest_training_state.CopyFrom(state)
        return 1

    async def export(self, policy: str, state: Any, fence: Any, *, lineage: Any, request_id: str) -> Any:
        assert (lineage.run, lineage.step, lineage.data_digest) == (RUN, state.step, _DIGEST)
        self.exported.append((self.trainer.states[state.weights_key][0], state.step))
        self.parent = lineage.parent_revision
        revision = revision_service_pb2.Revision(name=f"{POLICY}/revisions/9", number=9)
        return exporter_service_pb2.ExportResponse(revision=revision)

    async def promote(self, name: str, number: int, *, reason: str, request_id: str) -> None:
        self.promotions.append((name, number, request_id))

    async def get(self, name: str) -> revision_service_pb2.Revision:
        number = int(name.rpartition("/")[2])
        lineage = revision_service_pb2.Lineage(run="tenants/acme/runs/r0", step=number * 10)
        return revision_service_pb2.Revision(name=name, number=number, lineage=lineage)


_DIGEST = f"sha256:{'a' * 64}"


async def test_a_run_trains_saves_publishes_and_promotes(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    await world.finish()
    assert world.trainer.opened == [("fresh 4", False)]
    assert sorted(step for _, step in world.trainer.states.values()) == [3, 6, 7]
    assert [step for _, step in world.exported] == [7]
    assert [promotion[:2] for promotion in world.promotions] == [(f"{POLICY}/aliases/live", 9)]
    assert world.events == ["saved", "saved", "trained", "saved", "published", "promoted"]
    assert world.run.progress.step == world.run.progress.saved_step == world.run.progress.num_steps == 7
    assert world.run.progress.loss == pytest.approx(2.0)
    assert not world.trainer.live


@pytest.mark.parametrize("at", range(20))
@pytest.mark.parametrize("how", [Killed(), NotFound("the trainer restarted")], ids=["worker", "trainer"])
async def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, at: int, how: BaseException) -> None:
    whole = MemoryWorld(tmp_path)
    expected = await whole.finish()
    broken = MemoryWorld(tmp_path)
    broken.trainer.interrupts = iter([None] * at + [how])
    assert await broken.finish() == expected
    assert broken.run.progress.num_tokens == whole.run.progress.num_tokens
    assert [step for _, step in broken.exported] == [7]
    if isinstance(how, NotFound) and at < 17:
        assert "session_lost" in broken.events


async def test_a_repeated_promotion_carries_the_same_request_id(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    await world.finish()
    await world.finish()
    assert world.promotions[0] == world.promotions[1]
    assert world.promotions[0][2][14] == "4"  # a UUID4 in form


async def test_a_session_that_is_lost_again_and_again_fails_the_attempt(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    world.trainer.interrupts = iter([NotFound("gone") for _ in range(50)])
    with pytest.raises(Unavailable, match="lost this run's session 4 times after step 0"):
        await run_sft(world.attempt())


async def test_a_continued_run_starts_from_weights_only_and_names_its_parent(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    world.trainer.states["old"] = ("old weights", 20)
    world.run.initial_training_state.CopyFrom(
        common_pb2.TrainingState(run="tenants/acme/runs/r0", step=20, weights_key="old")
    )
    await world.finish()
    assert world.trainer.opened == [("old weights", True)]
    assert world.parent == f"{POLICY}/revisions/2"


async def test_a_cancel_stops_before_the_next_step(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    attempt = world.attempt()
    attempt.reporter.cancel_requested = True
    with pytest.raises(RunCancelled):
        await run_sft(attempt)
    assert world.trainer.rates == []
    assert not world.trainer.live


async def test_a_drained_worker_saves_what_was_done(tmp_path: Path) -> None:
    expected = await MemoryWorld(tmp_path).finish()
    world = MemoryWorld(tmp_path)
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
    assert await world.finish() == expected


async def test_a_lost_lease_stops_the_next_write(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
    attempt = world.attempt()
    attempt.lease.lose("superseded")
    with pytest.raises(LeaseLost):
        await run_sft(attempt)
    assert world.trainer.rates == []


@pytest.mark.parametrize(("eval_every_steps", "num_evaluations"), [(0, 1), (3, 3), (7, 1)])
async def test_held_out_loss_is_computed_on_time(tmp_path: Path, eval_every_steps: int, num_evaluations: int) -> None:
    world = MemoryWorld(tmp_path, eval_data=common_pb2.BlobRef(digest=_DIGEST), eval_every_steps=eval_every_steps)
    await world.finish()
    assert world.events.count("evaluated") == num_evaluations
    assert world.trainer.num_forward == 3 * num_evaluations  # five examples, two at a time
    assert world.run.progress.eval_loss == pytest.approx(2.0)


async def test_data_that_are_not_stored_fail_the_run(tmp_path: Path) -> None:
    world = MemoryWorld(tmp_path)
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
        async def forward_backward(self, name: str, seq: int, data: Any) -> Any:
            calls.append(seq)
            if len(calls) == 1:
                raise Unavailable("away", retry_after_s=0.01)
            return session_service_pb2.StepResult()

        async def optim_step(self, name: str, seq: int, **kwargs: Any) -> Any:
            raise WrongState("seq is 2 but the next step is 1", metadata={"next_seq": "1"})

        async def forward(self, name: str, data: Any) -> Any:
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
