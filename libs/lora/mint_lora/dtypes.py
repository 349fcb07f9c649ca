"""Tensor element types by their safetensors names, and float arithmetic on types numpy does not have.

bfloat16 travels as ``uint16`` views of its bits; the few places that compute go through float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = ["DTYPES", "Dtype", "dtype_of_array", "from_float32", "has_non_finite", "to_float32"]

_F32_QUIET_NAN_BIT = np.uint32(0x0040_0000)


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type of the safetensors format."""

    name: str
    """As in a safetensors header: ``BF16``."""
    size_bytes: int
    """Bytes of one element."""
    view: str
    """The numpy type its bytes are viewed as; integers where numpy has no such float."""
    common_name: str
    """As torch and the configurations of models say it: ``bfloat16``."""
    exponent_mask: int | None = None
    """Bits that are all ones exactly for infinities and NaN; None where the type has neither, or is no float."""


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        each.name: each
        for each in (
            Dtype("BOOL", 1, "|b1", "bool"),
            Dtype("U8", 1, "|u1", "uint8"),
            Dtype("I8", 1, "|i1", "int8"),
            Dtype("F8_E5M2", 1, "|u1", "float8_e5m2", 0x7C),
            Dtype("F8_E4M3", 1, "|u1", "float8_e4m3fn", 0x7F),
            Dtype("I16", 2, "<i2", "int16"),
            Dtype("U16", 2, "<u2", "uint16"),
            Dtype("F16", 2, "<f2", "float16", 0x7C00),
            Dtype("BF16", 2, "<u2", "bfloat16", 0x7F80),
            Dtype("I32", 4, "<i4", "int32"),
            Dtype("U32", 4, "<u4", "uint32"),
            Dtype("F32", 4, "<f4", "float32", 0x7F80_0000),
            Dtype("F64", 8, "<f8", "float64", 0x7FF0_0000_0000_0000),
            Dtype("I64", 8, "<i8", "int64"),
            Dtype("U64", 8, "<u8", "uint64"),
        )
    }
)
"""Every element type this room knows, by safetensors name."""

_BY_NUMPY = {
    np.dtype(each.view): each.name for each in DTYPES.values() if each.name not in ("BF16", "F8_E5M2", "F8_E4M3")
}


def dtype_of_array(array: npt.NDArray[np.generic]) -> str:
    """The safetensors name of a numpy array's type; :class:`TypeError` if there is none."""
    try:
        return _BY_NUMPY[array.dtype.newbyteorder("<")]
    except KeyError:
        raise TypeError(f"numpy type {array.dtype} has no safetensors name") from None


def has_non_finite(array: npt.NDArray[np.generic], dtype: str) -> bool:
    """Whether an array (of the type's ``view``) holds an infinity or NaN. Integers never do."""
    mask = DTYPES[dtype].exponent_mask
    if mask is None:
        return False
    bits = array.view(f"<u{DTYPES[dtype].size_bytes}")
    wanted = bits.dtype.type(mask)
    return bool(np.any((bits & wanted) == wanted))


def to_float32(array: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an ``F32``, ``F16`` or ``BF16`` array as float32, exact. A ``BF16`` array is a ``uint16`` view."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F32", "F16"):
        return array.astype(np.float32)
    raise TypeError(f"{dtype} is not a floating type that adapters use")


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """float32 values rounded to nearest, ties to even, as an array of the type's ``view``."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        # Rounding could carry a NaN's payload over into infinity.
        rounded = np.where(np.isnan(values), bits | _F32_QUIET_NAN_BIT, rounded)
        return (rounded >> np.uint32(16)).astype(np.uint16)
    if dtype == "F16":
        return values.astype(np.float16)
    if dtype == "F32":
        return values
    raise TypeError(f"{dtype} is not a floating type that adapters use")
