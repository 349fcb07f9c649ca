"""The real SGLang on routed experts: LoRA on every expert, and the routes that come back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from mint_core.errors import InvalidArgument, Unavailable
from mint_engine.adapter_engine import Delta, Sampling
from mint_engine.host import EngineHost, Generation, HostState
from mint_engine.prompts import TokenPrompt
from mint_engine.sglang_settings import SglangSettings
from support.engine_contract import PROMPT, ask
from support.merged_weights import difference, merged_forward
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_qwen3_moe

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TOLERANCE = 1e-4
SETTINGS = SglangSettings(
    dtype="float32",
    max_lora_rank=8,
    num_slots=4,
    max_loaded_adapters=4,
    max_total_tokens=4096,
    return_routed_experts=True,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sglang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangRig]:
    folder = tmp_path_factory.mktemp("sglang-moe")
    async with running_sglang(make_tiny_qwen3_moe(folder / "base"), folder / "adapters", SETTINGS) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def host(sglang: SglangRig) -> AsyncIterator[EngineHost]:
    async with sglang.host() as host:
        yield host


def make(sglang: SglangRig, work: Path, **options) -> ServingAdapter:
    return make_serving_adapter(sglang.base, sglang.adapter_dir, work, **options)


def reference(
    base: Path, adapter: ServingAdapter | None, token_ids: tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probability of each token but the first and the experts of each token by layer. The update is merged into the
    weights by hand: PEFT's own layouts for experts are what the codecs are tested against, not what serves as truth."""
    from transformers import Qwen3MoeForCausalLM

    logprobs, output = merged_forward(Qwen3MoeForCausalLM, base, adapter, token_ids, output_router_logits=True)
    return logprobs, [logits.topk(2, -1).indices for logits in output.router_logits]


