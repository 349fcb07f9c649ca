"""Base models of a given size with random weights, made once into the cache: time and bytes count here, not sense."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from mint_core.base_model import cache_folder
from support.tiny_models import make_tiny_qwen3_moe

__all__ = ["DENSE_LARGE", "MOE", "NARROW", "WIDE", "BaseShape", "make_base"]


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What a base is made from."""

    name: str
    family: str
    """``qwen3`` or ``qwen3_moe``."""
    fields: Mapping[str, Any]
    """Of its config.json, apart from the tokens: the vocabulary is a small tokenizer's."""


DENSE_LARGE: Final = BaseShape(
    "random-qwen3-1b4",
    "qwen3",
    {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
)
"""Qwen3-1.7B without its vocabulary: 1.41 billion parameters."""

MOE: Final = BaseShape(
    "random-qwen3-moe-1b",
    "qwen3_moe",
    {
        "hidden_size": 1024,
        "moe_intermediate_size": 384,
        "intermediate_size": 3072,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
)
"""Half of Qwen3-30B-A3B's widths and experts, a quarter of its layers: 0.98 billion parameters."""

NARROW: Final = BaseShape(
    "random-qwen3-60m",
    "qwen3",
    {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 9,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
)
"""62 million parameters in narrow layers, beside which a LoRA of rank 8 is large."""

WIDE: Final = BaseShape(
    "random-qwen3-1b7-3-layers",
    "qwen3",
    {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
)
"""Three of the 28 layers of Qwen3-1.7B, so that a LoRA is as large beside its layer as there."""


def make_base(shape: BaseShape, *, seed: int = 0, max_shard_size: str = "512MB") -> Path:
    """The folder of a base in bfloat16; the same shape and seed are the same bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = cache_folder() / "bench" / "bases" / f"{shape.name}-{seed}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_tiny_qwen3_moe(partial)  # for its tokenizer
    (partial / "model.safetensors").unlink()
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }[shape.family]
    tokens = Qwen3MoeConfig.from_pretrained(partial)
    config = config_class(
        vocab_size=tokens.vocab_size,
        max_position_embeddings=tokens.max_position_embeddings,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        **({"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []} if "moe" in shape.family else {}),
        **shape.fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = model_class(config)
        finally:
            torch.set_default_dtype(default)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    partial.rename(folder)
    return folder
