"""The real SGLang on multi-head latent attention, which it gets silently wrong on a CPU without the plugin."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from mint_engine.host import EngineHost, Generation
from mint_engine.sglang_settings import SglangSettings
from support.engine_contract import PROMPT, ask
from support.merged_weights import difference, merged_forward
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TOLERANCE = 1e-4
SETTINGS = SglangSettings(
    dtype="float32",
    max_lora_rank=4,
    num_slots=4,
    max_loaded_adapters=4,
    max_total_tokens=2048,
    target_modules=(
        "q_a_proj",
        "kv_a_proj_with_mqa",
        "q_b_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
)


def make_tiny_deepseek(folder: Path) -> Path:
    """A DeepSeek-V3 of 2 layers, the second with routed experts, float32; tokenizer as the tiny Llama's."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    make_tiny_llama(folder)
    config = DeepseekV3Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(config).to(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "norm" not in name:
                    parameter.normal_(0.0, 0.12)
    model.save_pretrained(folder)
    # What SGLang asks of config.json and transformers does not write.
    file = folder / "config.json"
    document = json.loads(file.read_text())
    document |= {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    rope = document.get("rope_parameters") or {}
    document["rope_scaling"] = {**rope, "type": "yarn"}
    document["rope_theta"] = 10000.0
    file.write_text(json.dumps(document))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sglang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangRig]:
    folder = tmp_path_factory.mktemp("sglang-mla")
    async with running_sglang(make_tiny_deepseek(folder / "base"), folder / "adapters", SETTINGS) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def host(sglang: SglangRig) -> AsyncIterator[EngineHost]:
    async with sglang.host() as host:
        yield host


def expected_logprobs(base: Path, adapter: ServingAdapter | None, token_ids: tuple[int, ...]) -> torch.Tensor:
    from transformers import DeepseekV3ForCausalLM

    return merged_forward(DeepseekV3ForCausalLM, base, adapter, token_ids)[0]


async def test_base_with_latent_attention_equals_transformers(host: EngineHost, sglang: SglangRig) -> None:
    scored = await host.score(Generation(prompt=PROMPT, tenant="tenants/a", base=True), timeout_s=60)
    assert difference(scored.logprobs, expected_logprobs(sglang.base, None, PROMPT.token_ids)) < TOLERANCE


async def test_adapters_on_latent_attention_and_all_experts_equal_merged_weights(
    host: EngineHost, sglang: SglangRig, tmp_path: Path
) -> None:
    adapters = [
        make_serving_adapter(
            sglang.base, sglang.adapter_dir, tmp_path, seed=seed, rank=rank, targets=SETTINGS.target_modules
        )
        for seed, rank in ((1, 4), (2, 2))
    ]
    for adapter in adapters:
        await host.load(adapter.digest, adapter.folder, into_slot=True)
    answers = await asyncio.gather(*(ask(host, adapter.digest, max_new_tokens=12) for adapter in adapters))
    for adapter, answer in zip(adapters, answers, strict=True):
        whole = PROMPT.token_ids + answer.token_ids
        start = len(PROMPT.token_ids) - 1
        found, plain = (expected_logprobs(sglang.base, each, whole)[start:] for each in (adapter, None))
        assert difference(answer.logprobs, found) < TOLERANCE
        assert difference(answer.logprobs, plain) > 0.05
    await sglang.check_upload(ranks=[3, 1, 4, 2], mapped=[adapter.digest for adapter in adapters])


async def test_zero_adapter_is_bit_identical_to_the_base(host: EngineHost, sglang: SglangRig, tmp_path: Path) -> None:
    zero = make_serving_adapter(
        sglang.base, sglang.adapter_dir, tmp_path, seed=3, rank=4, zero=True, targets=SETTINGS.target_modules
    )
    await host.load(zero.digest, zero.folder)
    base, answer = await ask(host, max_new_tokens=16), await ask(host, zero.digest, max_new_tokens=16)
    assert (answer.token_ids, answer.logprobs) == (base.token_ids, base.logprobs)
