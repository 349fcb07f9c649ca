"""The layouts adapters come in, and how each becomes the packed one and back.

The packed layout is the pivot: a codec knows its own layout and this one, so that N layouts need N codecs. A codec is
right when delta W of every module and expert is the same before and after, which the tests ask with random A and B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from mint_core.errors import InvalidArgument
from mint_lora.config import LAYOUT_PACKED, LAYOUT_PEFT
from mint_lora.tensors import Array, TensorFile, TensorSource

__all__ = ["LAYOUTS", "Layout", "LoraName", "PackedTensor", "layout_named", "parse_lora_name"]

_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<after>[A-Za-z0-9_]+)")


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
    """``[r, in]`` or ``[out, r]``, for routed experts with the expert as first dimension."""
    modules: tuple[str, ...]
    """Names of the modules in the base, in expert order; one name for a dense module."""


class Layout(Protocol):
    """One codec."""

    @property
    def name(self) -> str:
        """As in :attr:`mint_lora.config.AdapterConfig.layout`."""
        ...

    def to_packed(self, file: TensorFile) -> Mapping[LoraName, PackedTensor]:
        """The file's tensors in packed layout, read when they are written.

        Raises :class:`InvalidArgument` naming the tensor that does not belong.
        """
        ...

    def from_packed(self, file: TensorFile) -> Mapping[LoraName, TensorSource]:
        """A packed file's tensors in this layout, read when they are written."""
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


class _Peft:
    """As PEFT saves dense modules, and each expert by itself: ``…mlp.experts.7.up_proj.lora_A.weight`` [r, in]."""

    name = LAYOUT_PEFT

    def to_packed(self, file: TensorFile) -> Mapping[LoraName, PackedTensor]:
        packed: dict[LoraName, PackedTensor] = {}
        stacks: dict[LoraName, dict[int, str]] = {}
        for tensor in file.header.tensors:
            name = parse_lora_name(tensor)
            match = _EXPERT.fullmatch(name.module)
            if match is None:
                _refuse_flattened(tensor, name)
                packed[name] = PackedTensor(file.source(tensor), (name.module,))
            else:
                stack = LoraName(f"{match['before']}.{match['after']}", name.side)
                stacks.setdefault(stack, {})[int(match["expert"])] = tensor
        num_experts = 1 + max((max(experts) for experts in stacks.values()), default=-1)
        for name, experts in stacks.items():
            missing = num_experts - len(experts)
            if missing:
                first = next(each for each in range(num_experts) if each not in experts)
                raise InvalidArgument(
                    f"{name} lacks {missing} of {num_experts} experts, expert {first} first: an adapter has all "
                    f"experts of a module or none",
                    field="weights",
                )
            if name in packed:
                raise InvalidArgument(f"{name} is there both as one tensor and by expert", field="weights")
            packed[name] = _stacked(file, [experts[each] for each in range(num_experts)])
        return packed

    def from_packed(self, file: TensorFile) -> Mapping[LoraName, TensorSource]:
        unpacked: dict[LoraName, TensorSource] = {}
        for tensor, info in file.header.tensors.items():
            name = parse_lora_name(tensor)
            if len(info.shape) == 2:
                unpacked[name] = file.source(tensor)
                continue
            before, _, after = name.module.rpartition(".")
            for expert in range(info.shape[0]):
                one = LoraName(f"{before}.{expert}.{after}", name.side)
                unpacked[one] = TensorSource(info.dtype, info.shape[1:], partial(_expert, file, tensor, expert))
        return unpacked


def _refuse_flattened(tensor: str, name: LoraName) -> None:
    # PEFT's target_parameters puts all experts into one matrix with A and B ordered differently; read as a dense
    # module it would serve wrong numbers.
    if name.module.rpartition(".")[2] in ("experts", "base_layer"):
        raise InvalidArgument(
            f"tensor {tensor!r} comes from PEFT's target_parameters, which is not supported; adapt modules instead",
            field="weights",
        )


def _expert(file: TensorFile, tensor: str, expert: int) -> tuple[Array]:
    return (file.array(tensor)[expert],)


def _stacked(file: TensorFile, tensors: list[str]) -> PackedTensor:
    infos = [file.header.tensors[each] for each in tensors]
    for info in infos:
        if (info.dtype, info.shape) != (infos[0].dtype, infos[0].shape):
            raise InvalidArgument(
                f"{info.name} is {info.dtype} {list(info.shape)}, expert 0 is {infos[0].dtype} "
                f"{list(infos[0].shape)}: the experts of a module must be alike",
                field="weights",
            )

    def read() -> Iterator[Array]:
        # Experts are the slowest dimension, so the stack's bytes are the experts' bytes one after the other.
        return (file.array(each) for each in tensors)

    source = TensorSource(infos[0].dtype, (len(tensors), *infos[0].shape), read)
    return PackedTensor(source, tuple(parse_lora_name(each).module for each in tensors))


class _Packed:
    """The serving layout itself; :func:`mint_lora.validation.validate_adapter` says when a file is in it."""

    name = LAYOUT_PACKED

    def to_packed(self, file: TensorFile) -> Mapping[LoraName, PackedTensor]:
        packed: dict[LoraName, PackedTensor] = {}
        for tensor, info in file.header.tensors.items():
            name = parse_lora_name(tensor)
            if _EXPERT.fullmatch(name.module):
                raise InvalidArgument(
                    f"tensor {tensor!r} of one expert does not belong into a packed file", field="weights"
                )
            num_experts = info.shape[0] if len(info.shape) == 3 else None
            packed[name] = PackedTensor(file.source(tensor), _modules(name.module, num_experts))
        return packed

    def from_packed(self, file: TensorFile) -> Mapping[LoraName, TensorSource]:
        return {name: each.source for name, each in self.to_packed(file).items()}


def _modules(module: str, num_experts: int | None) -> tuple[str, ...]:
    if num_experts is None:
        return (module,)
    before, _, after = module.rpartition(".")
    return tuple(f"{before}.{expert}.{after}" for expert in range(num_experts))


LAYOUTS: Mapping[str, Layout] = MappingProxyType({each.name: each for each in (_Peft(), _Packed())})
"""Every codec by its layout's name."""


def layout_named(name: str) -> Layout:
    """The codec of a layout, or :class:`InvalidArgument` naming those there are."""
    if name not in LAYOUTS:
        raise InvalidArgument(f"layout is {name[:80]!r}, known are {', '.join(sorted(LAYOUTS))}", field="layout")
    return LAYOUTS[name]
