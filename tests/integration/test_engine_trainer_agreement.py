"""Engine and trainer give the same tokens the same log-probabilities under the same revision.

Reinforcement learning divides the one by the other: where they disagree, every update is off-policy, and nothing says
so. Measured on the demo's base, with an adapter that was trained, on completions that the engine itself sampled.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from mint_api.v1 import common_pb2, inference_service_pb2, run_service_pb2, session_service_pb2
from mint_cli.model import fetch_model
from mint_client import Generation, MintClient
from support.publishing import create_policy, write_sft_data
from support.stack import Stack, fresh_id, running_stack

Dtype = Literal["float32", "bfloat16"]

TENANT = "acme"
PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "2 + 3 * 4 =",
    "def fibonacci(n):",
    "Dear customer, we are sorry that",
    "In the year 1969",
)
NUM_SAMPLES = 2
NUM_NEW_TOKENS = 32


@dataclass(frozen=True)
class Trained:
    """A policy after a few steps: the revision and the state it was exported from."""

    policy: str
    revision: str
    state: common_pb2.TrainingState


@dataclass(frozen=True)
class Mismatch:
    """How far two engines' log-probabilities of the same tokens lie apart."""

    num_tokens: int
    max_abs: float
    mean_abs: float
    k3_kl: float
    """Estimate of KL(engine || trainer) per token (Schulman 2020, "Approximating KL divergence", k3)."""

    @classmethod
    def of(cls, engine: np.ndarray, trainer: np.ndarray) -> Mismatch:
        """Of two float64 ``[num_tokens]``, in natural logarithm."""
        log_ratio = trainer - engine
        return cls(
            num_tokens=len(log_ratio),
            max_abs=float(np.abs(log_ratio).max()),
            mean_abs=float(np.abs(log_ratio).mean()),
            k3_kl=float(np.mean(np.expm1(log_ratio) - log_ratio)),
        )

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens: max {self.max_abs:.2e}, mean {self.mean_abs:.2e}, k3 KL {self.k3_kl:.2e}"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything up over the demo's base, in float32."""
    with running_stack(tmp_path_factory.mktemp("smollm2"), fetch_model().folder) as running:
        yield running


@pytest.fixture(scope="module")
def trained(smollm2: Stack, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A few steps are enough for a B that is not zero: an untrained adapter would compare the base with itself."""
    path = write_sft_data(tmp_path_factory.mktemp("data") / "data.jsonl")

    async def train() -> Trained:
        async with smollm2.client() as client:
            policy = await create_policy(smollm2, client, tenant=TENANT)
            recipe = run_service_pb2.SftRecipe(
                train_data=await client.blobs.upload(TENANT, path), num_steps=4, batch_size=4, seed=1
            )
            queued = await client.runs.create(TENANT, run_service_pb2.Run(policy=policy, sft=recipe, publish=True))
            async with asyncio.timeout(120):
                run = await client.runs.wait(queued.name)
            assert run.state == run_service_pb2.RUN_STATE_SUCCEEDED, run.error
            return Trained(policy, run.published_revision, run.latest_training_state)

    return asyncio.run(train())


async def sample(client: MintClient, model: str) -> list[Generation]:
    """Completions at temperature 1 with the engine's log-probabilities, all in one batch."""

    def sampling(seed: int) -> inference_service_pb2.SamplingParams:
        return inference_service_pb2.SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=1.0, seed=seed)

    return await asyncio.gather(
        *(
            client.generate_text(model, prompt, sampling=sampling(seed), return_logprobs=True)
            for prompt in PROMPTS
            for seed in range(NUM_SAMPLES)
        )
    )


async def trainer_logprobs(client: MintClient, trained: Trained, samples: list[Generation]) -> np.ndarray:
    """What the trainer gives to the samples' completions, from the state that the revision was exported from."""
    base_digest = (await client.policies.get(trained.policy)).base_digest
    session = await client.sessions.create(
        TENANT,
        fresh_id("agreement"),
        policy=trained.policy,
        base_digest=base_digest,
        from_state=trained.state,
        weights_only=True,
    )
    data = []
    for generation in samples:
        token_ids = [*generation.prompt_token_ids, *generation.token_ids]
        weights = [0.0] * (len(generation.prompt_token_ids) - 1) + [1.0] * len(generation.token_ids)
        data.append(session_service_pb2.Datum(tokens=token_ids[:-1], targets=token_ids[1:], weights=weights))
    result = await client.sessions.forward(session.name, data)
    await client.sessions.close(session.name)
    completions = [
        logprobs.values[-len(generation.token_ids) :]
        for logprobs, generation in zip(result.logprobs, samples, strict=True)
    ]
    return np.concatenate(completions).astype(np.float64)


async def base_logprobs(client: MintClient, stack: Stack, samples: list[Generation]) -> np.ndarray:
    """What the engine gives to the samples' completions without the adapter."""
    scored = await asyncio.gather(
        *(
            client.score(
                stack.base_model, [*generation.prompt_token_ids, *generation.token_ids], tenant=f"tenants/{TENANT}"
            )
            for generation in samples
        )
    )
    completions = [
        response.logprobs[-len(generation.token_ids) :] for response, generation in zip(scored, samples, strict=True)
    ]
    return np.concatenate(completions).astype(np.float64)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("engine", "trainer"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
async def test_engine_and_trainer_agree(
    smollm2: Stack, trained: Trained, engine: Dtype, trainer: Dtype, report: Callable[[str], None]
) -> None:
    await smollm2.reconfigure("engine.sglang", dtype=engine)
    await smollm2.reconfigure("trainer", dtype=trainer)
    async with smollm2.client() as client:
        samples = await sample(client, trained.revision)
        sampled = np.concatenate([generation.logprobs for generation in samples]).astype(np.float64)
        forwarded = await trainer_logprobs(client, trained, samples)
        without_adapter = await base_logprobs(client, smollm2, samples)
    assert {(generation.revision, generation.numerics.dtype) for generation in samples} == {(trained.revision, engine)}
    found = Mismatch.of(sampled, forwarded)
    report(f"engine {engine}, trainer {trainer}, {found}")
    # The adapter matters, or the comparison would prove nothing.
    assert Mismatch.of(sampled, without_adapter).max_abs > 0.05
    if engine == trainer == "float32":
        assert found.max_abs < 1e-3
        assert found.k3_kl < 1e-6
    else:
        # Rounding to 8 bits is no error, only far from equal; what it costs is in docs/testing.md.
        assert math.isfinite(found.max_abs)
        assert 0 < found.mean_abs < 0.1
        assert 0 <= found.k3_kl < 0.05
