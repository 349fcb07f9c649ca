"""Tiny random models of every family that adapters are made for, in memory, and adapters made on them by PEFT."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from mint_engine.sglang_plugin.import_gaps import ensure_torchvision_imports

# Where torchvision is linked against CUDA and torch is a CPU build, transformers' models cannot be imported before
# this.
ensure_torchvision_imports()

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    GlmMoeDsaConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

__all__ = ["ARCHITECTURES", "PeftModel", "adapted", "logits", "merged", "tiny_base"]

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEPSEEK = (
    _COMMON
    | _MLA
    | {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 20,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "topk_group": 1,
    }
)
_DSA = _DEEPSEEK | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": []}
_CONFIGS: dict[str, PretrainedConfig] = {
    "LlamaForCausalLM": LlamaConfig(**_COMMON),
    "Qwen3ForCausalLM": Qwen3Config(**_COMMON, head_dim=8),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(**_COMMON, **_MOE, head_dim=8),
    "MixtralForCausalLM": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "DeepseekV2ForCausalLM": DeepseekV2Config(**_DEEPSEEK),
    "DeepseekV3ForCausalLM": DeepseekV3Config(**_DEEPSEEK),
    "DeepseekV32ForCausalLM": DeepseekV32Config(**_DSA),
    "GlmMoeDsaForCausalLM": GlmMoeDsaConfig(**_DSA),
}

ARCHITECTURES = tuple(_CONFIGS)


@functools.cache
def _base(architecture: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_CONFIGS[architecture]).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.12)
    return model


def tiny_base(architecture: str) -> PreTrainedModel:
    """A model of 2 layers and 4 experts in float32; the same weights at every call."""
    return copy.deepcopy(_base(architecture))


def adapted(architecture: str, seed: int = 1, **options: object) -> PeftModel:
    """A base with a random adapter, A and B both not zero; ``options`` are those of ``LoraConfig``."""
    values = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(tiny_base(architecture), LoraConfig(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    """Of 2 sequences of 12 tokens, float32."""
    with torch.no_grad():
        found: Tensor = model(torch.arange(1, 25).reshape(2, 12)).logits
    return found


def merged(architecture: str, deltas: dict[str, Tensor]) -> PreTrainedModel:
    """The base with delta W [experts or 1, out, in] by canonical module name added to its weights."""
    model = tiny_base(architecture)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module, delta in deltas.items():
            block, _, leaf = module.rpartition(".")
            if not block.endswith(".experts"):
                parameters[f"{module}.weight"] += delta[0]
            elif leaf == "down_proj":
                parameters[module] += delta
            else:
                fused = parameters[f"{block}.gate_up_proj"]
                half = fused.shape[1] // 2
                fused[:, :half] += delta if leaf == "gate_proj" else 0
                fused[:, half:] += delta if leaf == "up_proj" else 0
    return model
