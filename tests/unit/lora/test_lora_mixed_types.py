"""Adapters of several types, and of float8: widened without loss, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.errors import InvalidArgument
from mint_lora.dtypes import DTYPES, common_dtype, from_float32, has_non_finite, holds, to_float32
from mint_lora.folders import read_peft_folder
from mint_lora.packing import PackedAdapter, pack
from mint_lora.tensors import TensorSource, write_safetensors
from support.adapters import BASE_DIGEST, config_for, delta_weights, moe_shapes

LEAVES = ("gate_proj", "up_proj", "down_proj")
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_float8_means_what_torch_means(dtype: str) -> None:
    bits = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(bits).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(to_float32(bits, dtype), want)
    assert [has_non_finite(bits[i : i + 1], dtype) for i in range(256)] == (~np.isfinite(want)).tolist()


@pytest.mark.parametrize("wide", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("narrow", [*TORCH, "F32", "F64", "I32", "U8"])
def test_what_holds_what(wide: str, narrow: str) -> None:
    if narrow in TORCH and DTYPES[narrow].size_bytes <= 2:
        bits = np.arange(1 << (8 * DTYPES[narrow].size_bytes)).astype(f"<u{DTYPES[narrow].size_bytes}")
        values = to_float32(bits.view(DTYPES[narrow].view), narrow)
        values = values[np.isfinite(values)]
        with np.errstate(over="ignore"):  # what overflows is not held
            there_and_back = to_float32(from_float32(values, wide), wide)
        assert holds(wide, narrow) == np.array_equal(values, there_and_back)
    else:
        assert holds(wide, narrow) == (wide == narrow)


def test_the_narrowest_common_type() -> None:
    assert common_dtype(["F8_E4M3", "F8_E5M2"]) == "BF16"
    assert common_dtype(["F8_E4M3", "F16"]) == "F16"
    assert common_dtype(["BF16", "F16"]) == "F32"
    assert common_dtype(["F8_E5M2", "F32", "BF16"]) == "F32"
    assert common_dtype(["F16", "F64"]) is None


def _source(values: np.ndarray, dtype: str) -> TensorSource:
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return TensorSource.of(torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy(), dtype)
    if dtype in ("I32", "F64"):
        return TensorSource.of(values.astype(np.dtype(DTYPES[dtype].view)), dtype)
    return TensorSource.of(from_float32(values, dtype), dtype)


def _packed(tmp_path: Path, *dtypes: str) -> tuple[PackedAdapter, dict[str, np.ndarray]]:
    """An imported adapter whose tensors have ``dtypes`` in turn, and its delta W in float64."""
    random, folder, shapes = np.random.default_rng(0), tmp_path / "peft", moe_shapes(num_layers=1)
    config = config_for(shapes)
    tensors: dict[str, TensorSource] = {}
    deltas: dict[str, np.ndarray] = {}
    for number, (module, (size_in, size_out)) in enumerate(shapes.items()):
        factors = {}
        for turn, (side, shape) in enumerate((("A", (4, size_in)), ("B", (size_out, 4)))):
            # Experts of a module must be alike, so the type goes by the module's last name.
            leaf = number if ".experts." not in module else LEAVES.index(module.rpartition(".")[2])
            dtype = dtypes[(leaf + turn) % len(dtypes)]
            source = _source(random.standard_normal(shape, dtype=np.float32), dtype)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = source
            (array,) = source.read()
            is_other = dtype in ("I32", "F64")
            factors[side] = (array if is_other else to_float32(array, dtype)).astype(np.float64)
        deltas[module] = config.scaling * (factors["B"] @ factors["A"])
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config.to_peft_config()))
    weights, config = read_peft_folder(folder, base_model="tiny", base_digest=BASE_DIGEST)
    return pack(weights, tmp_path / "blob", config), deltas


@pytest.mark.parametrize(
    ("dtypes", "becomes"),
    [
        (("BF16", "F32"), "float32"),
        (("BF16", "F16"), "float32"),
        (("F8_E4M3", "BF16"), "bfloat16"),
        (("F8_E5M2", "F16"), "float16"),
        (("F8_E4M3", "F8_E5M2"), "bfloat16"),
        (("F8_E4M3",), "bfloat16"),
        (("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"), "float32"),
    ],
)
def test_mixed_types_are_widened_without_loss(tmp_path: Path, dtypes: tuple[str, ...], becomes: str) -> None:
    packed, want = _packed(tmp_path, *dtypes)
    assert packed.config.dtype == becomes
    assert {DTYPES[each.dtype].common_name for each in packed.manifest} == {becomes}
    found = delta_weights(packed.path)
    assert found.keys() == want.keys()
    for module, delta in want.items():
        assert np.abs(delta).max() > 0.1
        np.testing.assert_array_equal(found[module], delta)


@pytest.mark.parametrize("dtypes", [("F64",), ("F32", "F64"), ("BF16", "I32")])
def test_types_that_would_lose_are_refused(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="expected F32, F16, BF16, F8_E4M3 or F8_E5M2") as caught:
        _packed(tmp_path, *dtypes)
    assert dtypes[-1] in str(caught.value)


def test_a_wider_tensor_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    shapes = moe_shapes(num_layers=1)
    config = config_for(shapes, dtype="bfloat16")
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": np.ones(shape, np.float32)
        for module, (size_in, size_out) in shapes.items()
        for side, shape in (("A", (4, size_in)), ("B", (size_out, 4)))
    }
    write_safetensors(tmp_path / "f", tensors, config.to_metadata())
    with pytest.raises(InvalidArgument, match="is F32, the configuration says bfloat16"):
        pack(tmp_path / "f", tmp_path / "blob")
