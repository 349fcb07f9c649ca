"""Reads a packed adapter as views into one mapped file.

SGLang's own reader asks for one tensor after the other; the few hundred calls cost more than the bytes. Here the header
is checked as strictly as everywhere in MinT (:func:`mint_lora.header.read_header`), the file is mapped once, and the
tensors are views into it: their bytes are touched for the first time when they are copied into a slot. The file must
not change while it is mapped; the loader publishes folders by rename and never writes into one.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mint_core.errors import InvalidArgument
from mint_lora.folders import CONFIG_NAME, WEIGHTS_NAME
from mint_lora.header import Header, read_header

__all__ = ["PackedWeights", "read_packed_weights"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_TENSORS = 16_384
"""Per-expert files have more and gain nothing here."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A packed adapter, mapped."""

    header: Header
    """Equal headers are one object, so it stands for the names and shapes of the tensors."""
    dtype: torch.dtype
    """Of every tensor."""
    tensors: dict[str, Tensor]
    """By name: views into the file."""


def read_packed_weights(folder: Path) -> PackedWeights | None:
    """Map the weights in ``folder``.

    ``None`` where it is not ours to read: a folder with other files than the two of a packed adapter, element types
    without a torch type of their own, or more tensors than packing leaves. Raises :class:`InvalidArgument` for a file
    that is no valid safetensors file or changes while it is read.
    """
    weights = folder / WEIGHTS_NAME
    if not folder.is_dir() or {entry.name for entry in os.scandir(folder)} != {CONFIG_NAME, WEIGHTS_NAME}:
        return None
    if not stat.S_ISREG(weights.lstat().st_mode):
        return None
    header = read_header(weights)
    dtypes = {tensor.dtype for tensor in header.tensors.values()}
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys() or len(header.tensors) > _MAX_TENSORS:
        return None
    dtype = _DTYPES[dtypes.pop()]
    return PackedWeights(header, dtype, _map(weights, header, dtype))


def _map(weights: Path, header: Header, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = header.tensors.values()
    data_begin = next(iter(tensors)).begin
    with weights.open("rb") as file:
        if os.fstat(file.fileno()).st_size != header.size_bytes:
            raise InvalidArgument(f"{weights.name} changed while it was read; fetch it again", field="weights")
        if data_begin % dtype.itemsize:
            # Legal, and never written by MinT; torch views need alignment.
            file.seek(data_begin)
            flat = torch.frombuffer(bytearray(file.read()), dtype=dtype)
        else:
            # Private and writable because torch warns of read-only buffers; nothing writes, so no page is copied.
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            flat = torch.frombuffer(mapped, dtype=dtype, offset=data_begin)
    # One call for each tensor: a slice and a view of it are two.
    return {
        tensor.name: flat.as_strided(
            tensor.shape, _strides(tensor.shape), (tensor.begin - data_begin) // dtype.itemsize
        )
        for tensor in tensors
    }


@functools.lru_cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    return (*itertools.accumulate(shape[:0:-1], int.__mul__, initial=1),)[::-1] if shape else ()
