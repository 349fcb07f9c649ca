"""The batch of one step: found where an attempt has kept it, else sampled, scored and kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mint_client import Generation
from mint_core import clock, failpoints
from mint_core.errors import BlobCorrupt, FailedPrecondition, Unavailable
from mint_runs.attempt import Attempt
from mint_runs.grpo_plan import GrpoPlan
from mint_runs.order import step_indices
from mint_runs.prompts import PromptExample
from mint_runs.rollouts.batch import RolloutBatch, RolloutGroup, RolloutSample
from mint_runs.rollouts.sampling import Sampled, Sampler, SamplingPlan, common_numerics, sample_seed
from mint_runs.rollouts.storage import RolloutStorage
from mint_runs.scoring import Scored, Scoring
from mint_scorers import Sample

__all__ = ["GeneratingRevision", "MadeBatch", "RolloutMaker", "score_samples"]

_SAMPLED = failpoints.declare("runs.sampled", "all samples of a batch have come, none is scored")
_SCORED = failpoints.declare("runs.scored", "a batch is scored, nothing of it is stored")

_MAX_SCORED_AT_ONCE = 64
_MAX_REWARD = float(np.finfo(np.float32).max)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GeneratingRevision:
    """What samples a batch."""

    step: int
    """Optimizer steps of this run that are in it."""
    name: str
    """Resource name of the revision."""
    digest: str


@dataclass(frozen=True, slots=True)
class MadeBatch:
    """A batch as it is stored, and what making it took."""

    batch: RolloutBatch
    figures: dict[str, float] = field(default_factory=dict)
    """``sample_ms``, ``score_ms``, ``persist_ms``; empty if the batch was found."""
    loaded: GeneratingRevision | None = None
    """What an engine had to hold first; None if the batch was found."""
    load_figures: dict[str, float] = field(default_factory=dict)
    """``load_ms``, ``first_token_ms`` of that."""


class RolloutMaker:
    """Makes the batches of one attempt."""

    def __init__(
        self,
        attempt: Attempt,
        plan: GrpoPlan,
        prompts: Sequence[PromptExample],
        scoring: Scoring,
        storage: RolloutStorage,
        *,
        routed_top_k: int,
    ) -> None:
        """``routed_top_k`` is the number of experts that a token goes to in each layer, 0 to record no routes."""
        self._attempt = attempt
        self._plan = plan
        self._prompts = prompts
        self._scoring = scoring
        self._storage = storage
        self._routed_top_k = routed_top_k
        self._num_made = 0
        self._has_told_unscored = False

    async def make(self, step: int, generating: GeneratingRevision, *, note: Callable[[int], None]) -> MadeBatch:
        """The batch of ``step``; ``note`` is told how many samples have come."""
        attempt = self._attempt
        is_first, self._num_made = self._num_made == 0, self._num_made + 1
        found = await self._storage.find(step)
        if found is not None:
            self._check_shape(found)
            attempt.reporter.event("replayed", f"step {step} goes on from the stored batch of {found.revision}")
            return MadeBatch(found)
        if is_first and attempt.run.num_attempts > 1:
            attempt.reporter.event(
                "resampled", f"an earlier attempt stored no batch of step {step}: it is sampled from {generating.name}"
            )
        indices = step_indices(self._plan.seed, step - 1, self._plan.num_prompts_per_step, len(self._prompts))
        prompts = [self._prompts[index] for index in indices]
        sampled, sample_ms = await _timed(self._sample(step, generating, prompts, note))
        await _SAMPLED.reached()
        pairs = [
            (prompt, generation)
            for prompt, generations in zip(prompts, self._by_group(sampled.generations), strict=True)
            for generation in generations
        ]
        scores, score_ms = await _timed(score_samples(self._scoring, pairs, attempt.check))
        await _SCORED.reached()
        self._tell_unscored(step, scores)
        attempt.check()
        batch = self._batch(step, generating, prompts, sampled.generations, scores)
        kept, persist_ms = await _timed(self._storage.keep(batch))
        return MadeBatch(
            kept,
            {"sample_ms": sample_ms, "score_ms": score_ms, "persist_ms": persist_ms},
            generating,
            _load_figures(sampled),
        )

    async def hand_off(self, generating: GeneratingRevision) -> dict[str, float]:
        """Have an engine load a revision that no batch of this run will ask for, by one token; answers ``load_ms`` and
        ``first_token_ms``."""
        plan = SamplingPlan(max_new_tokens=1, temperature=0.0)
        sampled = await self._sampler(generating).sample([(self._prompts[0], 0)], plan, note=lambda _: None)
        return _load_figures(sampled)

    def _tell_unscored(self, step: int, scores: Sequence[Scored]) -> None:
        """Once in an attempt: the figures of the steps go on counting."""
        errors = [scored.error for scored in scores if scored.value is None]
        if errors and not self._has_told_unscored:
            self._has_told_unscored = True
            self._attempt.reporter.event(
                "unscored",
                f"{len(errors)} of {len(scores)} samples of step {step} have no score; the first: {errors[0]}",
            )

    def _sampler(self, generating: GeneratingRevision) -> Sampler:
        attempt = self._attempt
        return Sampler(
            attempt.client,
            attempt.settings,
            model=generating.name,
            tenant=attempt.tenant,
            check=attempt.check,
            digest=generating.digest,
        )

    async def _sample(
        self,
        step: int,
        generating: GeneratingRevision,
        prompts: Sequence[PromptExample],
        note: Callable[[int], None],
    ) -> Sampled:
        plan = self._plan
        wanted = [
            (prompt, sample_seed(plan.seed, step, place, sample))
            for place, prompt in enumerate(prompts)
            for sample in range(plan.group_size)
        ]
        how = SamplingPlan(plan.max_new_tokens, plan.temperature, plan.stop, self._routed_top_k > 0)
        return await self._sampler(generating).sample(wanted, how, note=note)

    def _batch(
        self,
        step: int,
        generating: GeneratingRevision,
        prompts: Sequence[PromptExample],
        generations: Sequence[Generation],
        scores: Sequence[Scored],
    ) -> RolloutBatch:
        samples = [
            RolloutSample(
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                finish_reason=generation.finish_reason,
                text=generation.text,
                reward=scored.value,
                error=scored.error,
                routed_experts=_routed_experts(generation, self._routed_top_k),
            )
            for generation, scored in zip(generations, scores, strict=True)
        ]
        groups = zip(prompts, self._by_group(generations), self._by_group(samples), strict=True)
        return RolloutBatch(
            run=self._attempt.run.name,
            step=step,
            revision=generating.name,
            revision_digest=generating.digest,
            numerics=common_numerics(generations),
            temperature=self._plan.temperature,
            groups=tuple(
                RolloutGroup(prompt.line, _prompt_token_ids(prompt, asked), tuple(members))
                for prompt, asked, members in groups
            ),
        )

    def _by_group(self, items: Sequence[T]) -> list[Sequence[T]]:
        size = self._plan.group_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _check_shape(self, batch: RolloutBatch) -> None:
        counts = [len(group.samples) for group in batch.groups]
        if counts != [self._plan.group_size] * self._plan.num_prompts_per_step:
            raise BlobCorrupt(
                f"the stored batch of step {batch.step} of {batch.run} has groups of {counts} samples, the recipe asks "
                f"for {self._plan.num_prompts_per_step} of {self._plan.group_size}"
            )


async def score_samples(
    scoring: Scoring, pairs: Sequence[tuple[PromptExample, Generation]], check: Callable[[], None]
) -> list[Scored]:
    """One outcome for each completion, in order; a reward that no float32 holds is none. ``check`` is called now and
    then; what it raises ends the scoring."""
    scores: list[Scored] = []
    for start in range(0, len(pairs), _MAX_SCORED_AT_ONCE):
        check()
        samples = [
            Sample(prompt.prompt_text, generation.text, prompt.fields)
            for prompt, generation in pairs[start : start + _MAX_SCORED_AT_ONCE]
        ]
        scores += map(_in_float32, await scoring.score(samples))
    return scores


def _in_float32(scored: Scored) -> Scored:
    if scored.value is None:
        return scored
    if abs(scored.value) > _MAX_REWARD:
        return Scored(None, f"the score is {scored.value:g}: expected at most {_MAX_REWARD:g} either way")
    return Scored(float(np.float32(scored.value)))


def _prompt_token_ids(prompt: PromptExample, generations: Sequence[Generation]) -> tuple[int, ...]:
    """What the engines saw, which must be the same for all of a group."""
    seen = {generation.prompt_token_ids for generation in generations}
    if len(seen) != 1:
        # Another attempt finds them alike again: a chat template may write the date, and midnight has passed.
        raise Unavailable(
            f"engines tokenized the prompt of line {prompt.line} in {len(seen)} ways within one group; sample again"
        )
    return seen.pop()


def _routed_experts(generation: Generation, top_k: int) -> npt.NDArray[np.int32] | None:
    if not top_k:
        return None
    experts = np.frombuffer(generation.routed_experts, dtype="<i4").astype(np.int32)
    num_tokens = len(generation.prompt_token_ids) + len(generation.token_ids) - 1
    if not len(experts) or len(experts) % (num_tokens * top_k):
        raise FailedPrecondition(
            f"{generation.engine_replica} recorded {len(experts)} routed experts for {num_tokens} tokens, expected "
            f"{top_k} for each of the base's layers: set return_routed_experts of the engine, or record_routed_experts "
            "of runs to false"
        )
    return experts.reshape(num_tokens, -1, top_k)


def _load_figures(sampled: Sampled) -> dict[str, float]:
    return {"load_ms": sampled.load_ms, "first_token_ms": sampled.first_token_ms}


async def _timed(work: Awaitable[T]) -> tuple[T, float]:
    """The result and the milliseconds it took."""
    began_s = clock.monotonic_s()
    result = await work
    return result, (clock.monotonic_s() - began_s) * 1000.0
