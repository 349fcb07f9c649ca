"""What codecs do with stacks of experts: take one out, repeat a shared one, cut and join. All of it when read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from mint_lora.dtypes import from_float32, to_float32
from mint_lora.tensors import Array, TensorSource

__all__ = ["at_expert", "expanded", "same", "shared", "transformed", "whole", "widened"]


def whole(source: TensorSource) -> Array:
    """The tensor as one array; a view where the source gives one array."""
    parts = [each.reshape(-1) for each in source.read()]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(source.shape)


def at_expert(source: TensorSource, expert: int) -> TensorSource:
    """One expert of a stack; of a shared one, the one there is."""
    index = 0 if source.shape[0] == 1 else expert
    return TensorSource(source.dtype, source.shape[1:], lambda: (whole(source)[index],))


def expanded(source: TensorSource, num_experts: int) -> TensorSource:
    """A stack with one matrix per expert."""
    if source.shape[0] == num_experts:
        return source

    def read() -> Iterator[Array]:
        one = whole(source)
        return (one for _ in range(num_experts))

    return replace(source, shape=(num_experts, *source.shape[1:]), read=read)


def shared(source: TensorSource) -> TensorSource | None:
    """A stack of one matrix, if all experts have the same, bit for bit. Reads the tensor."""
    if source.shape[0] == 1:
        return source
    stack = whole(source)
    if not np.array_equal(_bits(stack[1:]), np.broadcast_to(_bits(stack[:1]), stack[1:].shape)):
        return None
    return replace(source, shape=(1, *source.shape[1:]), read=lambda: (whole(source)[:1],))


def same(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors are the same, bit for bit. Reads them."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and np.array_equal(
        _bits(whole(one)), _bits(whole(other))
    )


def transformed(source: TensorSource, shape: tuple[int, ...], change: Callable[[Array], Array]) -> TensorSource:
    """``change`` of the whole tensor, which gives an array of ``shape``."""
    return TensorSource(source.dtype, shape, lambda: (change(whole(source)),))


def widened(source: TensorSource, dtype: str) -> TensorSource:
    """The same values in a type that holds them all (:func:`mint_lora.dtypes.holds`)."""
    if source.dtype == dtype:
        return source

    def read() -> Iterator[Array]:
        return (from_float32(to_float32(each, source.dtype), dtype) for each in source.read())

    return TensorSource(dtype, source.shape, read)


def _bits(array: Array) -> Array:
    # NaN is unequal to itself, -0.0 equal to 0.0: only bits say whether two matrices are one.
    return array.view(f"<u{array.itemsize}")
