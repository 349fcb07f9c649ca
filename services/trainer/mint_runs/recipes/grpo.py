"""Group-relative policy optimization (Shao et al. 2024, arXiv 2402.03300): sample, score, keep, update, save, export.

Step k samples from the revision that step k - 1 published (or, with ``max_staleness`` 1, the one before it while step
k - 1 is computed). From the moment its batch is kept a step is a function of that batch and of the state before it: the
update is always computed from the batch as it is read back, so a run that is killed goes on bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator

from mint_api.v1 import revision_service_pb2, run_service_pb2
from mint_core import clock
from mint_core.base_model import routed_top_k
from mint_runs.attempt import Attempt, Outcome
from mint_runs.grpo_plan import GrpoPlan
from mint_runs.prompts import parse_prompts
from mint_runs.rollouts.batch import RolloutBatch
from mint_runs.rollouts.making import GeneratingRevision, MadeBatch, RolloutMaker
from mint_runs.rollouts.storage import RolloutStorage
from mint_runs.scoring import open_scorer
from mint_runs.step_session import StepSession
from mint_runs.training import STEPPED, Training
from mint_runs.updates import pieces, update_data

__all__ = ["run_grpo"]


async def run_grpo(attempt: Attempt) -> Outcome:
    """Do the steps that are left; every step's revision is published, and promoted where the recipe says so."""
    recipe, settings = attempt.run.grpo, attempt.settings
    plan = GrpoPlan.of(recipe)
    prompts = await attempt.read_lines(
        recipe.prompts, lambda lines: parse_prompts(lines, source="prompts"), source="prompts"
    )
    top_k = await asyncio.to_thread(routed_top_k, settings.base_model_path) if settings.record_routed_experts else 0
    storage = RolloutStorage(attempt, ttl_s=plan.rollout_ttl_s)
    training = Training(attempt, num_steps=plan.num_steps)
    async with open_scorer(
        recipe.scorer, dict(recipe.scorer_options), timeout_s=plan.scorer_timeout_s, settings=settings
    ) as scoring:
        maker = RolloutMaker(attempt, plan, prompts, scoring, storage, routed_top_k=top_k)
        async with contextlib.aclosing(_GrpoLoop(attempt, plan, training, maker)) as loop:
            await training.run(loop.work)
    await storage.sweep()
    return Outcome(attempt.published_revision)


