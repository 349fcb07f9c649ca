"""Adapters as the engine is shown them: random ones on a given base, packed and laid out in folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mint_core.base_model import digest_of_folder
from mint_engine.base_geometry import BaseGeometry
from mint_lora import AdapterConfig, pack, write_peft_folder, write_safetensors, write_serving_folder
from mint_lora.config import LAYOUT_PEFT, LAYOUT_SHARED_OUTER

__all__ = ["ServingAdapter", "adapter_shapes", "make_serving_adapter"]

_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ServingAdapter:
    """One adapter in all its forms."""

    digest: str
    folder: str
    """Name of its folder below the adapter directory."""
    blob: Path
    peft_folder: Path | None
    """For transformers + PEFT; None for adapters on routed experts."""
    config: AdapterConfig


def adapter_shapes(base: Path, targets: tuple[str, ...] = _DENSE) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every target module, each expert by itself."""
    geometry = BaseGeometry.from_folder(base)
    shapes = {
        name: (in_features, out_features)
        for name, (out_features, in_features) in geometry.linears.items()
        if name.rpartition(".")[2] in targets
    }
    for block, experts in geometry.experts.items():
        for leaf, shape in experts.items():
            if leaf in targets:
                for expert in range(shape.num_experts):
                    shapes[f"{block}.{expert}.{leaf}"] = (shape.in_features, shape.out_features)
    return shapes


def make_serving_adapter(
    base: Path,
    adapter_dir: Path,
    work: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    scaling: float = 0.5,
    zero: bool = False,
    targets: tuple[str, ...] = _DENSE,
    base_digest: str | None = None,
    shared_experts: bool = False,
) -> ServingAdapter:
    """Write a float32 adapter with random A and B (std 0.12, as the tiny bases' weights; B zero with ``zero``).

    ``adapter_dir`` gets the folder the engine reads, ``work`` the blob and a PEFT folder. With ``shared_experts`` all
    experts of a block have one A of gate and up and one B of down, and the blob stores these once.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    shapes = adapter_shapes(base, targets)
    for module, (in_features, out_features) in shapes.items():
        lora_a = random.standard_normal((rank, in_features), dtype=np.float32) * np.float32(0.12)
        lora_b = random.standard_normal((out_features, rank), dtype=np.float32) * np.float32(0.0 if zero else 0.12)
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b
    if shared_experts:
        tensors = _shared(tensors)
    config = AdapterConfig(
        rank=rank,
        alpha=scaling * rank,
        target_modules=tuple({module.rpartition(".")[2] for module in shapes}),
        base_model=base.name,
        base_digest=base_digest or digest_of_folder(base, use_cache=False).digest,
        dtype="float32",
        layout=LAYOUT_SHARED_OUTER if shared_experts else LAYOUT_PEFT,
    )
    work.mkdir(parents=True, exist_ok=True)
    adapter_dir.mkdir(parents=True, exist_ok=True)
    source = work / f"source-{seed}-{rank}-{zero}-{shared_experts}.safetensors"
    write_safetensors(source, tensors, config.to_metadata())
    packed = pack(source, work / f"blob-{seed}-{rank}-{zero}-{shared_experts}.safetensors")
    folder = packed.digest.removeprefix("sha256:")
    write_serving_folder(packed.path, adapter_dir / folder)
    peft_folder = None
    if not any(".experts." in module for module in shapes):
        peft_folder = work / f"peft-{folder[:16]}"
        write_peft_folder(packed.path, peft_folder)
    return ServingAdapter(packed.digest, folder, packed.path, peft_folder, packed.config)


def _shared(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts stacked, of a side that they share only the first."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(array)
    found = {}
    for name, arrays in stacks.items():
        is_shared = bool(re.search(r"\.experts\.(?:(?:gate|up)_proj\.lora_A|down_proj\.lora_B)\.", name))
        found[name] = np.stack(arrays[:1] if is_shared else arrays) if ".experts." in name else arrays[0]
    return found
