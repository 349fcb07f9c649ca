"""Everything that a recipe talks to, in memory: trainer, catalog, exporter, store, inference."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from mint_api.runtime.v1 import exporter_service_pb2, publish_service_pb2
from mint_api.v1 import (
    common_pb2,
    evaluation_service_pb2,
    inference_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    rollout_service_pb2,
    run_service_pb2,
    session_service_pb2,
)
from mint_blobs import ObjectInfo, digest_file
from mint_core.errors import AlreadyExists, GateNotMet, NotFound
from mint_runs.attempt import Attempt, Outcome
from mint_runs.lease import HeldLease
from mint_runs.progress import Reporter
from mint_runs.settings import RunsSettings

POLICY = "tenants/acme/policies/tone"
BASE = "baseModels/tiny"
RUN = "tenants/acme/runs/r1"
DIGEST = f"sha256:{'a' * 64}"


class Killed(BaseException):
    """The worker's process ends here."""


class Tokens:
    """A tokenizer of one token for each character."""

    end_token_id = 0

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    encode_part = encode_prompt


class Interrupts:
    """What happens at the calls that are still to come; None lets one pass."""

    def __init__(self) -> None:
        self.coming: Iterator[BaseException | None] = iter(())
        self.num_passed = 0

    def passing(self) -> None:
        self.num_passed += 1
        interrupt = next(self.coming, None)
        if interrupt is not None:
            raise interrupt


class MemoryTrainer:
    """Sessions whose weights are a hash over all they were given; states are kept by key."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.live: dict[str, dict[str, Any]] = {}
        self.states: dict[str, tuple[str, int]] = {}
        self.interrupts = interrupts
        self.restarts = Interrupts()
        """At its own calls only."""
        self.opened: list[tuple[str, bool]] = []
        self.rates: list[float] = []
        self.losses: list[tuple[int, dict[str, float]]] = []
        self.num_forward = 0

    def _pass(self) -> None:
        self.interrupts.passing()
        try:
            self.restarts.passing()
        except NotFound:
            self.live.clear()
            raise

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

    async def forward(self, session: str, data: Any, *, reference: bool) -> session_service_pb2.StepResult:
        self.num_forward += 1
        result = self._result(self._session(session), data)
        if reference:
            result.logprobs.extend(session_service_pb2.TokenLogprobs(values=[-0.25] * len(d.tokens)) for d in data)
        return result

    async def forward_backward(
        self, session: str, seq: int, data: Any, *, loss: Any, loss_parameters: Any
    ) -> session_service_pb2.StepResult:
        self._pass()
        state = self._next(session, seq)
        state["gathered"] += repr([d.SerializeToString(deterministic=True) for d in data])
        self.losses.append((loss, dict(loss_parameters or {})))
        result = self._result(state, data)
        if loss != common_pb2.LOSS_FUNCTION_CROSS_ENTROPY:
            result.metrics.update(num_clipped=0.5 * result.num_tokens, behavior_kl=0.25 * result.num_tokens)
        return result

    async def optim_step(self, session: str, seq: int, *, optimizer: Any, gradient_scale: float) -> Any:
        self._pass()
        state = self._next(session, seq)
        text = f"{state['weights']} {state['gathered']} {optimizer.learning_rate} {gradient_scale}"
        state["weights"] = hashlib.sha256(text.encode()).hexdigest()
        state["gathered"] = ""
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
        num_tokens = sum(weight != 0 for datum in data for weight in datum.weights)
        return session_service_pb2.StepResult(
            loss_sum=2.0 * weight_sum, weight_sum=weight_sum, num_tokens=num_tokens, step=state["step"]
        )


class MemoryRollouts:
    """Pointers to batches."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.kept: dict[str, rollout_service_pb2.Rollout] = {}
        self._interrupts = interrupts

    async def get(self, name: str) -> rollout_service_pb2.Rollout:
        if name not in self.kept:
            raise NotFound("no such rollout")
        return self.kept[name]

    async def create(self, policy: str, rollout_id: str, rollout: Any, fence: Any) -> None:
        self._interrupts.passing()
        name = f"{policy}/rollouts/{rollout_id}"
        if name in self.kept:
            raise AlreadyExists("the name is taken")
        self.kept[name] = rollout_service_pb2.Rollout()
        self.kept[name].CopyFrom(rollout)
        self.kept[name].name = name

    async def list(self, policy: str) -> AsyncIterator[rollout_service_pb2.Rollout]:
        for rollout in list(self.kept.values()):
            yield rollout

    async def delete(self, name: str, fence: Any) -> None:
        del self.kept[name]


