"""More adapters at work than slots: each answer as when it was alone, and nobody waits for another's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from mint_engine.host import EngineHost
from mint_engine.prompts import TokenPrompt
from mint_engine.sglang_settings import SglangSettings
from support.engine_contract import Answer, ask, until
from support.serving_adapters import make_serving_adapter
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # SGLang and PEFT warn of accelerators and options that do not concern us.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

NUM_SLOTS = 2
POOL_TOKENS = 1024
SETTINGS = SglangSettings(
    dtype="float32",
    max_lora_rank=8,
    num_slots=NUM_SLOTS,
    max_loaded_adapters=8,
    max_total_tokens=POOL_TOKENS,
    max_running_requests=32,
    mixed_prefill=True,
    slot_turn_passes=4,
)
BASE = ""
NUM_REQUESTS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sglang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangRig]:
    folder = tmp_path_factory.mktemp("sglang")
    async with running_sglang(make_tiny_llama(folder / "base"), folder / "adapters", SETTINGS) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def host(sglang: SglangRig) -> AsyncIterator[EngineHost]:
    async with sglang.host() as host:
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def digests(host: EngineHost, sglang: SglangRig, tmp_path: Path) -> list[str]:
    """The base and five adapters."""
    digests = [BASE]
    for seed, rank in enumerate((2, 8, 5, 8, 3)):
        adapter = make_serving_adapter(sglang.base, sglang.adapter_dir, tmp_path, seed=seed, rank=rank)
        await host.load(adapter.digest, adapter.folder)
        digests.append(adapter.digest)
    return digests


def prompt(place: int) -> TokenPrompt:
    return TokenPrompt(tuple(range(10 + place, 20 + 4 * place)))


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_answers_that_take_turns_are_those_of_each_alone(
    host: EngineHost, digests: list[str], temperature: float, logprobs: bool
) -> None:
    async def answer(place: int) -> Answer:
        return await ask(
            host,
            digests[place % len(digests)],
            prompt=prompt(place),
            logprobs=logprobs,
            max_new_tokens=20 + place,
            temperature=temperature,
            seed=place,
        )

    alone = [await answer(place) for place in range(NUM_REQUESTS)]
    assert [len(each.token_ids) for each in alone] == [20 + place for place in range(NUM_REQUESTS)]
    assert len({each.token_ids for each in alone}) == len(alone)
    await host.flush_prefix_cache()

    async def later(place: int) -> Answer:
        await asyncio.sleep(0.02 * place)
        return await answer(place)

    together = await asyncio.gather(*(later(place) for place in range(NUM_REQUESTS)))
    for one, other in zip(alone, together, strict=True):
        assert other.token_ids == one.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    # The engine is idle: nothing was left aside.
    await host.flush_prefix_cache()


async def test_short_request_ends_before_the_long_ones_that_have_all_slots(
    host: EngineHost, digests: list[str]
) -> None:
    long = [asyncio.create_task(ask(host, digest, max_new_tokens=250)) for digest in digests[:NUM_SLOTS]]
    await until(lambda: host.num_running == NUM_SLOTS)
    await asyncio.sleep(0.05)
    short = await ask(host, digests[NUM_SLOTS], max_new_tokens=8)
    assert len(short.token_ids) == 8
    assert not any(task.done() for task in long)
    assert [len(answer.token_ids) for answer in await asyncio.gather(*long)] == [250] * NUM_SLOTS


async def test_aborted_requests_leave_nothing_aside(host: EngineHost, digests: list[str]) -> None:
    alone = await ask(host, digests[0], max_new_tokens=60)
    await host.flush_prefix_cache()
    kept = asyncio.create_task(ask(host, digests[0], max_new_tokens=60))
    aborted = [asyncio.create_task(ask(host, digest, max_new_tokens=120)) for digest in digests[1:]]
    await until(lambda: host.num_running == len(digests))
    await asyncio.sleep(0.1)
    for task in aborted:
        task.cancel()
    await asyncio.wait(aborted)
    assert (await kept).token_ids == alone.token_ids
    assert all(resident.num_references == 0 for resident in host.residents())
    for digest in digests[1:]:
        assert await host.unload(digest)
    await host.flush_prefix_cache()


async def test_requests_that_do_not_fit_the_pool_together_are_answered_all_the_same(
    host: EngineHost, digests: list[str]
) -> None:
    num_new = POOL_TOKENS // 4
    alone = [await ask(host, digest, prompt=prompt(3), max_new_tokens=num_new) for digest in digests]
    await host.flush_prefix_cache()
    together = await asyncio.gather(
        *(ask(host, digest, prompt=prompt(3), max_new_tokens=num_new) for digest in digests)
    )
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    await host.flush_prefix_cache()
