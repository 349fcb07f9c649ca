"""One pass for the prompts of new requests and the next tokens of running ones: every answer as when it was alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import ValidationError

from mint_engine.host import EngineHost
from mint_engine.prompts import TokenPrompt
from mint_engine.sglang_settings import SglangSettings
from support.engine_contract import ask
from support.serving_adapters import make_serving_adapter
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # SGLang and PEFT warn of accelerators and options that do not concern us.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

SETTINGS = SglangSettings(
    dtype="float32",
    max_lora_rank=8,
    num_slots=5,
    max_loaded_adapters=8,
    max_total_tokens=8192,
    max_running_requests=32,
    mixed_prefill=True,
)
NUM_REQUESTS = 24
NUM_NEW = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sglang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangRig]:
    folder = tmp_path_factory.mktemp("sglang")
    async with running_sglang(make_tiny_llama(folder / "base"), folder / "adapters", SETTINGS) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def host(sglang: SglangRig) -> AsyncIterator[EngineHost]:
    async with sglang.host() as host:
        yield host


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_answers_of_requests_that_come_one_after_another_are_those_of_each_alone(
    host: EngineHost, sglang: SglangRig, tmp_path: Path, temperature: float
) -> None:
    base = ""
    digests = [base]
    for seed, rank in enumerate((2, 8, 5, 8)):
        adapter = make_serving_adapter(sglang.base, sglang.adapter_dir, tmp_path, seed=seed, rank=rank)
        await host.load(adapter.digest, adapter.folder)
        digests.append(adapter.digest)

    async def answer(place: int) -> tuple[int, ...]:
        found = await ask(
            host,
            digests[place % len(digests)],
            prompt=TokenPrompt(tuple(range(10 + place, 20 + 4 * place))),
            # SGLang mixes only where nobody asked for log-probabilities.
            logprobs=False,
            max_new_tokens=NUM_NEW,
            temperature=temperature,
            seed=place,
        )
        assert len(found.token_ids) == NUM_NEW
        return found.token_ids

    alone = [await answer(place) for place in range(NUM_REQUESTS)]
    assert len(set(alone)) == NUM_REQUESTS
    await host.flush_prefix_cache()

    async def later(place: int) -> tuple[int, ...]:
        await asyncio.sleep(0.02 * place)
        return await answer(place)

    assert await asyncio.gather(*(later(place) for place in range(NUM_REQUESTS))) == alone


async def test_log_probabilities_beside_them_are_right_too(host: EngineHost) -> None:
    prompts = [TokenPrompt(tuple(range(10 + place, 40 + place))) for place in range(6)]
    alone = [await ask(host, prompt=prompt, max_new_tokens=NUM_NEW) for prompt in prompts]
    await host.flush_prefix_cache()
    together = await asyncio.gather(
        *(
            ask(host, prompt=prompt, max_new_tokens=NUM_NEW, logprobs=bool(place % 2))
            for place, prompt in enumerate(prompts)
        )
    )
    for place, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other.token_ids == one.token_ids
        if place % 2:
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


async def test_recorded_routing_and_one_pass_for_both_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="mixed_prefill"):
        SglangSettings(mixed_prefill=True, return_routed_experts=True)
