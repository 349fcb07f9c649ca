"""Differences of adapters, against delta W built whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mint_core.errors import InvalidArgument
from mint_lora import LAYOUT_PARAMETERS, LAYOUT_SHARED_OUTER, TensorFile, diff_adapters, pack, write_safetensors
from mint_lora.config import METADATA_KEY, AdapterConfig
from support.adapters import config_for, dense_shapes, moe_shapes, write_adapter
from support.lora_layouts import make_truth, read_deltas, write_layout


def _check(one: Path, other: Path) -> None:
    deltas = read_deltas(one), read_deltas(other)
    found = diff_adapters(one, other)
    names = sorted(deltas[0].keys() | deltas[1].keys())
    assert [each.module for each in found.modules] == names
    flat: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for each in found.modules:
        zero = np.zeros(1)
        left, right = (delta.get(each.module, zero) for delta in deltas)
        left, right = np.broadcast_arrays(left, right)
        assert each.norm_one == pytest.approx(np.linalg.norm(left))
        assert each.norm_other == pytest.approx(np.linalg.norm(right))
        assert each.norm_difference == pytest.approx(np.linalg.norm(left - right))
        assert each.is_max_exact
        assert each.max_abs_difference == pytest.approx(np.abs(left - right).max())
        if each.cosine is not None:
            cosine = np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right)
            assert each.cosine == pytest.approx(cosine, abs=1e-12)
        flat[0].append(left.reshape(-1))
        flat[1].append(right.reshape(-1))
    left, right = map(np.concatenate, flat)
    assert found.norm_difference == pytest.approx(np.linalg.norm(left - right))
    assert found.max_abs_difference == pytest.approx(np.abs(left - right).max())
    assert found.cosine == pytest.approx(np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right), abs=1e-12)
    # The bound that stands for it in large adapters is never below.
    bound = diff_adapters(one, other, max_elements=0)
    assert not bound.is_max_exact
    for exact, rough in zip(found.modules, bound.modules, strict=True):
        assert rough.max_abs_difference >= exact.max_abs_difference - 1e-13 * exact.norm_one
        assert dataclasses.replace(rough, max_abs_difference=0, is_max_exact=True) == dataclasses.replace(
            exact, max_abs_difference=0
        )


@pytest.mark.parametrize("ranks", [(4, 4), (2, 5)])
@pytest.mark.parametrize("shapes", [dense_shapes(), moe_shapes()], ids=["dense", "moe"])
def test_two_random_adapters(tmp_path: Path, shapes: dict[str, tuple[int, int]], ranks: tuple[int, int]) -> None:
    for seed, rank in enumerate(ranks):
        write_adapter(tmp_path / "source", shapes, config_for(shapes, rank=rank, alpha=3.0 + seed), seed=seed)
        pack(tmp_path / "source", tmp_path / f"{seed}")
    _check(tmp_path / "0", tmp_path / "1")
    changes = {each.field: (each.one, each.other) for each in diff_adapters(tmp_path / "0", tmp_path / "1").config}
    assert changes == ({"alpha": (3.0, 4.0)} | ({"rank": ranks} if ranks[0] != ranks[1] else {}))


def test_layouts_do_not_matter(tmp_path: Path) -> None:
    truth = make_truth("DeepseekV3ForCausalLM", kind="shared")
    for layout in (LAYOUT_PARAMETERS, LAYOUT_SHARED_OUTER):
        write_layout(tmp_path / layout, truth, layout)
    write_layout(tmp_path / "other", make_truth("DeepseekV3ForCausalLM", seed=1), LAYOUT_PARAMETERS)
    found = diff_adapters(tmp_path / LAYOUT_PARAMETERS, tmp_path / LAYOUT_SHARED_OUTER)
    assert found.norm_difference < 1e-12 * found.norm_one
    assert found.cosine == pytest.approx(1)
    _check(tmp_path / LAYOUT_SHARED_OUTER, tmp_path / "other")


def test_the_same_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    shapes = moe_shapes()
    write_adapter(tmp_path / "one", shapes, config_for(shapes))
    write_adapter(tmp_path / "other", shapes, config_for(shapes, base_model="copy"))
    found = diff_adapters(tmp_path / "one", tmp_path / "other")
    assert found.is_same
    assert found.norm_one == found.norm_other > 0
    assert (found.norm_difference, found.max_abs_difference, found.cosine) == (0, 0, pytest.approx(1))
    assert [(each.field, each.one, each.other) for each in found.config] == [("base_model", "tiny", "copy")]
    assert diff_adapters(tmp_path / "one", tmp_path / "other", max_elements=0).is_same


def test_a_small_difference_is_not_lost_in_rounding(tmp_path: Path) -> None:
    # As a difference of squared norms this would be noise: 1e-7 of the norm is 1e-14 of its square.
    shapes = {"model.layers.0.self_attn.q_proj": (40, 30)}
    config = config_for(shapes)
    write_adapter(tmp_path / "one", shapes, config)
    with TensorFile(tmp_path / "one") as file:
        tensors = {name: file.array(name).copy() for name in file.header.tensors}
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] += np.float32(1e-6)
    write_safetensors(tmp_path / "other", tensors, {METADATA_KEY: config.to_json()})
    _check(tmp_path / "one", tmp_path / "other")
    found = diff_adapters(tmp_path / "one", tmp_path / "other")
    assert 0 < found.norm_difference < 1e-6 * found.norm_one
    assert not found.is_same


def test_modules_of_one_side_only(tmp_path: Path) -> None:
    shapes = moe_shapes()
    some = {name: shape for name, shape in shapes.items() if "experts" not in name}
    write_adapter(tmp_path / "one", some, config_for(some))
    write_adapter(tmp_path / "other", shapes, config_for(shapes), seed=1)
    _check(tmp_path / "one", tmp_path / "other")
    _check(tmp_path / "other", tmp_path / "one")
    alone = [each for each in diff_adapters(tmp_path / "one", tmp_path / "other").modules if "experts" in each.module]
    assert {(each.rank_one, each.rank_other, each.norm_one, each.cosine, each.num_experts) for each in alone} == {
        (0, 4, 0.0, None, 3)
    }
    assert all(each.norm_difference == pytest.approx(each.norm_other) for each in alone)


def test_adapters_of_different_bases(tmp_path: Path) -> None:
    for name, hidden in (("one", 12), ("other", 16)):
        shapes = dense_shapes(hidden=hidden)
        write_adapter(tmp_path / name, shapes, config_for(shapes))
    with pytest.raises(InvalidArgument, match=r"is \[12, 20\] in one and \[16, 20\] in other"):
        diff_adapters(tmp_path / "one", tmp_path / "other")
    write_safetensors(tmp_path / "none", {"t": np.ones(3, np.float32)})
    with pytest.raises(InvalidArgument, match="was not written by MinT"):
        diff_adapters(tmp_path / "one", tmp_path / "none")


def test_configurations_are_compared_by_meaning(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    configs: list[AdapterConfig] = [
        config_for(shapes, alpha=8),
        config_for(shapes, alpha=8.0, rank_pattern={"q_proj": 2}),
    ]
    for number, config in enumerate(configs):
        write_adapter(tmp_path / f"{number}", shapes, config)
    found = diff_adapters(tmp_path / "0", tmp_path / "1")
    assert [(each.field, dict(each.other)) for each in found.config] == [("rank_pattern", {"q_proj": 2})]  # type: ignore[call-overload]
