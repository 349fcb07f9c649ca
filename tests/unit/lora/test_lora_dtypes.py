from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_lora.dtypes import DTYPES, dtype_of_array, from_float32, has_non_finite, to_float32

torch = pytest.importorskip("torch")


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    floats = np.array(values, dtype=np.float32)
    ours = from_float32(floats, "BF16")
    theirs = torch.from_numpy(floats).to(torch.bfloat16)
    nan = np.isnan(floats)
    assert np.array_equal(ours[~nan], theirs.view(torch.uint16).numpy()[~nan])
    assert np.isnan(to_float32(ours, "BF16")[nan]).all()
    assert np.array_equal(to_float32(ours, "BF16")[~nan], theirs.float().numpy()[~nan])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_exact_values_come_back(dtype: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -2.5, 0.0078125, 384.0], dtype=np.float32)
    assert np.array_equal(to_float32(from_float32(values, dtype), dtype), values)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "BF16", "F8_E5M2"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_is_seen(dtype: str, bad: float) -> None:
    names = {"F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    values = torch.tensor([1.0, bad, -3.0]).to(names.get(dtype, torch.float32))
    array = values.view(torch.uint8).numpy().view(DTYPES[dtype].view)
    assert has_non_finite(array, dtype)
    assert not has_non_finite(np.ascontiguousarray(array[::2]), dtype)


def test_integers_are_always_finite() -> None:
    assert not has_non_finite(np.array([-1, 0x7F80], dtype=np.int32), "I32")


def test_names_of_arrays() -> None:
    assert dtype_of_array(np.zeros(1, np.float32)) == "F32"
    assert dtype_of_array(np.zeros(1, np.uint16)) == "U16"
    assert dtype_of_array(np.zeros(1, ">f4")) == "F32"
    with pytest.raises(TypeError, match="complex64"):
        dtype_of_array(np.zeros(1, np.complex64))
