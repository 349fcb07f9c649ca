"""Sampling through an inference in memory: interruptions are repaired, refusals are told, never more than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from mint_api.v1 import common_pb2, inference_service_pb2
from mint_core.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MintError,
    ResourceExhausted,
    Unavailable,
)
from mint_runs.prompts import PromptExample
from mint_runs.rollouts.sampling import Sampled, Sampler, SamplingPlan, common_numerics, sample_seed
from mint_runs.settings import RunsSettings

REVISION = "tenants/acme/policies/tone/revisions/1"
PROMPTS = [PromptExample(line, f"p{line}", (), "", {}) for line in range(1, 9)]
PLAN = SamplingPlan(max_new_tokens=2, temperature=1.0, stop=("END",))


class Inference:
    """Answers two tokens; ``faults`` come first, each in the middle of a stream or (MintError) instead of one."""

    def __init__(self, *faults: MintError | str) -> None:
        self.faults: Iterator[MintError | str] = iter(faults)
        self.seeds: list[int] = []
        self.num_running = self.max_running = 0
        self.engine_version = "memory 1"

    async def generate(self, model: str, prompt: Any, *, sampling: Any, **kwargs: Any) -> AsyncIterator[Any]:
        assert kwargs["return_logprobs"]
        assert list(sampling.stop) == ["END"]
        self.seeds.append(sampling.seed)
        fault = next(self.faults, "")
        if isinstance(fault, MintError):
            raise fault
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            header = inference_service_pb2.GenerationHeader(prompt_token_ids=[1])
            header.resolution.revision = model
            header.numerics.engine_version = self.engine_version
            yield inference_service_pb2.GenerateResponse(header=header)
            await asyncio.sleep(0.002)
            chunk = inference_service_pb2.GeneratedChunk(
                text=prompt,
                token_ids=[1, 2],
                logprobs=[-1.0] if fault == "short" else [-1.0, -2.0],
                finish_reason=inference_service_pb2.FINISH_REASON_ABORT
                if fault == "abort"
                else inference_service_pb2.FINISH_REASON_STOP,
            )
            yield inference_service_pb2.GenerateResponse(chunk=chunk)
        finally:
            self.num_running -= 1


async def sample(
    inference: Any, *, patience_s: float = 5.0, check: Callable[[], None] = lambda: None, num_prompts: int = 8
) -> Sampled:
    settings = RunsSettings.model_construct(patience_s=patience_s, max_concurrent_samples=3)
    sampler = Sampler(inference, settings, model=REVISION, tenant="acme", check=check)
    noted: list[int] = []
    wanted = [(prompt, prompt.line) for prompt in PROMPTS[:num_prompts]]
    sampled = await sampler.sample(wanted, PLAN, note=noted.append)
    assert noted == list(range(1, num_prompts + 1))
    return sampled


async def test_samples_come_in_order_and_never_too_many_at_once() -> None:
    inference = Inference()
    sampled = await sample(inference)
    assert [generation.text for generation in sampled.generations] == [prompt.text for prompt in PROMPTS]
    assert inference.max_running == 3
    assert 0 <= sampled.load_ms < 1000
    assert 1 <= sampled.first_token_ms < 1000


@pytest.mark.parametrize(
    "fault",
    [
        "abort",
        Unavailable("lost in mid-stream", retry_after_s=0.01),
        DeadlineExceeded("too slow"),
        Cancelled("the connection was cut"),
        Internal("RST_STREAM"),
        ResourceExhausted("no slot", retry_after_s=0.01),
    ],
    ids=str,
)
async def test_an_interrupted_sample_is_asked_for_again_with_its_seed(fault: MintError | str) -> None:
    inference = Inference(fault)
    sampled = await sample(inference, num_prompts=2)
    assert len(sampled.generations) == 2
    assert sorted(inference.seeds) == [1, 1, 2]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Internal("a bug", metadata={"error_id": "abc"}), Internal, "a bug"),
        (ResourceExhausted("message too large"), ResourceExhausted, "message too large"),
        (InvalidArgument("too long", field="prompt"), InvalidArgument, "the prompt of line 1 cannot be sampled: too"),
        (
            InvalidArgument("this engine does not record routes", field="return_routed_experts"),
            FailedPrecondition,
            "does not record routes; start the engines with return_routed_experts, or set record_routed_experts",
        ),
        ("short", FailedPrecondition, "gave 1 log-probabilities for 2 tokens"),
    ],
    ids=str,
)
async def test_what_another_try_will_not_mend_ends_the_batch(
    fault: MintError | str, error: type[MintError], message: str
) -> None:
    inference = Inference(fault)
    with pytest.raises(error, match=message):
        await sample(inference)
    assert inference.num_running == 0
    assert len(asyncio.all_tasks()) == 1


async def test_patience_ends() -> None:
    with pytest.raises(Unavailable, match="away"):
        await sample(Inference(*[Unavailable("away", retry_after_s=0.01)] * 100), patience_s=0.05)


async def test_a_check_that_raises_stops_what_was_not_asked_yet() -> None:
    inference = Inference()

    def check() -> None:
        if len(inference.seeds) == 4:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        await sample(inference, check=check)
    assert len(inference.seeds) == 4
    assert inference.num_running == 0


async def test_engines_of_one_batch_are_alike() -> None:
    first = (await sample(Inference(), num_prompts=1)).generations
    other = Inference()
    other.engine_version = "memory 2"
    second = (await sample(other, num_prompts=1)).generations
    assert common_numerics(first) == common_pb2.Numerics(engine_version="memory 1")
    with pytest.raises(Unavailable, match="different arithmetic, memory 1  and memory 2"):
        common_numerics([*first, *second])


def test_seeds_are_distinct_and_fixed() -> None:
    seeds = [sample_seed(1, step, prompt, sample) for step in (1, 2) for prompt in (0, 1) for sample in (0, 1)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == 11749321780068692622
