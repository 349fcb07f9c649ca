"""Reading and writing tensors of safetensors files as byte views, without torch and without whole copies in memory."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from mint_core.errors import InvalidArgument, ResourceExhausted
from mint_core.files import atomic_file
from mint_lora.dtypes import DTYPES, dtype_of_array, has_non_finite
from mint_lora.header import Header, TensorInfo, read_header

__all__ = ["Array", "TensorFile", "TensorSource", "WrittenFile", "is_written_as", "write_safetensors"]

Array: TypeAlias = npt.NDArray[np.generic]
"""A C-contiguous little-endian array of an element type's ``view`` (``uint16`` for bfloat16)."""

_ALIGNMENT_BYTES = 8
_CHECKED_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor that is produced only when it is written."""

    dtype: str
    """Safetensors name of the element type."""
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Array]]
    """Gives arrays whose bytes, one after the other, are the tensor's bytes in C order."""

    @classmethod
    def of(cls, array: Array, dtype: str | None = None) -> Self:
        """An array in memory; ``dtype`` is needed where numpy has no such type (``BF16`` over ``uint16``)."""
        dtype = dtype or dtype_of_array(array)
        if array.itemsize != DTYPES[dtype].size_bytes:
            raise TypeError(f"{dtype} has {DTYPES[dtype].size_bytes} bytes per element, the array has {array.itemsize}")
        return cls(dtype, array.shape, lambda: (array,))

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].size_bytes


class TensorFile:
    """An open, checked safetensors file; its arrays are read-only views of one memory map.

    The file must not be changed in place while it is open. Arrays stay usable after :meth:`close`: the map lives as
    long as a view of it does.
    """

    def __init__(self, path: Path) -> None:
        """Raises :class:`InvalidArgument` as :func:`mint_lora.header.read_header`, and :class:`ResourceExhausted` for a
        file that is larger than what can be mapped."""
        self.path = path
        self.header: Header = read_header(path)
        with path.open("rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, OverflowError) as error:
                raise ResourceExhausted(
                    f"{path.name} with {self.header.size_bytes} bytes cannot be mapped into memory: {error}"
                ) from error
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the map."""
        self._bytes = np.empty(0, dtype=np.uint8)

    def array(self, name: str) -> Array:
        """The tensor ``name`` as an array of its type's ``view``; :class:`KeyError` if there is none."""
        info = self.header.tensors[name]
        return _view(self._bytes, info)

    def source(self, name: str) -> TensorSource:
        """The tensor ``name``, to be written elsewhere."""
        info = self.header.tensors[name]
        return TensorSource(info.dtype, info.shape, lambda: (self.array(name),))

    def begins_with(self, data: bytes) -> bool:
        """Whether these are the file's first bytes."""
        return self._bytes[: len(data)].tobytes() == data

    def check_finite(self) -> None:
        """Raise :class:`InvalidArgument` naming the first tensor that holds an infinity or NaN. Reads every byte."""
        for run in self._runs():
            dtype = run[0].dtype
            values = _view(
                self._bytes, replace(run[0], end=run[-1].end, shape=(sum(each.num_elements for each in run),))
            )
            for start in range(0, len(values), _CHECKED_ELEMENTS):
                if has_non_finite(values[start : start + _CHECKED_ELEMENTS], dtype):
                    bad = next(each.name for each in run if has_non_finite(self.array(each.name), dtype))
                    raise InvalidArgument(
                        f"{self.path.name}: tensor {bad!r} holds an infinity or NaN; the training step that made it "
                        "diverged",
                        field="weights",
                    )

    def _runs(self) -> list[list[TensorInfo]]:
        """Neighbours of one element type together: an adapter has tens of thousands of small tensors of one type."""
        runs: list[list[TensorInfo]] = []
        for info in self.header.tensors.values():
            if runs and runs[-1][0].dtype == info.dtype:
                runs[-1].append(info)
            else:
                runs.append([info])
        return runs


def _view(data: npt.NDArray[np.uint8], info: TensorInfo) -> Array:
    raw = data[info.begin : info.end]
    dtype = np.dtype(DTYPES[info.dtype].view)
    # A header whose length is no multiple of 8 is legal; views of odd addresses are not for every consumer.
    if info.begin % dtype.itemsize:
        raw = raw.copy()
        raw.flags.writeable = False
    return raw.view(dtype).reshape(info.shape)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What was written."""

    digest: str
    """``sha256:<hex>`` of the whole file."""
    size_bytes: int
    num_tensors: int


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Array | TensorSource],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> WrittenFile:
    """Write a safetensors file whose bytes depend on the arguments' values only, whole or not at all.

    Without ``durable`` it is not synced: for a file on its way to somewhere else.

    Tensors lie by falling element size, then by name; the header is compact JSON with sorted metadata, padded with
    spaces so that data begins at a multiple of 8. The tensors are streamed: at most one array of a
    :class:`TensorSource` is in memory.
    """
    sources = {
        name: each if isinstance(each, TensorSource) else TensorSource.of(each) for name, each in tensors.items()
    }
    names = _in_order(sources)
    hasher = hashlib.sha256()
    with atomic_file(path, durable=durable) as file:

        def write(data: bytes | memoryview) -> int:
            file.write(data)
            hasher.update(data)
            return len(data)

        size_bytes = write(_header(names, sources, metadata or {}))
        for name in names:
            written = 0
            for array in sources[name].read():
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                written += write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
            if written != sources[name].size_bytes:
                raise ValueError(f"tensor {name!r} gave {written} bytes, announced were {sources[name].size_bytes}")
            size_bytes += written
    return WrittenFile(f"sha256:{hasher.hexdigest()}", size_bytes, len(names))


def is_written_as(file: TensorFile, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> bool:
    """Whether :func:`write_safetensors` would write the bytes of ``file``, if ``tensors`` are its own, as they are."""
    return file.begins_with(_header(_in_order(tensors), tensors, metadata))


def _in_order(sources: Mapping[str, TensorSource]) -> list[str]:
    return sorted(sources, key=lambda name: (-DTYPES[sources[name].dtype].size_bytes, name))


def _header(names: list[str], sources: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    at = 0
    for name in names:
        source = sources[name]
        end = at + source.size_bytes
        document[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
