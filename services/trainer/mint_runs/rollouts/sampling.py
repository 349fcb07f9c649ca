"""Completions of one model through inference, many at a time, each from the revision that was asked for."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from mint_api.v1 import common_pb2, inference_service_pb2
from mint_client import Generation, MintClient
from mint_client.generation import gather
from mint_core import clock, failpoints
from mint_core.errors import Cancelled, FailedPrecondition, Internal, InvalidArgument, MintError, Unavailable
from mint_runs.patience import patiently
from mint_runs.prompts import PromptExample
from mint_runs.settings import RunsSettings

__all__ = ["Sampled", "Sampler", "SamplingPlan", "common_numerics", "sample_seed"]

_SAMPLING = failpoints.declare("runs.sampling", "the first sample of a batch has come, others are under way")
_LOADED = failpoints.declare("runs.loaded", "an engine holds the revision: the first header of a batch has come")


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """Seed of one sample: a pure function, so that a sample that is asked for again has the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How to choose tokens."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    stop: tuple[str, ...] = ()
    with_routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """Completions in the order in which they were asked for, and how the first of them came."""

    generations: tuple[Generation, ...]
    load_ms: float
    """From asking to the first header: an engine holds the model by then."""
    first_token_ms: float
    """From the first header to the first token."""


class Sampler:
    """Asks one model, at most ``max_concurrent_samples`` times at once.

    ``check`` is called before each sample is asked for; what it raises ends the batch.
    """

    def __init__(
        self,
        client: MintClient,
        settings: RunsSettings,
        *,
        model: str,
        tenant: str,
        check: Callable[[], None],
        digest: str = "",
    ) -> None:
        """``model`` is a revision name, or a base model name to ask the base for ``tenant`` (a tenant's id);
        ``digest`` is the revision's, if it is known."""
        self._client = client
        self._settings = settings
        self._model = model
        self._digest = digest
        self._tenant = f"tenants/{tenant}"
        self._is_base = model.startswith("baseModels/")
        self._check = check

    async def sample(
        self,
        wanted: Sequence[tuple[PromptExample, int]],
        plan: SamplingPlan,
        *,
        note: Callable[[int], None],
    ) -> Sampled:
        """Sample each of ``wanted`` (prompt and seed); ``note`` is told how many are done.

        The first sample of each prompt goes ahead, the others follow when its first token is there: an engine computes
        a prompt once and takes it from its prefix cache for them. An interrupted sample is asked for again with the
        same seed. Raises :class:`InvalidArgument` naming the line of a prompt that inference refuses,
        :class:`FailedPrecondition` when another revision answered or an engine cannot tell the routed experts that the
        plan asks for, and what inference keeps answering when patience is over.
        """
        batch = _Batch(asyncio.Semaphore(self._settings.max_concurrent_samples), clock.monotonic_s(), note)
        computed: dict[int, asyncio.Event] = {}
        tasks = []
        for prompt, seed in wanted:
            ahead = computed.get(prompt.line)
            mine = computed.setdefault(prompt.line, asyncio.Event())
            tasks.append(asyncio.ensure_future(self._one(prompt, seed, plan, batch, after=ahead, computed=mine)))
        try:
            generations = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return Sampled(
            tuple(generations),
            load_ms=(batch.first_header_at_s - batch.began_at_s) * 1000.0,
            first_token_ms=max(0.0, batch.first_token_at_s - batch.first_header_at_s) * 1000.0,
        )

    async def _one(
        self,
        prompt: PromptExample,
        seed: int,
        plan: SamplingPlan,
        batch: _Batch,
        *,
        after: asyncio.Event | None,
        computed: asyncio.Event,
    ) -> Generation:
        """One sample: begun ``after`` its prompt was computed for another one; ``computed`` is set when it is."""
        if after is not None:
            await after.wait()
        async with batch.room:
            try:
                generation = await patiently(
                    "inference",
                    lambda: self._generate(prompt, seed, plan, batch, computed),
                    patience_s=self._settings.patience_s,
                )
            except InvalidArgument as error:
                if error.field == "return_routed_experts":
                    # Not the prompt's fault: whoever runs the engines has to look.
                    raise FailedPrecondition(
                        f"{self._model} was to be sampled with its routed experts: {error.message}; start the engines "
                        "with return_routed_experts, or set record_routed_experts of runs to false"
                    ) from error
                raise InvalidArgument(
                    f"the prompt of line {prompt.line} cannot be sampled: {error.message}", field=error.field
                ) from error
            finally:
                computed.set()
        batch.num_done += 1
        batch.note(batch.num_done)
        if batch.num_done == 1:
            await _SAMPLING.reached()
        return generation

    async def _generate(
        self, prompt: PromptExample, seed: int, plan: SamplingPlan, batch: _Batch, computed: asyncio.Event
    ) -> Generation:
        self._check()
        sampling = inference_service_pb2.SamplingParams(
            max_new_tokens=plan.max_new_tokens, temperature=plan.temperature, stop=plan.stop, seed=seed
        )
        responses = self._client.generate(
            self._model,
            prompt.prompt,
            sampling=sampling,
            return_logprobs=True,
            return_routed_experts=plan.with_routed_experts,
            tenant=self._tenant if self._is_base else "",
            timeout_s=self._settings.sample_timeout_s,
        )
        try:
            generation = await gather(batch.observed(responses, computed))
        except MintError as error:
            raise _as_interruption(error) from error
        if generation.finish_reason not in ("stop", "length"):
            raise Unavailable(f"a sample ended by {generation.finish_reason}: the engine gave it up; asked for again")
        asked = ("" if self._is_base else self._model, self._digest or generation.digest)
        if (generation.revision, generation.digest) != asked:
            raise FailedPrecondition(
                f"{self._model} {self._digest} was asked and {generation.revision or 'the base'} {generation.digest} "
                "answered: no sample of another model is used; look at inference",
                metadata={"expected": self._model, "actual": generation.revision},
            )
        if len(generation.logprobs) != len(generation.token_ids):
            raise FailedPrecondition(
                f"{generation.engine_replica} gave {len(generation.logprobs)} log-probabilities for "
                f"{len(generation.token_ids)} tokens: every token of a sample needs one"
            )
        return generation