class _GrpoLoop:
    """What is done in a session, and what outlives one."""

    def __init__(self, attempt: Attempt, plan: GrpoPlan, training: Training, maker: RolloutMaker) -> None:
        self._attempt = attempt
        self._plan = plan
        self._training = training
        self._maker = maker
        self._newest = GeneratingRevision(0, "", "")
        """The newest published revision."""
        self._ahead: tuple[int, asyncio.Task[MadeBatch]] | None = None
        """The next step and its batch, which is made while a step is computed."""
        self._figures: dict[int, run_service_pb2.RunStep] = {}
        """Of the newest steps: how a revision was loaded is known only when it is sampled from."""
        self._progress = run_service_pb2.RunProgress()
        if training.state is not None:
            self._progress.CopyFrom(attempt.run.progress)

    async def aclose(self) -> None:
        """Stop making a batch that nobody waits for."""
        if self._ahead is not None:
            _, task = self._ahead
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def work(self, session: StepSession) -> None:
        """Do what is left to do."""
        plan, progress = self._plan, self._progress
        progress.step = progress.saved_step = session.start_step
        progress.num_steps = plan.num_steps
        await self._publish_start(session)
        for step in range(session.start_step + 1, plan.num_steps + 1):
            await self._step(session, step)
        self._attempt.check()
        self._note_load(self._newest.step, await self._maker.hand_off(self._newest))

    async def _publish_start(self, session: StepSession) -> None:
        """The revision of the state that the session starts from: of this run, of the one before it, or of step 0."""
        attempt, training = self._attempt, self._training
        if training.state is None:
            initial = await attempt.initial_revision()
            if initial is not None and initial.state == revision_service_pb2.REVISION_STATE_READY:
                self._newest = GeneratingRevision(0, initial.name, initial.blob.digest)
                return
            await training.save(session)
        await self._publish()

    async def _publish(self) -> None:
        """Export the newest state, promote it if it is its turn; repeated by a later attempt it changes nothing."""
        attempt, state = self._attempt, self._training.state
        assert state is not None, "what is published was saved"
        parent = self._newest.name or await self._find_parent(state.step)
        revision = await attempt.export(state, data_digest=attempt.run.grpo.prompts.digest, parent_revision=parent)
        self._newest = GeneratingRevision(state.step, revision.name, revision.blob.digest)
        if attempt.run.promote_alias and self._plan.is_promoted(state.step):
            await attempt.promote(revision.number)

    async def _find_parent(self, step: int) -> str:
        """The revision before that of ``step``, published by an earlier attempt or an earlier run."""
        attempt = self._attempt
        before = await attempt.find_revision(attempt.run.name, step - 1) if step else None
        before = before or (await attempt.initial_revision() if step <= 1 else None)
        return before.name if before else ""

    async def _step(self, session: StepSession, step: int) -> None:
        attempt, plan = self._attempt, self._plan
        attempt.check()
        began_s = clock.monotonic_s()
        made = await self._take_batch(step)
        if made.loaded is not None:
            self._note_load(made.loaded.step, made.load_figures)
        attempt.check()
        if plan.max_staleness and step < plan.num_steps:
            self._make_ahead(step + 1)
        figures = run_service_pb2.RunStep(step=step)
        self._figures = {step - 1: self._figures[step - 1]} if step - 1 in self._figures else {}
        self._figures[step] = figures
        figures.metrics.update(made.figures | _batch_figures(made.batch))
        with _timed(figures, "update_ms"):
            await self._update(session, made.batch, figures)
        self._report(figures, began_s)
        with _timed(figures, "save_ms"):
            await self._training.save(session)
        with _timed(figures, "export_ms"):
            await self._publish()
        self._progress.saved_step = step
        self._report(figures, began_s)

    async def _take_batch(self, step: int) -> MadeBatch:
        if self._ahead is not None and self._ahead[0] == step:
            (_, task), self._ahead = self._ahead, None
            return await task
        return await self._maker.make(step, self._newest, note=self._note_sample)

    def _make_ahead(self, step: int) -> None:
        """Begin the batch of ``step``, unless it has begun in a session that was lost."""
        if self._ahead is None:
            making = self._maker.make(step, self._newest, note=self._note_sample)
            self._ahead = step, asyncio.create_task(making)

    async def _update(self, session: StepSession, batch: RolloutBatch, figures: run_service_pb2.RunStep) -> None:
        plan = self._plan
        update = update_data(
            batch,
            advantage=plan.advantage,
            weighting=plan.weighting,
            max_new_tokens=plan.max_new_tokens,
            keep_uninformative=plan.kl_coefficient > 0,
            replay_routed_experts=self._attempt.settings.replay_routed_experts,
        )
        loss_sum, num_tokens, sums = 0.0, 0, dict[str, float]()
        for data in pieces(update.data):
            self._attempt.lease.check()
            if plan.kl_coefficient:
                reference = await session.forward(data, reference=True)
                for datum, logprobs in zip(data, reference.logprobs, strict=True):
                    datum.reference_logprobs.extend(logprobs.values)
            gathered = await session.forward_backward(data, loss=plan.loss, loss_parameters=plan.loss_parameters)
            loss_sum += gathered.loss_sum
            num_tokens += gathered.num_tokens
            for name, value in gathered.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        optimizer = run_service_pb2.OptimizerConfig()
        optimizer.CopyFrom(plan.optimizer)
        optimizer.learning_rate = plan.learning_rate(figures.step)
        # The weights of the tokens have made a mean of the sum already.
        applied = await session.optim_step(optimizer, gradient_scale=1.0)
        await STEPPED.reached()
        figures.time.GetCurrentTime()
        figures.loss = loss_sum
        figures.metrics.update(
            num_used_samples=update.num_used_samples,
            num_uninformative_groups=update.num_uninformative_groups,
            learning_rate=optimizer.learning_rate,
            grad_norm=applied.grad_norm,
        )
        for name, value in sums.items():
            # Far from the behaviour policy a divergence may have no finite figure.
            if math.isfinite(value):
                figures.metrics[_MEAN_NAMES.get(name, name)] = value / max(1, num_tokens)
        self._progress.step = figures.step
        self._progress.loss = loss_sum
        self._progress.num_tokens += num_tokens

    def _note_sample(self, num_sampled: int) -> None:
        self._progress.metrics["num_sampled"] = num_sampled
        self._attempt.reporter.progress(self._progress)

    def _note_load(self, step: int, figures: dict[str, float]) -> None:
        """How the revision of ``step`` came into an engine, if this attempt did that step."""
        if step in self._figures:
            self._figures[step].metrics.update(figures)
            self._report(self._figures[step])

    def _report(self, figures: run_service_pb2.RunStep, began_s: float | None = None) -> None:
        if began_s is not None:
            taken_s = clock.monotonic_s() - began_s
            figures.metrics["step_ms"] = taken_s * 1000.0
            figures.metrics["tokens_per_s"] = figures.metrics["num_tokens"] / taken_s
        self._attempt.reporter.step(figures)
        if figures.step == self._progress.step:
            self._progress.tokens_per_s = figures.metrics["tokens_per_s"]
            self._progress.metrics.clear()
            self._progress.metrics.update(figures.metrics)
            self._attempt.reporter.progress(self._progress)


_MEAN_NAMES = {"num_clipped": "clip_fraction"}


def _batch_figures(batch: RolloutBatch) -> dict[str, float]:
    return {
        "reward_mean": batch.reward_mean,
        "reward_std": batch.reward_std,
        "num_samples": batch.num_samples,
        "num_unscored": batch.num_unscored,
        "num_tokens": batch.num_tokens,
        "entropy": batch.entropy,
    }


@contextlib.contextmanager
def _timed(figures: run_service_pb2.RunStep, name: str) -> Iterator[None]:
    began_s = clock.monotonic_s()
    yield
    figures.metrics[name] = (clock.monotonic_s() - began_s) * 1000.0