async def test_expert_adapters_and_the_base_in_one_batch_equal_transformers(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    adapters = [make(sglang, tmp_path, seed=seed, rank=rank) for seed, rank in ((1, 8), (2, 3))]
    for adapter in adapters:
        await host.load(adapter.digest, adapter.folder)
    everybody = [adapters[0], None, adapters[1]]
    prompts = [TokenPrompt(tuple(range(10 + place, 30 + 2 * place))) for place in range(3)]
    answers = await asyncio.gather(
        *(
            ask(host, adapter.digest if adapter else "", prompt=prompt, max_new_tokens=12)
            for adapter, prompt in zip(everybody, prompts, strict=True)
        )
    )
    for adapter, prompt, answer in zip(everybody, prompts, answers, strict=True):
        whole = prompt.token_ids + answer.token_ids
        expected, _ = reference(sglang.base, adapter, whole)
        assert difference(answer.logprobs, expected[len(prompt.token_ids) - 1 :]) < TOLERANCE
        if adapter is not None:
            plain, _ = reference(sglang.base, None, whole)
            assert difference(answer.logprobs, plain[len(prompt.token_ids) - 1 :]) > 0.05


async def test_experts_that_share_a_matrix_stand_beside_others_and_equal_transformers(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    shared = make(sglang, tmp_path, seed=6, rank=5, shared_experts=True)
    other = make(sglang, tmp_path, seed=7, rank=8)
    assert shared.blob.stat().st_size < other.blob.stat().st_size / 2
    # The second takes all ranks of its slot; sooner or later one fills the slot that the other had.
    for adapter in (other, shared):
        await host.load(adapter.digest, adapter.folder, into_slot=True)
    answers = await asyncio.gather(*(ask(host, each.digest, max_new_tokens=12) for each in (shared, other)))
    for adapter, answer in zip((shared, other), answers, strict=True):
        whole = PROMPT.token_ids + answer.token_ids
        found, plain = (reference(sglang.base, each, whole)[0][len(PROMPT.token_ids) - 1 :] for each in (adapter, None))
        assert difference(answer.logprobs, found) < TOLERANCE
        assert difference(answer.logprobs, plain) > 0.05
    await sglang.check_upload(ranks=[1], mapped=[shared.digest, other.digest])


async def test_evictions_of_mixed_ranks_leave_every_slot_bit_for_bit_as_sglang_does(sglang: SglangRig) -> None:
    ranks = [8, 3, 5, 8, 1, 2, 8, 4, 7, 6, 8, 1, 3, 2, 5, 8, 1]
    for seed in range(3):
        await sglang.check_upload(ranks=ranks, seed=seed)


async def test_adapters_that_take_turns_in_few_slots_answer_as_when_they_were_alone(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    adapters = [make(sglang, tmp_path, seed=20 + rank, rank=rank) for rank in (8, 1, 5, 2)]
    alone = []
    for adapter in adapters:
        await host.load(adapter.digest, adapter.folder, into_slot=True)
        alone.append(await ask(host, adapter.digest, max_new_tokens=3))
    # Four adapters and the base on four slots: every round evicts.
    for _ in range(2):
        await ask(host, max_new_tokens=1)
        for adapter, before in zip(adapters, alone, strict=True):
            answer = await ask(host, adapter.digest, max_new_tokens=3)
            assert answer.token_ids == before.token_ids
            # A prompt from the prefix cache rounds differently.
            assert answer.logprobs == pytest.approx(before.logprobs, abs=1e-5)
    await sglang.check_upload(ranks=[], mapped=[adapter.digest for adapter in adapters])


async def test_zero_expert_adapter_is_bit_identical_to_the_base(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    zero = make(sglang, tmp_path, seed=3, zero=True)
    await host.load(zero.digest, zero.folder)
    base, answer = await ask(host, max_new_tokens=24), await ask(host, zero.digest, max_new_tokens=24)
    assert (answer.token_ids, answer.logprobs) == (base.token_ids, base.logprobs)


async def test_routed_experts_equal_the_router_of_transformers(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    adapter = make(sglang, tmp_path, seed=4)
    await host.load(adapter.digest, adapter.folder)
    request = Generation(
        prompt=PROMPT,
        tenant="tenants/a",
        digest=adapter.digest,
        sampling=Sampling(max_new_tokens=8, ignore_eos=True),
        with_routed_experts=True,
    )
    items = [item async for item in host.generate(request, timeout_s=60)]
    deltas = [item for item in items if isinstance(item, Delta)]
    whole = PROMPT.token_ids + tuple(token for delta in deltas for token in delta.token_ids)
    assert deltas[-1].finish is not None
    routes = np.frombuffer(deltas[-1].finish.routed_experts, dtype="<i4").reshape(len(whole) - 1, 2, 2)
    _, expected = reference(sglang.base, adapter, whole)
    for layer in range(2):
        assert (np.sort(routes[:, layer], -1) == np.sort(expected[layer][:-1].numpy(), -1)).all()


async def test_experts_without_all_three_projections_are_refused(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    adapter = make(sglang, tmp_path, seed=5, targets=("gate_proj", "up_proj"))
    with pytest.raises(InvalidArgument, match="gate, up and down together"):
        await host.load(adapter.digest, adapter.folder)


async def test_unload_that_sglang_never_answers_makes_the_replica_sick(sglang: SglangRig, tmp_path: Path) -> None:
    adapter = make(sglang, tmp_path, seed=8)
    async with sglang.host(call_timeout_s=1.0) as host:
        await host.load(adapter.digest, adapter.folder)
        for process_id in sglang.process_ids:
            os.kill(process_id, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="must be restarted"):
                await host.unload(adapter.digest)
        finally:
            for process_id in sglang.process_ids:
                os.kill(process_id, signal.SIGCONT)
        assert host.state is HostState.SICK
        assert host.residents() == []
        with pytest.raises(Unavailable, match="sick"):
            await host.load(adapter.digest, adapter.folder)
