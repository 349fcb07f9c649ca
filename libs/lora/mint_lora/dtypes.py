"""Tensor element types by their safetensors names, and float arithmetic on types numpy does not have.

bfloat16 travels as ``uint16`` views of its bits, the float8 types as ``uint8``; the few places that compute go through
float32, which holds every value of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = [
    "DTYPES",
    "SAFETENSORS_NAMES",
    "Dtype",
    "common_dtype",
    "dtype_of_array",
    "from_float32",
    "has_non_finite",
    "holds",
    "to_float32",
]

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

SAFETENSORS_NAMES: Mapping[str, str] = MappingProxyType({each.common_name: each.name for each in DTYPES.values()})
"""Safetensors names by the common ones."""

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


def holds(wide: str, narrow: str) -> bool:
    """Whether every value of the floating type ``narrow`` is one of the type ``wide``, which is ``F32``, ``F16`` or
    ``BF16``."""
    return wide in _HELD and (narrow == wide or narrow in _HELD[wide])


def common_dtype(dtypes: Iterable[str]) -> str | None:
    """The narrowest of ``BF16``, ``F16`` and ``F32`` that holds every value of all ``dtypes``; None if none does."""
    wanted = set(dtypes)
    return next((wide for wide in ("BF16", "F16", "F32") if all(holds(wide, each) for each in wanted)), None)


def to_float32(array: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an ``F32``, ``F16``, ``BF16`` or ``F8_…`` array (of the type's ``view``) as float32, exact."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F32", "F16"):
        return array.astype(np.float32)
    if dtype in _F8_VALUES:
        values: npt.NDArray[np.float32] = _F8_VALUES[dtype][array.astype(np.uint8)]
        return values
    raise TypeError(f"{dtype} is not a floating type that adapters use")


def _float8_values(num_mantissa_bits: int, bias: int) -> npt.NDArray[np.float32]:
    """All 256 values of a float8 type; NaN and infinities of E5M2 as IEEE 754 has them, see below for E4M3."""
    bits = np.arange(256)
    exponent, mantissa = (bits & 0x7F) >> num_mantissa_bits, bits & ((1 << num_mantissa_bits) - 1)
    # Subnormal numbers have the exponent of the smallest normal ones and no leading one.
    values = np.ldexp((exponent > 0) + mantissa / (1 << num_mantissa_bits), np.maximum(exponent, 1) - bias)
    signed: npt.NDArray[np.float32] = np.where(bits & 0x80, -values, values).astype(np.float32)
    return signed


def _with_specials() -> dict[str, npt.NDArray[np.float32]]:
    # E4M3 here is torch's float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433): no infinities, one NaN per sign.
    e4m3, e5m2 = _float8_values(3, 7), _float8_values(2, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2[[0x7C, 0xFC]] = [np.inf, -np.inf]
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2}


_F8_VALUES = _with_specials()
_HELD = {"BF16": _F8_VALUES.keys(), "F16": _F8_VALUES.keys(), "F32": _F8_VALUES.keys() | {"BF16", "F16"}}


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
