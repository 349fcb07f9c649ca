"""The real SGLang on multi-head latent attention, which it gets silently wrong on a CPU without the plugin."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from mint_engine.host import Generation
from mint_engine.sglang_settings import SglangSettings
from support.engine_contract import PROMPT
from support.sglang_rig import running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


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


async def test_base_with_latent_attention_equals_transformers(tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    base = make_tiny_deepseek(tmp_path / "base")
    settings = SglangSettings(
        dtype="float32",
        max_lora_rank=4,
        num_slots=2,
        max_loaded_adapters=2,
        max_total_tokens=2048,
        target_modules=("o_proj",),
    )
    async with running_sglang(base, tmp_path / "adapters", settings) as rig, rig.host() as host:
        scored = await host.score(Generation(prompt=PROMPT, tenant="tenants/a", base=True), timeout_s=60)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        logits = model(torch.tensor([PROMPT.token_ids])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(PROMPT.token_ids[1:])[:, None])[:, 0]
    assert float((torch.tensor(scored.logprobs) - expected).abs().max()) < 1e-4
