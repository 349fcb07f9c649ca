"""Adapters on more model families through the real engine: the slot map is read off whatever SGLang made of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mint_engine.sglang_settings import DEFAULT_TARGET_MODULES, SglangSettings
from support.engine_contract import PROMPT, ask
from support.merged_weights import difference, merged_forward
from support.serving_adapters import make_serving_adapter
from support.sglang_rig import running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.motion,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TOLERANCE = 1e-4
COMMON = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def qwen3() -> tuple[type[Any], Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM, Qwen3Config(**COMMON, intermediate_size=96, head_dim=32)


FAMILIES: dict[str, Callable[[], tuple[type[Any], Any]]] = {"Qwen3": qwen3}


def write_base(folder: Path, model_class: type[Any], config: Any) -> Path:
    """A random float32 base of the family, with the tiny Llama's tokenizer."""
    make_tiny_llama(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).to(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "norm" not in name:
                    parameter.normal_(0.0, 0.12)
    model.save_pretrained(folder)
    file = folder / "config.json"
    document = json.loads(file.read_text())
    # Where transformers 5 writes it and where SGLang looks for it.
    document["rope_theta"] = (document.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    file.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
async def test_adapters_equal_merged_weights_and_zero_equals_the_base(tmp_path: Path, family: str) -> None:
    model_class, config = FAMILIES[family]()
    base = write_base(tmp_path / "base", model_class, config)
    settings = SglangSettings(
        dtype="float32", max_lora_rank=4, num_slots=4, max_loaded_adapters=4, max_total_tokens=2048
    )

    def make(**options: Any) -> Any:
        return make_serving_adapter(
            base, tmp_path / "adapters", tmp_path / "work", targets=DEFAULT_TARGET_MODULES, **options
        )

    async with running_sglang(base, tmp_path / "adapters", settings) as rig, rig.host() as host:
        adapters = [make(seed=1, rank=4), make(seed=2, rank=3), make(seed=3, rank=4, zero=True)]
        await rig.check_upload(ranks=[4, 1, 3, 2])
        for adapter in adapters:
            await host.load(adapter.digest, adapter.folder, into_slot=True)
        await rig.check_upload(ranks=[], mapped=[adapter.digest for adapter in adapters])
        plain = await ask(host, max_new_tokens=12)
        answers = await asyncio.gather(*(ask(host, each.digest, max_new_tokens=12) for each in adapters[:2]))
        zero = await ask(host, adapters[2].digest, max_new_tokens=12)
    assert (zero.token_ids, zero.logprobs) == (plain.token_ids, plain.logprobs)
    for adapter, answer in zip([*adapters[:2], None], [*answers, plain], strict=True):
        whole = PROMPT.token_ids + answer.token_ids
        expected, without = (
            merged_forward(model_class, base, each, whole)[0][len(PROMPT.token_ids) - 1 :] for each in (adapter, None)
        )
        assert difference(answer.logprobs, expected) < TOLERANCE
        assert adapter is None or difference(answer.logprobs, without) > 0.05