class MemoryRevisions:
    """Published revisions, by number; one for each (run, step)."""

    def __init__(self) -> None:
        self.published: dict[int, revision_service_pb2.Revision] = {}

    async def get(self, name: str) -> revision_service_pb2.Revision:
        number = int(name.rpartition("/")[2])
        if number not in self.published:
            raise NotFound("no such revision")
        return self.published[number]

    def publish(self, lineage: revision_service_pb2.Lineage, weights: str) -> revision_service_pb2.Revision:
        for revision in self.published.values():
            if (revision.lineage.run, revision.lineage.step) == (lineage.run, lineage.step):
                assert revision.blob.digest == digest_of(weights), "one step has one adapter"
                return revision
        number = max(self.published, default=0) + 1
        self.published[number] = revision_service_pb2.Revision(
            name=f"{POLICY}/revisions/{number}",
            number=number,
            lineage=lineage,
            blob=common_pb2.BlobRef(digest=digest_of(weights)),
            state=revision_service_pb2.REVISION_STATE_READY,
        )
        return self.published[number]


class MemoryEvaluations:
    """Recorded evaluations."""

    def __init__(self) -> None:
        self.kept: dict[str, evaluation_service_pb2.Evaluation] = {}

    async def get(self, name: str) -> evaluation_service_pb2.Evaluation:
        if name not in self.kept:
            raise NotFound("no such evaluation")
        return self.kept[name]

    async def create(self, policy: str, evaluation_id: str, evaluation: Any, *, fence: Any) -> None:
        self.kept[f"{policy}/evaluations/{evaluation_id}"] = evaluation


