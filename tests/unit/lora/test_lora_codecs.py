"""delta W per module and expert is the same through every pair of layouts, for every model family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidArgument
from mint_lora.config import (
    LAYOUT_PACKED,
    LAYOUT_PARAMETERS,
    LAYOUT_PEFT,
    LAYOUT_SHARED_OUTER,
    METADATA_KEY,
    AdapterConfig,
)
from mint_lora.layouts import LAYOUTS
from mint_lora.packing import pack, unpack
from mint_lora.tensors import TensorFile
from mint_lora.validation import validate_adapter
from support.lora_layouts import FAMILY_SHAPES, is_stack, make_truth, read_deltas, same_deltas, write_layout

PREFIX = "base_model.model."
EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("architecture", "source", "kind"),
    [
        (architecture, source, kind)
        for architecture, shapes in FAMILY_SHAPES.items()
        for source in LAYOUTS
        for kind in (("", "one-a", "shared") if any(map(is_stack, shapes)) else ("",))
        if kind == "shared" or source != LAYOUT_SHARED_OUTER or not any(map(is_stack, shapes))
    ],
)
def test_every_pair_of_layouts(tmp_path: Path, architecture: str, source: str, kind: str) -> None:
    truth = make_truth(architecture, kind=kind)
    want = truth.deltas()
    write_layout(tmp_path / "source", truth, source)
    same_deltas(want, read_deltas(tmp_path / "source"))  # the test's own writer and reader agree
    packed = pack(tmp_path / "source", tmp_path / "blob", max_size_bytes=1 << 20)
    assert packed.config.layout == LAYOUT_PACKED
    assert packed.config.is_uniform
    assert packed.config.rank == truth.rank, "gate and up are taken apart where they were two"
    info = validate_adapter(tmp_path / "blob", layout=LAYOUT_PACKED)
    assert {each.name for each in info.modules} == want.keys()
    for target in LAYOUTS:
        out = tmp_path / target
        if target == LAYOUT_SHARED_OUTER and truth.has_experts and kind != "shared":
            with pytest.raises(InvalidArgument, match="differs between experts"):
                unpack(tmp_path / "blob", out, target, architecture=architecture)
            continue
        unpack(tmp_path / "blob", out, target, architecture=architecture)
        same_deltas(want, _expanded(read_deltas(out), want))
        # And again: nothing was lost that would change the second blob.
        again = pack(out, tmp_path / "again", expand_shared=True)
        assert again.digest == pack(tmp_path / "blob", tmp_path / "expanded", expand_shared=True).digest


def _expanded(found: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {module: np.broadcast_to(delta, want[module].shape) for module, delta in found.items()}


def test_names_are_those_of_the_family(tmp_path: Path) -> None:
    write_layout(tmp_path / "source", make_truth("MixtralForCausalLM"), LAYOUT_PEFT)
    pack(tmp_path / "source", tmp_path / "blob")
    config = unpack(tmp_path / "blob", tmp_path / "out", LAYOUT_PEFT, architecture="MixtralForCausalLM")
    names = set(TensorFile(tmp_path / "out").header.tensors)
    assert f"{PREFIX}model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight" in names
    assert names == set(TensorFile(tmp_path / "source").header.tensors)
    assert {"w1", "w2", "w3"} < set(config.target_modules)
    unpack(tmp_path / "blob", tmp_path / "out", LAYOUT_PEFT)
    assert f"{PREFIX}{EXPERTS}.2.up_proj.lora_B.weight" in TensorFile(tmp_path / "out").header.tensors
    config = unpack(tmp_path / "blob", tmp_path / "out", LAYOUT_PARAMETERS)
    assert config.to_peft_config()["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config.to_peft_config()["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_both_orientations_of_parameters(tmp_path: Path, architecture: str) -> None:
    truth = make_truth(architecture)
    write_layout(tmp_path / "new", truth, LAYOUT_PARAMETERS)
    write_layout(tmp_path / "old", truth, LAYOUT_PARAMETERS, is_transposed=True)
    name = f"{PREFIX}{EXPERTS}.base_layer.lora_A.weight"
    shapes = {each: TensorFile(tmp_path / each).header.tensors[name].shape for each in ("new", "old")}
    assert shapes == {"new": (24, 12), "old": (24, 16)}
    for each in shapes:
        pack(tmp_path / each, tmp_path / f"blob-{each}")
        same_deltas(truth.deltas(), read_deltas(tmp_path / f"blob-{each}"))
    assert (tmp_path / "blob-new").read_bytes() == (tmp_path / "blob-old").read_bytes()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("left_out", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(tmp_path: Path, left_out: str, is_transposed: bool) -> None:
    truth = make_truth("Qwen3MoeForCausalLM")
    config = write_layout(tmp_path / "both", truth, LAYOUT_PARAMETERS, is_transposed=is_transposed)
    wrapper = ".base_layer" if left_out == "gate_up_proj" else ""
    tensors = {
        name.replace(".base_layer", ""): each
        for name, each in safetensors.numpy.load_file(tmp_path / "both").items()
        if f".experts{wrapper}.lora" not in name
    }
    targets = tuple(each for each in config.target_modules if each != left_out)
    config = dataclasses.replace(config, target_modules=targets)
    safetensors.numpy.save_file(tensors, tmp_path / "one", {METADATA_KEY: config.to_json()})
    pack(tmp_path / "one", tmp_path / "blob")
    leaves = {"down_proj"} if left_out == "gate_up_proj" else {"gate_proj", "up_proj"}
    want = {
        module: delta
        for module, delta in truth.deltas().items()
        if ".experts." not in module or module.rpartition(".")[2] in leaves
    }
    same_deltas(want, read_deltas(tmp_path / "blob"))
    for layout in (LAYOUT_PEFT, LAYOUT_PARAMETERS):
        unpack(tmp_path / "blob", tmp_path / layout, layout)
        pack(tmp_path / layout, tmp_path / "again")
        same_deltas(want, read_deltas(tmp_path / "again"))
    # Without attention nothing says which side of a single parameter is the hidden one.
    alone = {name: each for name, each in tensors.items() if ".experts" in name}
    config = dataclasses.replace(config, target_modules=tuple({"gate_up_proj", "down_proj"} - {left_out}))
    safetensors.numpy.save_file(alone, tmp_path / "alone", {METADATA_KEY: config.to_json()})
    with pytest.raises(InvalidArgument, match="do not tell inputs from outputs"):
        pack(tmp_path / "alone", tmp_path / "blob")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (f"{EXPERTS}.base_layer.lora_A.weight", (24, 13), "are not those of gate_up_proj"),
        (f"{EXPERTS}.base_layer.lora_A.weight", (25, 12), "do not fit rank 8"),
        (f"{EXPERTS}.lora_B.weight", (12, 16), "do not fit rank 4"),
        (f"{EXPERTS}.base_layer.lora_B.weight", None, "has no lora_B"),
        (f"{EXPERTS}.base_layer.lora_A.weight", (3, 8, 12), "all experts are in one matrix"),
        (f"{EXPERTS}.0.up_proj.lora_A.weight", (4, 12), "all experts are in one matrix"),
        ("model.layers.0.self_attn.base_layer.lora_A.weight", (4, 12), "no block of experts"),
        ("model.layers.0.mlp.gate.lora_A.weight", (4, 12), "none of target_modules"),
    ],
)
def test_parameters_that_are_none(tmp_path: Path, name: str, shape: tuple[int, ...] | None, says: str) -> None:
    config = write_layout(tmp_path / "good", make_truth("Qwen3MoeForCausalLM"), LAYOUT_PARAMETERS)
    tensors = safetensors.numpy.load_file(tmp_path / "good")
    tensors.pop(PREFIX + name, None)
    if shape is not None:
        tensors[PREFIX + name] = np.ones(shape, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "bad", {METADATA_KEY: config.to_json()})
    with pytest.raises(InvalidArgument) as caught:
        pack(tmp_path / "bad", tmp_path / "blob")
    assert says in str(caught.value)
    assert not (tmp_path / "blob").exists()


def test_shared_sides_are_kept_once(tmp_path: Path) -> None:
    truth = make_truth("Qwen3MoeForCausalLM", kind="shared")
    write_layout(tmp_path / "source", truth, LAYOUT_SHARED_OUTER)
    kept = pack(tmp_path / "source", tmp_path / "kept")
    shapes = {
        each.name.removeprefix(f"{PREFIX}{EXPERTS}."): each.shape for each in kept.manifest if EXPERTS in each.name
    }
    assert shapes["up_proj.lora_A.weight"] == (1, 4, 12)
    assert shapes["up_proj.lora_B.weight"] == (3, 8, 4)
    assert shapes["down_proj.lora_B.weight"] == (1, 12, 4)
    by_name = {each.name: each for each in validate_adapter(tmp_path / "kept").modules}
    up, down = by_name[f"{EXPERTS}.up_proj"], by_name[f"{EXPERTS}.down_proj"]
    assert (up.num_experts, up.is_a_shared, up.is_b_shared) == (3, True, False)
    assert (down.num_experts, down.is_a_shared, down.is_b_shared) == (3, False, True)
    whole = pack(tmp_path / "source", tmp_path / "whole", expand_shared=True)
    assert whole.size_bytes > kept.size_bytes
    assert not any(each.is_a_shared or each.is_b_shared for each in validate_adapter(tmp_path / "whole").modules)
    same_deltas(truth.deltas(), read_deltas(tmp_path / "whole"))
    # An adapter trained expert by expert whose experts happen to agree comes out as shared again.
    unpack(tmp_path / "whole", tmp_path / "shared", LAYOUT_SHARED_OUTER)
    same_deltas(truth.deltas(), read_deltas(tmp_path / "shared"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    architecture=st.sampled_from(["Qwen3MoeForCausalLM", "DeepseekV32ForCausalLM"]),
    rank=st.integers(1, 5),
    alpha=st.sampled_from([1.0, 6.0, 0.7]),
    use_rslora=st.booleans(),
    layout=st.sampled_from([LAYOUT_PEFT, LAYOUT_PARAMETERS]),
    alphas=st.dictionaries(
        st.sampled_from(["o_proj", "layers.1.self_attn.o_proj", "mlp.experts.down_proj", "down_proj"]),
        st.sampled_from([1.0, 3.0, 10.0]),
    ),
    seed=st.integers(0, 1000),
)
def test_any_rank_and_scaling(
    tmp_path: Path,
    architecture: str,
    rank: int,
    alpha: float,
    use_rslora: bool,
    layout: str,
    alphas: dict[str, float],
    seed: int,
) -> None:
    truth = make_truth(architecture, seed=seed, rank=rank, alpha=alpha, use_rslora=use_rslora)
    config = write_layout(tmp_path / "plain", truth, layout)
    config = dataclasses.replace(config, alpha_pattern=dict(config.alpha_pattern) | alphas)
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(tmp_path / "plain"), tmp_path / "source", {METADATA_KEY: config.to_json()}
    )
    pack(tmp_path / "source", tmp_path / "blob")
    want = read_deltas(tmp_path / "source")
    same_deltas(want, read_deltas(tmp_path / "blob"), tolerance=1e-6)
    for target in (LAYOUT_PEFT, LAYOUT_PARAMETERS):
        unpack(tmp_path / "blob", tmp_path / "out", target, architecture=architecture)
        same_deltas(want, read_deltas(tmp_path / "out"), tolerance=1e-6)


def test_a_zero_half_is_not_taken_apart(tmp_path: Path) -> None:
    config = write_layout(tmp_path / "some", make_truth("Qwen3MoeForCausalLM"), LAYOUT_PARAMETERS)
    tensors = safetensors.numpy.load_file(tmp_path / "some")
    for name, each in tensors.items():
        if "lora_B" in name:
            each[...] = 0
    safetensors.numpy.save_file(tensors, tmp_path / "zero", {METADATA_KEY: config.to_json()})
    packed = pack(tmp_path / "zero", tmp_path / "blob")
    assert packed.config.rank == 8
    assert not any(delta.any() for delta in read_deltas(tmp_path / "blob").values())


def test_patterns_of_a_packed_file_are_refused(tmp_path: Path) -> None:
    config = write_layout(tmp_path / "packed", make_truth("Qwen3MoeForCausalLM"), LAYOUT_PACKED)
    patterned = dataclasses.replace(config, alpha_pattern={"q_proj": 1.0})
    assert AdapterConfig.from_json(patterned.to_json()) == patterned
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(tmp_path / "packed"), tmp_path / "bad", {METADATA_KEY: patterned.to_json()}
    )
    with pytest.raises(InvalidArgument, match="pack it again"):
        unpack(tmp_path / "bad", tmp_path / "out", LAYOUT_PARAMETERS)
