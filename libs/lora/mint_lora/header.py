"""A strict reader of safetensors headers, the part of a file that is checked before anything is believed.

The format: eight bytes little-endian length, that many bytes of JSON, then the tensors' bytes. Strict means: known
element types only, every range exactly as long as its shape says, ranges that cover the data without gap or overlap, no
name twice, and a file that ends where the last range ends. No tensor byte is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from mint_core.errors import InvalidArgument
from mint_lora.dtypes import DTYPES

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "Header", "TensorInfo", "read_header"]

MAX_HEADER_BYTES = 32 * 1024 * 1024
"""Longest header believed; 48 layers of 128 experts, each with its own tensors, take about 6 MB."""

MAX_TENSORS = 250_000
"""Most tensors in one file."""

_MAX_KEPT = 16
_MAX_KEPT_BYTES = 256 * 1024
_MAX_DIMS = 8
_MAX_NAME_CHARS = 512
_MARKS = (b"{", b"[", b",")
_MAX_STRAY_MARKS = 1000
# Possessive, so that nothing is remembered for going back.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_METADATA = "__metadata__"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it with pickled objects inside"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a git-lfs pointer; fetch the file itself"),
    (b"<", "a web page or XML document"),
    (b"{", "a JSON document"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header tells it, checked."""

    name: str
    dtype: str
    """Safetensors name of the element type, e.g. ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the beginning of the file."""
    end: int
    """One after the last byte."""

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's bytes."""
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """A checked header; files whose headers and sizes are the same share one."""

    tensors: Mapping[str, TensorInfo]
    """By name, in the order of their bytes."""
    metadata: Mapping[str, str]
    """The ``__metadata__`` strings; empty if there are none."""
    size_bytes: int
    """Length of the whole file."""


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> Header:
    """Read and check the header of ``path``.

    Raises :class:`InvalidArgument` that names the file and the first defect found; a pickle or another known format is
    refused by its name.
    """
    try:
        with path.open("rb") as file:
            return _read(file, max_header_bytes, max_tensors)
    except OSError as error:
        raise InvalidArgument(f"cannot read {path.name}: {error.strerror}", field="path") from error
    except _Defect as defect:
        raise InvalidArgument(f"{path.name} is not a valid safetensors file: {defect}", field="weights") from None


class _Defect(Exception):
    """What is wrong with a file, to be told with its name."""


def _read(file: BinaryIO, max_header_bytes: int, max_tensors: int) -> Header:
    size_bytes = os.fstat(file.fileno()).st_size
    start = file.read(32)
    if len(start) < 8:
        _refuse_by_kind(start, f"it has {size_bytes} bytes, a safetensors file has at least 8")
    (header_bytes,) = struct.unpack("<Q", start[:8])
    if header_bytes < 2 or header_bytes > size_bytes - 8 or start[8:9] != b"{":
        defect = f"its first bytes announce a header of {header_bytes} bytes in a file of {size_bytes}"
        _refuse_by_kind(start, defect)
    if header_bytes > max_header_bytes:
        raise _Defect(f"its header has {header_bytes} bytes, allowed are {max_header_bytes}")
    file.seek(8)
    text = file.read(header_bytes)
    check = _check_once if header_bytes <= _MAX_KEPT_BYTES else _check
    return check(text, size_bytes, max_tensors)


def _check(text: bytes, size_bytes: int, max_tensors: int) -> Header:
    _check_growth(text, max_tensors)
    document = _parse(text)
    metadata = _metadata(document.pop(_METADATA, {}))
    if len(document) > max_tensors:
        raise _Defect(f"it has {len(document)} tensors, allowed are {max_tensors}")
    data_begin = 8 + len(text)
    tensors = sorted(
        (_tensor(key, value, data_begin) for key, value in document.items()), key=lambda each: (each.begin, each.end)
    )
    at = data_begin
    for tensor in tensors:
        if tensor.begin != at:
            defect = "overlaps the tensor before it" if tensor.begin < at else "leaves a gap before it"
            raise _Defect(f"tensor {tensor.name!r} {defect}: it begins at {tensor.begin}, expected {at}")
        at = tensor.end
    if at != size_bytes:
        defect = "is cut off" if at > size_bytes else "has bytes after its last tensor"
        raise _Defect(f"it {defect}: {size_bytes} bytes, its header describes {at}")
    return Header(MappingProxyType({each.name: each for each in tensors}), MappingProxyType(metadata), size_bytes)


# Adapters of one base with one configuration have the same header to the byte, and a few configurations make a fleet.
_check_once = functools.lru_cache(_MAX_KEPT)(_check)


def _refuse_by_kind(start: bytes, defect: str) -> NoReturn:
    # Looked at only after the length made no sense: a good length of 640 begins like a pickle of protocol 2.
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _Defect("it is a Python pickle, which MinT never opens; save the adapter as safetensors")
    for magic, kind in _FOREIGN:
        if start.startswith(magic):
            raise _Defect(f"it is {kind}; MinT takes safetensors only")
    raise _Defect(defect)


def _check_growth(text: bytes, max_tensors: int) -> None:
    """Refuse a header that would grow in memory out of proportion, before it is parsed.

    An entry of a tensor is three brackets and a handful of commas in sixty bytes or more. What has more of them is no
    list of tensors, and would make an object of fifty bytes or more out of each two or three of the file's.
    """
    num_tensors = text.count(b"data_offsets")
    if num_tensors > max_tensors + 1:
        raise _Defect(f"it has {num_tensors} tensors, allowed are {max_tensors}")
    max_marks = (6 + _MAX_DIMS) * num_tensors + _MAX_STRAY_MARKS
    if sum(map(text.count, _MARKS)) <= max_marks:
        return
    # Only here are those in strings, which harm nobody, told from the others.
    num_marks = at = 0
    for string in _STRING.finditer(text):
        gap, at = text[at : string.start()], string.end()
        num_marks += sum(map(gap.count, _MARKS))
        if num_marks > max_marks:
            break
    if num_marks + sum(map(text[at:].count, _MARKS)) > max_marks:
        raise _Defect(f"its header has more than {max_marks} brackets and commas for {num_tensors} tensors")


def _parse(text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _Defect(f"its header has the key {key[:80]!r} twice")
            found[key] = value
        return found

    def no_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise _Defect(f"its header is not JSON: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise _Defect(f"its header is a JSON {type(document).__name__}, expected an object")
    return document


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise _Defect("its __metadata__ is not an object of strings")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(name: str, value: Any, data_begin: int) -> TensorInfo:
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise _Defect(f"tensor name {name[:80]!r} is empty, unprintable or longer than {_MAX_NAME_CHARS} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _Defect(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Defect(f"tensor {name!r} has dtype {str(dtype)[:40]!r}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise _Defect(f"tensor {name!r} has shape {str(shape)[:80]}: expected at most {_MAX_DIMS} counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _Defect(f"tensor {name!r} has data_offsets {str(offsets)[:80]}: expected two counts")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].size_bytes
    if end - begin != needed:
        raise _Defect(f"tensor {name!r} has {end - begin} bytes, its shape {shape} of {dtype} needs {needed}")
    return TensorInfo(name, dtype, tuple(shape), data_begin + begin, data_begin + end)
