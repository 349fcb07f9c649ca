"""Supervised fine-tuning: cross-entropy on completions, AdamW, warm-up and linear decay.

Every step is a function of the run and of the state before it: the order of examples, the learning rate and the
tokens never depend on when or by whom a step is done. So a run that was killed continues from its latest state and
ends with the bytes it would have had.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from mint_api.v1 import common_pb2, run_service_pb2
from mint_core.errors import InvalidArgument
from mint_runs.attempt import Attempt, Outcome, RunCancelled, RunDrained
from mint_runs.data import parse_examples
from mint_runs.examples import TokenizedExample, tokenize_examples
from mint_runs.order import step_indices
from mint_runs.step_session import StepSession
from mint_runs.training import STEPPED, Training

__all__ = ["SftPlan", "learning_rate", "run_sft"]


@dataclasses.dataclass(frozen=True, slots=True)
class SftPlan:
    """A recipe with its defaults filled in."""

    num_steps: int
    batch_size: int
    max_tokens: int
    seed: int
    save_every_steps: int
    eval_every_steps: int
    """0 means at the end only."""
    optimizer: run_service_pb2.OptimizerConfig

    @classmethod
    def of(cls, recipe: run_service_pb2.SftRecipe) -> SftPlan:
        """Fill in defaults. Raises :class:`InvalidArgument` naming the field."""
        counts = ("batch_size", "max_tokens", "save_every_steps", "eval_every_steps")
        if recipe.num_steps < 1:
            raise InvalidArgument(f"sft.num_steps is {recipe.num_steps}: expected at least 1", field="sft.num_steps")
        for name in counts:
            if getattr(recipe, name) < 0:
                raise InvalidArgument(
                    f"sft.{name} is {getattr(recipe, name)}: expected 0 for the default, or more", field=f"sft.{name}"
                )
        optimizer = run_service_pb2.OptimizerConfig()
        optimizer.CopyFrom(recipe.optimizer)
        optimizer.learning_rate = optimizer.learning_rate or DEFAULT_LEARNING_RATE
        return cls(
            num_steps=recipe.num_steps,
            batch_size=recipe.batch_size or 8,
            max_tokens=recipe.max_tokens or 1024,
            seed=recipe.seed,
            save_every_steps=recipe.save_every_steps or 20,
            eval_every_steps=recipe.eval_every_steps,
            optimizer=optimizer,
        )


DEFAULT_LEARNING_RATE = 1e-3
"""Peak for adapters of rank 8 to 16 on small bases: LoRA wants about ten times what full fine-tuning does (Schulman
et al. 2025, "LoRA Without Regret")."""


def learning_rate(plan: SftPlan, step: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up to the peak, then linear decay that would reach 0 at
    ``num_steps``, so that the last step still learns."""
    peak, num_warmup = plan.optimizer.learning_rate, plan.optimizer.num_warmup_steps
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    return peak * (plan.num_steps - step) / max(1, plan.num_steps - num_warmup)


async def run_sft(attempt: Attempt) -> Outcome:
    """Train and save, publish where the run says so, and only then evaluate: serving does not wait for figures."""
    recipe = attempt.run.sft
    plan = SftPlan.of(recipe)
    train_data = await _load(attempt, recipe.train_data, plan, source="train_data")
    eval_data = await _load(attempt, recipe.eval_data, plan, source="eval_data") if recipe.HasField("eval_data") else []
    training = Training(attempt, num_steps=plan.num_steps)
    await training.run(_SftLoop(attempt, plan, training, train_data, eval_data).work)
    return Outcome(attempt.published_revision)


async def _load(attempt: Attempt, blob: common_pb2.BlobRef, plan: SftPlan, *, source: str) -> list[TokenizedExample]:
    return await attempt.read_lines(
        blob,
        lambda lines: tokenize_examples(
            parse_examples(lines, source=source),
            attempt.tokenizer,
            max_tokens=plan.max_tokens,
            source=source,
            now=attempt.created_at,
        ),
        source=source,
    )


