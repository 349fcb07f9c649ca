"""Truth for what an engine should compute: transformers in float32 with the update added to the weights by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mint_lora import TensorFile
from support.serving_adapters import ServingAdapter

__all__ = ["difference", "merge", "merged_forward"]


def merge(model: torch.nn.Module, adapter: ServingAdapter) -> None:
    """Add the update of a packed ``adapter`` to the weights of a transformers model; its experts lie fused."""
    state = dict(model.named_parameters())
    with TensorFile(adapter.blob) as file:
        for name in file.header.tensors:
            if "lora_A" not in name:
                continue
            lora_a = torch.from_numpy(np.array(file.array(name)))
            lora_b = torch.from_numpy(np.array(file.array(name.replace("lora_A", "lora_B"))))
            update = adapter.config.scaling * (lora_b @ lora_a)
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            block, _, leaf = module.rpartition(".")
            if not block.endswith(".experts"):
                state[f"{module}.weight"] += update
            elif leaf == "down_proj":
                state[f"{block}.down_proj"] += update
            else:
                width = update.shape[-2]
                start = 0 if leaf == "gate_proj" else width
                state[f"{block}.gate_up_proj"][:, start : start + width] += update


def merged_forward(
    model_class: type[Any], base: Path, adapter: ServingAdapter | None, token_ids: tuple[int, ...], **options: bool
) -> tuple[torch.Tensor, Any]:
    """Log-probability of each token but the first, and all of the model's output."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter is not None:
            merge(model, adapter)
        output = model(torch.tensor([token_ids]), **options)
    logprobs = torch.log_softmax(output.logits[0, :-1], -1)
    return logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0], output


def difference(found: tuple[float, ...], expected: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((torch.tensor(found) - expected).abs().max())
