"""Shapes of a base model's linear modules, read from the headers of its weight files.

The headers know every architecture alike, and nothing can disagree with the weights the engine loads; modules that a
family calls by names of its own get those of the packed layout. Only headers are read; no tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_lora.families import canonical_module
from mint_lora.header import read_header

__all__ = ["BaseGeometry", "ExpertShape"]

_MAX_HEADER_BYTES = 128 << 20
_EXPERT_WEIGHT = re.compile(r"(?P<block>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
_FUSED_EXPERTS = re.compile(r"(?P<block>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One projection of a block of routed experts."""

    num_experts: int
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class BaseGeometry:
    """What adapters of one base may look like."""

    linears: dict[str, tuple[int, int]]
    """(out_features, in_features) by module name, such as ``model.layers.0.self_attn.q_proj``."""
    experts: dict[str, dict[str, ExpertShape]]
    """By block, such as ``model.layers.0.mlp.experts``, then by projection: gate_proj, up_proj, down_proj."""

    @classmethod
    def from_folder(cls, folder: Path) -> BaseGeometry:
        """Read all ``*.safetensors`` headers in ``folder``; :class:`FailedPrecondition` if there are none or one is
        bad."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FailedPrecondition(
                f"the base model folder {folder} has no .safetensors file; convert its weights to safetensors first"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                header = read_header(file, max_header_bytes=_MAX_HEADER_BYTES)
            except InvalidArgument as error:
                raise FailedPrecondition(f"the base model cannot be served: {error}") from error
            shapes.update({name: tensor.shape for name, tensor in header.tensors.items()})
        return cls.from_shapes(shapes)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> BaseGeometry:
        """Sort tensor shapes by name into dense modules and routed experts, per expert or fused."""
        linears: dict[str, tuple[int, int]] = {}
        experts: dict[str, dict[str, ExpertShape]] = {}
        for tensor, shape in shapes.items():
            name = canonical_module(tensor.removesuffix(".weight"))
            if match := _EXPERT_WEIGHT.fullmatch(name):
                if len(shape) == 2 and tensor.endswith(".weight"):
                    block = experts.setdefault(match["block"], {})
                    known = block.get(match["leaf"])
                    num_experts = max(known.num_experts if known else 0, int(match["expert"]) + 1)
                    block[match["leaf"]] = ExpertShape(num_experts, shape[0], shape[1])
            elif (match := _FUSED_EXPERTS.fullmatch(name)) and len(shape) == 3:
                block = experts.setdefault(match["block"], {})
                if match["leaf"] == "down_proj":
                    block["down_proj"] = ExpertShape(*shape)
                else:
                    half = ExpertShape(shape[0], shape[1] // 2, shape[2])
                    block["gate_proj"] = block["up_proj"] = half
            elif tensor.endswith(".weight") and len(shape) == 2:
                linears[name] = (shape[0], shape[1])
        return cls(linears, experts)