class MemoryWorld:
    """Catalog, exporter, store and inference as far as a recipe sees them; makes attempts at one run.

    It is the client with its groups, the exporter, the store and the work client in one.
    """

    def __init__(self, tmp_path: Path, lines: list[bytes]) -> None:
        self.interrupts = Interrupts()
        self.reports = Interrupts()
        """At reports only."""
        self.trainer = self.sessions = MemoryTrainer(self.interrupts)
        self.rollouts = MemoryRollouts(self.interrupts)
        self.revisions = MemoryRevisions()
        self.evaluations = MemoryEvaluations()
        self.aliases = self
        self.run = run_service_pb2.Run(name=RUN, policy=POLICY, publish=True, promote_alias="live")
        self.lines = lines
        self.tmp_path = tmp_path
        self.base = tmp_path / "base"
        self.base.mkdir(exist_ok=True)
        (self.base / "config.json").write_text("{}")
        self.objects: dict[str, bytes] = {}
        self.exported: list[tuple[str, int]] = []
        self.promotions: list[tuple[str, int, str]] = []
        self.unmet: GateNotMet | None = None
        self.events: list[str] = []
        self.steps: dict[int, run_service_pb2.RunStep] = {}
        self.asked: list[inference_service_pb2.SamplingParams] = []
        self.models: list[str] = []
        self.asked_routed_experts: set[bool] = set()
        self.answered_by = self.answered_with = ""
        self.routed_experts = b""
        self.blob_state = publish_service_pb2.BLOB_STATE_VERIFIED
        self.fence = 10

    def attempt(self) -> Attempt:
        self.fence += 1
        self.run.num_attempts += 1
        run = run_service_pb2.Run()
        run.CopyFrom(self.run)
        settings = RunsSettings.model_construct(
            base_model_path=self.base, patience_s=0.0, scratch_path=self.tmp_path, max_concurrent_samples=4
        )
        lease = HeldLease(POLICY, None, ttl_s=1e6, margin_s=1, acquired_at_s=1e9)  # type: ignore[arg-type]
        number = max(self.revisions.published, default=0) + 1
        policy = policy_service_pb2.Policy(
            name=POLICY, base_model=BASE, base_digest="sha256:base", next_revision_number=number
        )
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

    async def finish(self, recipe: Callable[[Attempt], Awaitable[Outcome]]) -> str:
        """Attempt after attempt until one ends; answers the weights that were exported last."""
        while True:
            attempt = self.attempt()
            try:
                outcome = await recipe(attempt)
            except Killed:
                # What was not reported is lost; a later attempt never sees the sessions: they are named by fence.
                self.trainer.live.clear()
                continue
            await attempt.reporter.deliver(patience_s=0)
            assert outcome.published_revision == attempt.published_revision
            return self.exported[-1][0]

    async def _report(self, progress: Any, events: Any, steps: Any) -> bool:
        self.reports.passing()
        self.events += [event.kind for event in events]
        self.steps |= {step.step: step for step in steps}
        if progress is not None:
            self.run.progress.CopyFrom(progress)
        return False

    # WorkClient, ObjectStore, ExporterClient, aliases, inference

    async def get_blob(self, name: str) -> publish_service_pb2.BlobRecord:
        assert name == f"tenants/acme/blobs/{DIGEST}"
        if not self.blob_state:
            raise NotFound("no such blob")
        return publish_service_pb2.BlobRecord(state=self.blob_state, object_key="data")

    async def get_file(self, key: str, path: Path, *, digest: str, size_bytes: int) -> None:
        if key == "data":
            path.write_bytes(b"".join(self.lines))
            return
        if key not in self.objects:
            raise NotFound("no such object")
        path.write_bytes(self.objects[key])
        assert await digest_file(path) == digest

    async def put_file(self, key: str, path: Path, *, digest: str) -> None:
        self.interrupts.passing()
        assert key not in self.objects, "keys are unique to one writer"
        self.objects[key] = path.read_bytes()

    async def delete(self, key: str) -> None:
        del self.objects[key]

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        for key in [key for key in self.objects if key.startswith(prefix)]:
            yield ObjectInfo(key, len(self.objects[key]), None, datetime.datetime.now(datetime.UTC))

    async def commit_training_state(self, name: str, fence: Any, state: common_pb2.TrainingState) -> int:
        self.interrupts.passing()
        assert fence.token == state.fence
        self.run.latest_training_state.CopyFrom(state)
        return 1

    async def export(self, policy: str, state: Any, fence: Any, *, lineage: Any, request_id: str) -> Any:
        self.interrupts.passing()
        assert (lineage.run, lineage.step, lineage.data_digest) == (RUN, state.step, DIGEST)
        weights = self.trainer.states[state.weights_key][0]
        self.exported.append((weights, state.step))
        return exporter_service_pb2.ExportResponse(revision=self.revisions.publish(lineage, weights))

    async def promote(self, name: str, number: int, *, reason: str, request_id: str) -> None:
        self.interrupts.passing()
        if self.unmet is not None:
            raise self.unmet
        self.promotions.append((name, number, request_id))

    async def generate(
        self, model: str, prompt: Any, *, sampling: Any, tenant: str, return_routed_experts: bool, **_: Any
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        """Three tokens that depend on the model's weights and the seed; a token's log-probability is -id."""
        self.interrupts.passing()
        self.asked.append(sampling)
        self.models.append(model)
        self.asked_routed_experts.add(return_routed_experts)
        is_base = model == BASE
        assert tenant == ("tenants/acme" if is_base else "")
        digest = "" if is_base else self.revisions.published[int(model.rpartition("/")[2])].blob.digest
        header = inference_service_pb2.GenerationHeader(prompt_token_ids=[ord(c) for c in json.dumps(prompt)])
        header.resolution.revision = self.answered_by or ("" if is_base else model)
        header.resolution.blob.digest = self.answered_with or digest
        header.numerics.engine_version = "memory 1"
        yield inference_service_pb2.GenerateResponse(header=header)
        drawn = hashlib.sha256(f"{digest} {sampling.seed} {prompt}".encode()).digest()
        token_ids = list(drawn[: min(3, sampling.max_new_tokens)])
        await asyncio.sleep(0)
        chunk = inference_service_pb2.GeneratedChunk(
            routed_experts=self.routed_experts if return_routed_experts else b"",
            text=f"{token_ids[0] % 4}",
            token_ids=token_ids,
            logprobs=[-float(token_id) for token_id in token_ids],
            finish_reason=inference_service_pb2.FINISH_REASON_LENGTH,
        )
        yield inference_service_pb2.GenerateResponse(chunk=chunk)


def digest_of(weights: str) -> str:
    return f"sha256:{hashlib.sha256(weights.encode()).hexdigest()}"
