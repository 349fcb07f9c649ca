"""The pivot every layout is turned into: canonical names, experts stacked, and a configuration in those names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mint_core.errors import InvalidArgument
from mint_lora.config import AdapterConfig
from mint_lora.tensors import TensorFile, TensorSource

__all__ = ["EXPERT_MODULE", "Layout", "LoraName", "PackedTensor", "Pivot", "Unpacked", "parse_lora_name"]

EXPERT_MODULE = re.compile(r"(?P<before>.*\.experts)\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<after>[A-Za-z0-9_]+)")
"""Name of a module that belongs to one routed expert."""

_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True, order=True)
class LoraName:
    """The parts of a tensor's name."""

    module: str
    """Dotted name in the base: ``model.layers.0.self_attn.q_proj``."""
    side: str
    """``A`` or ``B``."""

    def __str__(self) -> str:
        return f"{_PREFIX}{self.module}.lora_{self.side}.weight"


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of the packed layout and the modules it holds."""

    source: TensorSource
    """``[r, in]`` or ``[out, r]``, for routed experts with the expert as first dimension, which is 1 where all experts
    share the matrix."""
    modules: tuple[str, ...]
    """Canonical names by which the configuration is asked for rank and scaling: one for a dense module and for a stack
    that was one in its source, else those of the experts in their order."""


@dataclass(frozen=True, slots=True)
class Pivot:
    """An adapter in packed layout, to be written or looked at."""

    tensors: Mapping[LoraName, PackedTensor]
    config: AdapterConfig
    """In canonical names; its ``layout`` is still the source's."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An adapter in some layout, to be written."""

    tensors: Mapping[str, TensorSource]
    """By name in the file."""
    config: AdapterConfig


class Layout(Protocol):
    """One codec."""

    @property
    def name(self) -> str:
        """As in :attr:`mint_lora.config.AdapterConfig.layout`."""
        ...

    def to_packed(self, file: TensorFile, config: AdapterConfig) -> Pivot:
        """The file's tensors in packed layout, read when they are written.

        Raises :class:`InvalidArgument` naming the tensor that does not belong.
        """
        ...

    def from_packed(self, file: TensorFile, config: AdapterConfig, architecture: str) -> Unpacked:
        """A packed file's tensors in this layout, read when they are written; ``architecture`` may be empty.

        Raises :class:`InvalidArgument` where this layout cannot say what the adapter does.
        """
        ...


def parse_lora_name(name: str) -> LoraName:
    """The parts of a tensor's name, if it is one of LoRA's A and B matrices, else :class:`InvalidArgument`."""
    match = _LORA.fullmatch(name)
    if match is None:
        raise InvalidArgument(
            f"tensor {name[:200]!r} is no LoRA matrix: expected base_model.model.<module>.lora_A.weight or "
            f"lora_B.weight (DoRA vectors, biases, embeddings and fully trained modules are not supported)",
            field="weights",
        )
    return LoraName(match["module"], match["side"])