class _SftLoop:
    """What is done in a session, and what outlives one."""

    def __init__(
        self,
        attempt: Attempt,
        plan: SftPlan,
        training: Training,
        train_data: Sequence[TokenizedExample],
        eval_data: Sequence[TokenizedExample],
    ) -> None:
        self._attempt = attempt
        self._plan = plan
        self._training = training
        self._train_data = train_data
        self._eval_data = eval_data
        self._progress = run_service_pb2.RunProgress()
        if training.state is not None:
            self._progress.CopyFrom(attempt.run.progress)

    async def work(self, session: StepSession) -> None:
        """Do what is left to do."""
        progress = self._progress
        progress.step = progress.saved_step = session.start_step
        progress.num_steps = self._plan.num_steps
        progress.num_tokens = sum(
            example.num_loss_tokens for done in range(session.start_step) for example in self._examples(done)
        )
        await self._steps(session)
        await self._conclude(session)

    async def _steps(self, session: StepSession) -> None:
        plan, attempt = self._plan, self._attempt
        for step in range(session.start_step, plan.num_steps):
            attempt.lease.check()
            await self._stop_if_asked(session)
            await self._step(session, step)
            num_done = step + 1
            last = num_done == plan.num_steps
            if last:
                attempt.reporter.event("trained", f"step {num_done} was the last optimizer step")
            if last or num_done % plan.save_every_steps == 0:
                await self._save(session)
            if not last and plan.eval_every_steps and num_done % plan.eval_every_steps == 0:
                await self._evaluate(session)
            attempt.reporter.progress(self._progress)

    async def _conclude(self, session: StepSession) -> None:
        """Publish the last step's state, unless this attempt has; evaluate it."""
        attempt = self._attempt
        if attempt.run.publish and not attempt.published_revision:
            assert self._training.state is not None, "the last step saves its state"
            await attempt.publish(self._training.state, data_digest=attempt.run.sft.train_data.digest)
        await self._evaluate(session)
        attempt.reporter.progress(self._progress)

    async def _step(self, session: StepSession, step: int) -> None:
        examples = self._examples(step)
        optimizer = run_service_pb2.OptimizerConfig()
        optimizer.CopyFrom(self._plan.optimizer)
        optimizer.learning_rate = learning_rate(self._plan, step)
        started_s = time.perf_counter()
        gathered = await session.forward_backward([example.datum() for example in examples])
        applied = await session.optim_step(optimizer, gradient_scale=1.0 / gathered.weight_sum)
        taken_s = time.perf_counter() - started_s
        await STEPPED.reached()
        progress = self._progress
        progress.step = step + 1
        progress.loss = gathered.loss_sum / gathered.weight_sum
        progress.num_tokens += gathered.num_tokens
        progress.tokens_per_s = sum(len(example.token_ids) for example in examples) / taken_s
        progress.metrics["learning_rate"] = optimizer.learning_rate
        progress.metrics["grad_norm"] = applied.grad_norm
        progress.metrics["step_ms"] = taken_s * 1000.0
        self._attempt.reporter.progress(progress)
        figures = run_service_pb2.RunStep(step=progress.step, loss=progress.loss, metrics=progress.metrics)
        figures.metrics["tokens_per_s"] = progress.tokens_per_s
        figures.time.GetCurrentTime()
        self._attempt.reporter.step(figures)

    async def _save(self, session: StepSession) -> None:
        self._progress.saved_step = (await self._training.save(session)).step

    async def _evaluate(self, session: StepSession) -> None:
        """Held-out loss per token, in batches as large as the training ones; nothing without held-out data."""
        if not self._eval_data:
            return
        loss_sum = weight_sum = 0.0
        for start in range(0, len(self._eval_data), self._plan.batch_size):
            batch = self._eval_data[start : start + self._plan.batch_size]
            self._attempt.lease.check()
            result = await session.forward([example.datum() for example in batch])
            loss_sum += result.loss_sum
            weight_sum += result.weight_sum
        self._progress.eval_loss = loss_sum / weight_sum
        step = self._progress.step
        self._attempt.reporter.event("evaluated", f"held-out loss after step {step} is {self._progress.eval_loss:.4f}")

    async def _stop_if_asked(self, session: StepSession) -> None:
        reason = self._attempt.stop_requested
        if reason == "cancel":
            raise RunCancelled
        if reason == "drain":
            if self._progress.step > self._progress.saved_step:
                await self._save(session)
            raise RunDrained

    def _examples(self, step: int) -> list[TokenizedExample]:
        indices = step_indices(self._plan.seed, step, self._plan.batch_size, len(self._train_data))
        return [self._train_data[index] for index in indices]
