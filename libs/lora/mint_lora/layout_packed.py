"""The packed layout, and its shared-outer form: experts stacked, a shared side of them once."""

from __future__ import annotations

from collections.abc import Mapping

from mint_core.errors import InvalidArgument
from mint_lora.config import LAYOUT_PACKED, LAYOUT_SHARED_OUTER, AdapterConfig
from mint_lora.families import canonical_module
from mint_lora.pivot import EXPERT_MODULE, LoraName, PackedTensor, Pivot, Unpacked, parse_lora_name
from mint_lora.stacks import expanded, shared
from mint_lora.tensors import TensorFile, TensorSource

__all__ = ["PackedLayout", "SharedOuterLayout", "is_packed_name", "packed_tensors"]

_SHARED_SIDES = {("gate_proj", "A"), ("up_proj", "A"), ("down_proj", "B")}


def is_packed_name(tensor: str) -> bool:
    """Whether a tensor of PEFT's has the same name, and so is the same, in the packed layout."""
    module = parse_lora_name(tensor).module
    return EXPERT_MODULE.fullmatch(module) is None and canonical_module(module) == module


def packed_tensors(file: TensorFile) -> dict[LoraName, PackedTensor]:
    """The tensors of a file in packed layout; :class:`InvalidArgument` for a tensor of a single expert."""
    packed: dict[LoraName, PackedTensor] = {}
    for tensor in file.header.tensors:
        name = parse_lora_name(tensor)
        if EXPERT_MODULE.fullmatch(name.module):
            raise InvalidArgument(
                f"tensor {tensor!r} of one expert does not belong into a packed file", field="weights"
            )
        packed[name] = PackedTensor(file.source(tensor), (name.module,))
    return packed


class PackedLayout:
    """The serving layout itself; :func:`mint_lora.validation.validate_adapter` says when a file is in it."""

    name = LAYOUT_PACKED

    def to_packed(self, file: TensorFile, config: AdapterConfig) -> Pivot:
        return Pivot(packed_tensors(file), config)

    def from_packed(self, file: TensorFile, config: AdapterConfig, architecture: str) -> Unpacked:  # noqa: ARG002
        tensors: Mapping[str, TensorSource] = {str(name): each.source for name, each in packed_tensors(file).items()}
        return Unpacked(tensors, config)


class SharedOuterLayout:
    """The packed layout with A of gate and up, and B of down, once for all experts.

    Every adapter can be read; only one whose experts really agree in these matrices can be written.
    """

    name = LAYOUT_SHARED_OUTER

    def to_packed(self, file: TensorFile, config: AdapterConfig) -> Pivot:
        return Pivot(packed_tensors(file), config)

    def from_packed(self, file: TensorFile, config: AdapterConfig, architecture: str) -> Unpacked:  # noqa: ARG002
        packed = packed_tensors(file)
        num_experts = max((each.source.shape[0] for each in packed.values() if len(each.source.shape) == 3), default=0)
        tensors: dict[str, TensorSource] = {}
        for name, each in packed.items():
            tensors[str(name)] = each.source
            if len(each.source.shape) != 3:
                continue
            if (name.module.rpartition(".")[2], name.side) not in _SHARED_SIDES:
                tensors[str(name)] = expanded(each.source, num_experts)
                continue
            found = shared(each.source)
            if found is None:
                raise InvalidArgument(
                    f"{name} differs between experts: only an adapter whose experts share A of gate and up and B of "
                    f"down can be written as {self.name}; ask for {LAYOUT_PACKED}",
                    field="layout",
                )
            tensors[str(name)] = found
        return Unpacked(tensors, config)
