"""Tiny random base models, written as plain Hugging Face folders.

They have the architecture of the real thing (Llama; Qwen3 with routed experts), random weights, a byte-level BPE
tokenizer trained in this process and a ChatML chat template, so that trainer and engine load them as they load any
other base. A folder is a pure function of its arguments: the same seed gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mint_engine.sglang_plugin.import_gaps import ensure_torchvision_imports

# Where torchvision is linked against CUDA and torch is a CPU build, transformers' models cannot be imported before
# this.
ensure_torchvision_imports()

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["CHAT_TEMPLATE", "make_tiny_llama", "make_tiny_qwen3_moe"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "A policy is one named behaviour over one base model.",
    "user\nassistant\nsystem\nWhat is the answer? The answer is forty two.",
    "Low-rank adaptation keeps the base frozen and learns two thin matrices.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000",
]
_VOCAB_SIZE = 384
_MAX_POSITIONS = 512
# Widths below are multiples of 32: SGLang pads others on a CPU and then has no LoRA slots of the true width.


def make_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of 2 layers, hidden size 64, 4 heads over 2 key-value heads, float32, to ``folder``."""
    tokenizer = _make_tokenizer()
    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    return _write(folder, LlamaForCausalLM, config, tokenizer, seed)


def make_tiny_qwen3_moe(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen3-MoE of 2 layers, hidden size 64, 8 experts of width 32, top 2, float32, to ``folder``."""
    tokenizer = _make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    return _write(folder, Qwen3MoeForCausalLM, config, tokenizer, seed)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=_MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: LlamaConfig | Qwen3MoeConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
        # The default initialisation (std 0.02) makes nearly uniform logits; wider weights make argmax decisive.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "norm" not in name:
                    parameter.normal_(0.0, 0.12)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
