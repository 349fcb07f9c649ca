"""Random adapters for tests, and what they do: delta W per module and expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mint_lora.config import AdapterConfig
from mint_lora.dtypes import DTYPES, from_float32, to_float32
from mint_lora.layouts import parse_lora_name
from mint_lora.tensors import TensorFile, TensorSource, write_safetensors

__all__ = ["BASE_DIGEST", "config_for", "delta_weights", "dense_shapes", "moe_shapes", "write_adapter"]

BASE_DIGEST = "sha256:" + "ba5e" * 16
_SAFETENSORS_NAMES = {each.common_name: each.name for each in DTYPES.values()}

Shapes = Mapping[str, tuple[int, int]]
"""(in_features, out_features) by module name."""


def dense_shapes(num_layers: int = 2, hidden: int = 12, inner: int = 20) -> dict[str, tuple[int, int]]:
    """The linear modules of a small Llama."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{attention}.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        shapes |= {f"{mlp}.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")}
        shapes[f"{mlp}.down_proj"] = (inner, hidden)
    return shapes


def moe_shapes(
    num_layers: int = 2, num_experts: int = 3, hidden: int = 12, inner: int = 8
) -> dict[str, tuple[int, int]]:
    """Attention and routed experts of a small Qwen3-MoE, each expert by itself."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(num_layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.{name}": (hidden, hidden)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        for expert in range(num_experts):
            mlp = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= {f"{mlp}.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")}
            shapes[f"{mlp}.down_proj"] = (inner, hidden)
    return shapes


def config_for(shapes: Shapes, **changes: object) -> AdapterConfig:
    """A configuration whose target modules are those of ``shapes``."""
    values: dict[str, object] = {
        "rank": 4,
        "alpha": 8.0,
        "target_modules": tuple({name.rpartition(".")[2] for name in shapes}),
        "base_model": "tiny",
        "base_digest": BASE_DIGEST,
        "dtype": "float32",
    }
    return AdapterConfig(**(values | changes))  # type: ignore[arg-type]


def write_adapter(path: Path, shapes: Shapes, config: AdapterConfig, *, seed: int = 0) -> dict[str, TensorSource]:
    """Write random non-zero A and B for every module in PEFT's layout; returns the tensors."""
    random = np.random.default_rng(seed)
    dtype = _SAFETENSORS_NAMES[config.dtype]
    tensors: dict[str, TensorSource] = {}
    for module, (in_features, out_features) in shapes.items():
        rank = config.rank_of(module)
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = from_float32(random.standard_normal(shape, dtype=np.float32), dtype)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = TensorSource.of(values, dtype)
    write_safetensors(path, tensors, config.to_metadata())
    return tensors


def delta_weights(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """scaling * B @ A by module and expert, [out, in], of a file in any layout with ``mint.adapter`` metadata."""
    deltas: dict[str, npt.NDArray[np.float64]] = {}
    with TensorFile(path) as file:
        config = AdapterConfig.from_metadata(file.header.metadata, file_name=path.name)
        for tensor, info in file.header.tensors.items():
            name = parse_lora_name(tensor)
            if name.side == "B":
                continue
            a = to_float32(file.array(tensor), info.dtype).astype(np.float64)
            b = to_float32(file.array(tensor.replace("lora_A", "lora_B")), info.dtype).astype(np.float64)
            if a.ndim == 2:
                deltas[name.module] = config.scaling_of(name.module) * (b @ a)
                continue
            before, _, after = name.module.rpartition(".")
            for expert in range(a.shape[0]):
                module = f"{before}.{expert}.{after}"
                deltas[module] = config.scaling_of(name.module) * (b[expert] @ a[expert])
    return deltas