@dataclass(slots=True)
class _Batch:
    """What the samples under way share."""

    room: asyncio.Semaphore
    began_at_s: float
    note: Callable[[int], None]
    num_done: int = 0
    first_header_at_s: float = 0.0
    first_token_at_s: float = 0.0

    async def observed(
        self, responses: AsyncIterator[inference_service_pb2.GenerateResponse], computed: asyncio.Event
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        """``responses``, with the batch's first header and first token noted; ``computed`` is set at their own first
        token."""
        async for response in responses:
            if response.WhichOneof("content") == "header":
                if not self.first_header_at_s:
                    self.first_header_at_s = clock.monotonic_s()
                    await _LOADED.reached()
            elif response.chunk.token_ids:
                self.first_token_at_s = self.first_token_at_s or clock.monotonic_s()
                computed.set()
            yield response


def _as_interruption(error: MintError) -> MintError:
    """A connection cut in mid-stream may end as CANCELLED or INTERNAL; a bug in a service carries an error id."""
    if isinstance(error, Cancelled) or (isinstance(error, Internal) and "error_id" not in error.metadata):
        return Unavailable(f"a sample was interrupted: {error.message}; asked for again")
    return error


def common_numerics(generations: Sequence[Generation]) -> common_pb2.Numerics:
    """The arithmetic of the engines that generated. Raises :class:`Unavailable` if they differ."""
    first = generations[0].numerics
    for generation in generations:
        if generation.numerics != first:
            raise Unavailable(
                f"one batch was sampled by engines of different arithmetic, {first.engine_version} {first.dtype} and "
                f"{generation.numerics.engine_version} {generation.numerics.dtype}: sample again when all are alike"
            )
    return first
