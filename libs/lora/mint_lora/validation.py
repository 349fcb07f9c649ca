"""Whether a file is an adapter that can be served on a base; asked before anything else looks at its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mint_core.errors import BaseModelMismatch, InvalidArgument, ResourceExhausted
from mint_lora.config import LAYOUT_PACKED, LAYOUT_SHARED_OUTER, MAX_RANK, AdapterConfig
from mint_lora.dtypes import SAFETENSORS_NAMES, holds
from mint_lora.layouts import LoraName, PackedTensor, layout_named
from mint_lora.tensors import TensorFile

__all__ = ["AdapterInfo", "ModuleInfo", "check_modules", "validate_adapter"]

_STACK = re.compile(r".*\.experts\.[A-Za-z0-9_]+")
_SERVED = (LAYOUT_PACKED, LAYOUT_SHARED_OUTER)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One adapted module."""

    name: str
    """Dotted name in the base; for a stack of experts without the expert's number."""
    rank: int
    in_features: int
    out_features: int
    num_experts: int | None
    """None for a dense module."""
    is_a_shared: bool = False
    """Whether all experts have one A, stored once: ``[1, r, in]``."""
    is_b_shared: bool = False
    """Whether all experts have one B, stored once: ``[1, out, r]``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the module's weight: out_features, in_features."""
        return self.out_features, self.in_features


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a validated file holds."""

    config: AdapterConfig
    modules: tuple[ModuleInfo, ...]
    """By name."""
    num_tensors: int
    num_parameters: int
    size_bytes: int


def validate_adapter(
    path: Path,
    *,
    expected_base_digest: str | None = None,
    max_rank: int = MAX_RANK,
    max_size_bytes: int | None = None,
    layout: str | None = None,
    check_finite: bool = True,
) -> AdapterInfo:
    """Check a weights file from its first byte to its last number.

    ``layout`` asks for one layout. Raises :class:`InvalidArgument` for a defect of the file, naming the tensor,
    :class:`BaseModelMismatch` if it fits another base and :class:`ResourceExhausted` above ``max_rank`` or
    ``max_size_bytes``.
    """
    if max_size_bytes is not None and path.is_file() and (size_bytes := path.stat().st_size) > max_size_bytes:
        raise ResourceExhausted(f"{path.name} has {size_bytes} bytes, allowed are {max_size_bytes}")
    with TensorFile(path) as file:
        header = file.header
        config = AdapterConfig.from_metadata(header.metadata, file_name=path.name)
        if layout is not None and config.layout != layout:
            raise InvalidArgument(f"{path.name} has layout {config.layout!r}, expected {layout!r}", field="layout")
        if expected_base_digest is not None and config.base_digest != expected_base_digest:
            raise BaseModelMismatch(
                f"{path.name} is an adapter for base {config.base_model} ({config.base_digest}), the base here is "
                f"{expected_base_digest}: train it on this base or serve it on its own",
                metadata={"adapter_base_digest": config.base_digest, "base_digest": expected_base_digest},
            )
        pivot = layout_named(config.layout).to_packed(file, config)
        modules = check_modules(pivot.tensors, pivot.config)
        highest = max(modules, key=lambda each: each.rank)
        if highest.rank > max_rank:
            raise ResourceExhausted(f"module {highest.name} has rank {highest.rank}, allowed is {max_rank}")
        if check_finite:
            file.check_finite()
        num_parameters = sum(each.num_elements for each in header.tensors.values())
        return AdapterInfo(config, modules, len(header.tensors), num_parameters, header.size_bytes)


def check_modules(packed: Mapping[LoraName, PackedTensor], config: AdapterConfig) -> tuple[ModuleInfo, ...]:
    """Check that A and B come in pairs and agree with each other and with ``config``; returns the modules by name.

    Types may be narrower than ``config.dtype`` where the layout is none that is served as it is.
    """
    names = sorted({name.module for name in packed})
    if not names:
        raise InvalidArgument("the adapter has no tensors", field="weights")
    modules = tuple(_module(name, packed, config) for name in names)
    config.check_targets(each.name for each in modules)
    experts = {each.num_experts for each in modules} - {None}
    if len(experts) > 1:
        raise InvalidArgument(f"the adapter's modules have different numbers of experts: {experts}", field="weights")
    return modules


def _module(name: str, packed: Mapping[LoraName, PackedTensor], config: AdapterConfig) -> ModuleInfo:
    sides: dict[str, PackedTensor] = {}
    for side in "AB":
        tensor = packed.get(LoraName(name, side))
        if tensor is None:
            raise InvalidArgument(f"module {name} has no lora_{side}: A and B come in pairs", field="weights")
        sides[side] = tensor
    a, b = sides["A"].source, sides["B"].source
    for side, source in (("A", a), ("B", b)):
        dtype = SAFETENSORS_NAMES[config.dtype]
        if source.dtype != dtype and (config.layout in _SERVED or not holds(dtype, source.dtype)):
            raise InvalidArgument(
                f"module {name}: lora_{side} is {source.dtype}, the configuration says {config.dtype}", field="dtype"
            )
        num_dims = 3 if _STACK.fullmatch(name) else 2
        if len(source.shape) != num_dims or 0 in source.shape:
            raise InvalidArgument(
                f"module {name}: lora_{side} has shape {list(source.shape)}, expected {num_dims} "
                "dimensions, none of them 0",
                field="weights",
            )
    rank, experts = a.shape[-2], {*a.shape[:-2], *b.shape[:-2]}
    # Experts that share one side have it once. Were both sides shared, nobody could tell how many experts there are.
    if len(a.shape) != len(b.shape) or b.shape[-1] != rank or len(experts - {1}) > 1:
        raise InvalidArgument(
            f"module {name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit; expected [r, in] and [out, "
            f"r], for experts with the same first dimension, or 1 where all share a matrix",
            field="weights",
        )
    if len(a.shape) == 2:
        _check_rank(sides["A"].modules, rank, config)
        return ModuleInfo(name, rank, a.shape[1], b.shape[0], None)
    num_experts = max(experts)
    _check_rank({*sides["A"].modules, *sides["B"].modules}, rank, config)
    return ModuleInfo(
        name, rank, a.shape[2], b.shape[1], num_experts, a.shape[0] < num_experts, b.shape[0] < num_experts
    )


def _check_rank(names: Iterable[str], rank: int, config: AdapterConfig) -> None:
    for name in names:
        if config.rank_of(name) != rank:
            raise InvalidArgument(
                f"module {name} has rank {rank}, the configuration says {config.rank_of(name)}", field="rank"
            )
