"""From what the trainer saves to the blob that is served, and back. Equal adapters give equal bytes in every
process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mint_core.errors import InvalidArgument, ResourceExhausted
from mint_lora.config import LAYOUT_PACKED, AdapterConfig
from mint_lora.dtypes import DTYPES, SAFETENSORS_NAMES, from_float32, to_float32
from mint_lora.header import TensorInfo, read_header
from mint_lora.layouts import LoraName, PackedTensor, layout_named
from mint_lora.stacks import expanded, whole, widened
from mint_lora.tensors import Array, TensorFile, TensorSource, is_written_as, write_safetensors
from mint_lora.validation import check_modules

__all__ = ["PackedAdapter", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A packed blob on disk."""

    path: Path
    digest: str
    """``sha256:<hex>`` of the blob: the identity of the revision."""
    size_bytes: int
    num_tensors: int
    config: AdapterConfig
    """As in the blob; rank and alpha are those that serve, patterns are resolved."""
    manifest: tuple[TensorInfo, ...]
    """The blob's tensors in the order of their bytes."""


def pack(
    source: Path,
    target: Path,
    config: AdapterConfig | None = None,
    *,
    max_size_bytes: int | None = None,
    expand_shared: bool = False,
    source_digest: str | None = None,
    durable: bool = True,
) -> PackedAdapter:
    """Write the adapter in ``source`` to ``target`` in serving layout.

    With ``source_digest``, which the caller has checked, a source that is byte for byte what would be written is
    checked as any other and then is the result itself; ``target`` is not written. Without ``durable`` it is not synced.

    ``config`` is for a file without ``mint.adapter`` metadata (an imported one). Routed experts are stacked; a matrix
    that all experts share is kept once unless ``expand_shared``. Engines know one rank and one scaling per adapter, so
    modules of lower rank get zero rows in A and zero columns in B, and where a module's scaling differs from
    ``config.scaling`` the ratio goes into its B, computed in float32 (exact for powers of two, else one rounding of the
    adapter's type). Tensors of a narrower type than ``config.dtype`` are widened to it without loss. Tensors are
    streamed.

    Raises :class:`InvalidArgument` naming the tensor or field that is wrong, also for infinities and NaN, and
    :class:`ResourceExhausted` before anything is written if the tensors would have more than ``max_size_bytes``.
    """
    with TensorFile(source) as file:
        if config is None:
            config = AdapterConfig.from_metadata(file.header.metadata, file_name=source.name)
        pivot = layout_named(config.layout).to_packed(file, config)
        modules = check_modules(pivot.tensors, pivot.config)
        file.check_finite()
        num_experts = max((each.num_experts or 0 for each in modules), default=0)
        target_config = _uniform(pivot.config).with_layout(LAYOUT_PACKED)
        tensors: dict[str, TensorSource] = {}
        is_packed = config.layout == LAYOUT_PACKED
        for name, each in pivot.tensors.items():
            fitted = _fitted(name, each, pivot.config, target_config)
            is_stack = expand_shared and len(fitted.shape) == 3
            tensors[str(name)] = expanded(fitted, num_experts) if is_stack else fitted
            is_packed &= tensors[str(name)] is each.source
        size_bytes = sum(each.size_bytes for each in tensors.values())
        if max_size_bytes is not None and size_bytes > max_size_bytes:
            raise ResourceExhausted(
                f"the adapter would have {size_bytes} bytes with rank {target_config.rank} for all its modules, "
                f"allowed are {max_size_bytes}"
            )
        metadata = target_config.to_metadata()
        if source_digest is not None and is_packed and is_written_as(file, tensors, metadata):
            manifest = tuple(file.header.tensors.values())
            return PackedAdapter(source, source_digest, file.header.size_bytes, len(tensors), target_config, manifest)
        written = write_safetensors(target, tensors, metadata, durable=durable)
    manifest = tuple(read_header(target).tensors.values())
    return PackedAdapter(target, written.digest, written.size_bytes, written.num_tensors, target_config, manifest)


def unpack(source: Path, target: Path, layout: str, *, architecture: str = "") -> AdapterConfig:
    """Write the packed adapter in ``source`` to ``target`` in another layout; returns its configuration.

    ``architecture`` of the base (``MixtralForCausalLM``) is for the per-expert layout of families whose checkpoints
    have names of their own.
    """
    with TensorFile(source) as file:
        config = AdapterConfig.from_metadata(file.header.metadata, file_name=source.name)
        if config.layout != LAYOUT_PACKED:
            raise InvalidArgument(
                f"{source.name} has layout {config.layout!r}, expected {LAYOUT_PACKED!r}", field="layout"
            )
        pivot = layout_named(LAYOUT_PACKED).to_packed(file, config)
        check_modules(pivot.tensors, pivot.config)
        unpacked = layout_named(layout).from_packed(file, config, architecture)
        config = unpacked.config.with_layout(layout)
        write_safetensors(target, unpacked.tensors, config.to_metadata())
    return config


def _uniform(config: AdapterConfig) -> AdapterConfig:
    """One rank and one scaling: the highest rank, and the scaling that modules without a pattern have."""
    if config.is_uniform:
        return config
    rank = max(config.rank, *config.rank_pattern.values()) if config.rank_pattern else config.rank
    return replace(config, rank=rank, alpha=config.scaling * rank, use_rslora=False, rank_pattern={}, alpha_pattern={})


def _fitted(name: LoraName, tensor: PackedTensor, old: AdapterConfig, new: AdapterConfig) -> TensorSource:
    """The tensor with the rank and scaling of ``new``."""
    source = widened(tensor.source, SAFETENSORS_NAMES[old.dtype])
    scalings = {old.scaling_of(module) for module in tensor.modules}
    if len(scalings) > 1:
        raise InvalidArgument(
            f"the experts of {name.module} have different scalings {sorted(scalings)}: engines know one for all",
            field="alpha_pattern",
        )
    factor = scalings.pop() / new.scaling if name.side == "B" and not old.is_uniform else 1.0
    axis = len(source.shape) - (2 if name.side == "A" else 1)
    if source.shape[axis] == new.rank and factor == 1.0:
        return source
    shape = tuple(new.rank if each == axis else size for each, size in enumerate(source.shape))

    def read() -> Iterator[Array]:
        flat = whole(source)
        fitted = np.zeros(shape, dtype=DTYPES[source.dtype].view)
        kept = tuple(slice(0, size) for size in source.shape)
        if factor == 1.0:
            fitted[kept] = flat
        else:
            fitted[kept] = from_float32(to_float32(flat, source.dtype) * np.float32(factor), source.dtype)
        return iter((fitted,))

    return TensorSource(source.dtype, shape, read)
