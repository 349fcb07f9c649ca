from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mint_core
import mint_lora
from mint_core.errors import BaseModelMismatch, InvalidArgument, ResourceExhausted
from mint_lora.config import LAYOUT_PACKED, LAYOUT_PARAMETERS, LAYOUT_PEFT, LAYOUT_SHARED_OUTER, METADATA_KEY
from mint_lora.layouts import LAYOUTS, layout_named
from mint_lora.packing import pack, unpack
from mint_lora.tensors import TensorFile, TensorSource, write_safetensors
from mint_lora.validation import validate_adapter
from support.adapters import BASE_DIGEST, config_for, delta_weights, dense_shapes, moe_shapes, write_adapter

PREFIX = "base_model.model."


def _assert_equal_deltas(one: Path, other: Path, *, tolerance: float = 0.0) -> None:
    ours, theirs = delta_weights(one), delta_weights(other)
    assert ours.keys() == theirs.keys()
    for module, delta in ours.items():
        assert np.abs(delta).max() > 0.1, "a zero adapter would prove nothing"
        np.testing.assert_allclose(delta, theirs[module], rtol=0, atol=tolerance * np.abs(delta).max(), err_msg=module)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shapes", [dense_shapes(), moe_shapes()], ids=["dense", "moe"])
def test_there_and_back_is_the_same_file(tmp_path: Path, shapes: dict[str, tuple[int, int]], dtype: str) -> None:
    source, blob, back = (tmp_path / name for name in ("source", "blob", "back"))
    write_adapter(source, shapes, config_for(shapes, dtype=dtype))
    packed = pack(source, blob)
    _assert_equal_deltas(source, blob)
    assert unpack(blob, back, LAYOUT_PEFT).layout == LAYOUT_PEFT
    assert back.read_bytes() == source.read_bytes()
    info = validate_adapter(blob, expected_base_digest=BASE_DIGEST, max_rank=4, layout=LAYOUT_PACKED)
    assert (info.num_tensors, info.size_bytes) == (packed.num_tensors, packed.size_bytes)
    assert info.config == packed.config
    assert [each.name for each in packed.manifest] == sorted(each.name for each in packed.manifest)


def test_experts_are_stacked(tmp_path: Path) -> None:
    shapes = moe_shapes(num_layers=2, num_experts=3, hidden=12, inner=8)
    write_adapter(tmp_path / "source", shapes, config_for(shapes))
    packed = pack(tmp_path / "source", tmp_path / "blob")
    assert packed.num_tensors == 2 * (8 + 6)
    names = {each.name: each.shape for each in packed.manifest}
    assert names[f"{PREFIX}model.layers.1.mlp.experts.gate_proj.lora_A.weight"] == (3, 4, 12)
    assert names[f"{PREFIX}model.layers.1.mlp.experts.gate_proj.lora_B.weight"] == (3, 8, 4)
    assert names[f"{PREFIX}model.layers.0.mlp.experts.down_proj.lora_A.weight"] == (3, 4, 8)
    with TensorFile(tmp_path / "source") as source, TensorFile(tmp_path / "blob") as blob:
        for expert in range(3):
            one = source.array(f"{PREFIX}model.layers.1.mlp.experts.{expert}.up_proj.lora_B.weight")
            stack = blob.array(f"{PREFIX}model.layers.1.mlp.experts.up_proj.lora_B.weight")
            assert np.array_equal(stack[expert], one)
    info = validate_adapter(tmp_path / "blob")
    by_name = {each.name: each for each in info.modules}
    down = by_name["model.layers.0.mlp.experts.down_proj"]
    assert (down.rank, down.in_features, down.out_features, down.num_experts) == (4, 8, 12, 3)
    assert by_name["model.layers.0.self_attn.q_proj"].num_experts is None


def test_the_size_the_design_promises(tmp_path: Path) -> None:
    shapes = moe_shapes(num_layers=48, num_experts=128, hidden=1, inner=1)
    write_adapter(tmp_path / "source", shapes, config_for(shapes, rank=1))
    assert len(TensorFile(tmp_path / "source").header.tensors) == 37_248
    assert pack(tmp_path / "source", tmp_path / "blob").num_tensors == 672


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    shapes = moe_shapes(num_layers=1, num_experts=12, hidden=4, inner=4)
    write_adapter(tmp_path / "source", shapes, config_for(shapes))
    pack(tmp_path / "source", tmp_path / "blob")
    _assert_equal_deltas(tmp_path / "source", tmp_path / "blob")


def test_two_processes_give_equal_digests(tmp_path: Path) -> None:
    shapes = moe_shapes()
    write_adapter(tmp_path / "source", shapes, config_for(shapes, dtype="bfloat16"))
    program = "import sys, pathlib, mint_lora; print(mint_lora.pack(*map(pathlib.Path, sys.argv[1:])).digest)"
    # Where the packages are found must not depend on how this test run was started.
    path = os.pathsep.join(str(Path(each.__path__[0]).parent) for each in (mint_lora, mint_core))
    digests = set()
    for number, seed in enumerate(("0", "1", "random")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "source"), str(tmp_path / f"blob{number}")],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    digests.add(pack(tmp_path / "source", tmp_path / "blob").digest)
    assert len(digests) == 1
    assert len({(tmp_path / f"blob{number}").read_bytes() for number in range(3)}) == 1


def test_order_and_spelling_of_the_source_do_not_matter(tmp_path: Path) -> None:
    shapes = dense_shapes()
    config = config_for(shapes)
    tensors = write_adapter(tmp_path / "one", shapes, config)
    arrays = {name: next(iter(each.read())) for name, each in reversed(tensors.items())}
    safetensors.numpy.save_file(
        arrays, tmp_path / "other", {METADATA_KEY: json.dumps(json.loads(config.to_json()), indent=1)}
    )
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()
    assert pack(tmp_path / "one", tmp_path / "a").digest == pack(tmp_path / "other", tmp_path / "b").digest


def test_any_change_is_another_digest(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    digests = []
    for number, (seed, changes) in enumerate(
        [(0, {}), (1, {}), (0, {"alpha": 9.0}), (0, {"base_digest": "sha256:" + "0" * 64}), (0, {"use_rslora": True})]
    ):
        write_adapter(tmp_path / f"s{number}", shapes, config_for(shapes, **changes), seed=seed)
        digests.append(pack(tmp_path / f"s{number}", tmp_path / f"b{number}").digest)
    assert len(set(digests)) == 5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1.6e-2)])
def test_patterns_become_one_rank_and_one_scaling(tmp_path: Path, dtype: str, tolerance: float) -> None:
    shapes = moe_shapes(num_layers=2, num_experts=2)
    config = config_for(
        shapes,
        dtype=dtype,
        rank_pattern={"q_proj": 6, "layers.1.self_attn.v_proj": 2, "up_proj": 3},
        alpha_pattern={"o_proj": 5.0, "layers.0.self_attn.k_proj": 3.0},
    )
    write_adapter(tmp_path / "source", shapes, config)
    packed = pack(tmp_path / "source", tmp_path / "blob")
    assert packed.config.is_uniform
    assert packed.config.rank == 6
    assert packed.config.scaling == config.scaling
    _assert_equal_deltas(tmp_path / "source", tmp_path / "blob", tolerance=tolerance)
    assert {each.rank for each in validate_adapter(tmp_path / "blob").modules} == {6}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_powers_of_two_are_exact(tmp_path: Path, dtype: str) -> None:
    shapes = dense_shapes()
    config = config_for(shapes, dtype=dtype, rank_pattern={"q_proj": 8, "down_proj": 2}, alpha_pattern={"o_proj": 1.0})
    write_adapter(tmp_path / "source", shapes, config)
    pack(tmp_path / "source", tmp_path / "blob")
    _assert_equal_deltas(tmp_path / "source", tmp_path / "blob")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rank=st.integers(1, 9),
    ranks=st.dictionaries(
        st.sampled_from(["q_proj", "gate_proj", "layers.0.mlp.experts.1.up_proj"]), st.integers(1, 9)
    ),
    num_experts=st.integers(1, 4),
    rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_deltas_survive_any_configuration(
    tmp_path: Path, rank: int, ranks: dict[str, int], num_experts: int, rslora: bool, seed: int
) -> None:
    shapes = moe_shapes(num_layers=1, num_experts=num_experts, hidden=5, inner=7)
    config = config_for(shapes, rank=rank, rank_pattern=ranks, use_rslora=rslora)
    write_adapter(tmp_path / "source", shapes, config, seed=seed)
    odd = ranks.get("layers.0.mlp.experts.1.up_proj", rank) != rank and num_experts > 1
    if odd:  # one expert unlike its siblings cannot be stacked
        with pytest.raises(InvalidArgument, match="must be alike"):
            pack(tmp_path / "source", tmp_path / "blob")
        return
    pack(tmp_path / "source", tmp_path / "blob")
    _assert_equal_deltas(tmp_path / "source", tmp_path / "blob", tolerance=1e-6)


def _with(tensors: dict[str, TensorSource], **changes: TensorSource | None) -> dict[str, TensorSource]:
    merged: dict[str, TensorSource | None] = {**tensors, **changes}
    return {name: each for name, each in merged.items() if each is not None}


def _f32(*shape: int) -> TensorSource:
    return TensorSource.of(np.ones(shape, np.float32))


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
E1 = f"{PREFIX}model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"{Q0}.lora_B.weight": None}, "has no lora_B"),
        ({f"{Q0}.lora_A.weight": _f32(5, 12)}, "do not fit"),
        ({f"{Q0}.lora_A.weight": _f32(5, 12), f"{Q0}.lora_B.weight": _f32(12, 5)}, "rank 5, the configuration says 4"),
        ({f"{Q0}.lora_A.weight": _f32(4)}, "expected 2 dimensions"),
        ({f"{Q0}.lora_A.weight": _f32(4, 0)}, "expected 2 dimensions"),
        ({f"{Q0}.lora_A.weight": _f32(1, 4, 12), f"{Q0}.lora_B.weight": _f32(1, 12, 4)}, "expected 2 dimensions"),
        ({f"{Q0}.lora_A.weight": TensorSource.of(np.ones((4, 12), np.float64))}, "the configuration says float32"),
        ({f"{Q0}.lora_A.weight": TensorSource.of(np.ones((4, 12), np.int32))}, "the configuration says float32"),
        ({f"{Q0}.lora_A.default.weight": _f32(4, 12)}, "no LoRA matrix"),
        ({f"{Q0}.lora_magnitude_vector": _f32(4)}, "no LoRA matrix"),
        ({"../../etc/passwd": _f32(1)}, "no LoRA matrix"),
        ({f"{E1}.lora_A.weight": None}, "lacks 1 of 3 experts, expert 1 first"),
        ({f"{E1}.lora_A.weight": None, f"{E1}.lora_B.weight": None}, "lacks 1 of 3 experts"),
        ({f"{E1}.lora_A.weight": _f32(4, 11)}, "must be alike"),
        ({f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": _f32(12, 12)}, "target_parameters"),
        ({f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight": _f32(12, 12)}, "target_parameters"),
        (
            {f"{PREFIX}model.norm.lora_A.weight": _f32(4, 12), f"{PREFIX}model.norm.lora_B.weight": _f32(12, 4)},
            "model.norm is adapted but is none of target_modules",
        ),
        ({f"{Q0}.lora_A.weight": TensorSource.of(np.full((4, 12), np.nan, np.float32))}, "infinity or NaN"),
        ({f"{Q0}.lora_B.weight": TensorSource.of(np.full((12, 4), -np.inf, np.float32))}, "infinity or NaN"),
    ],
)
def test_adapters_that_are_none(tmp_path: Path, changes: dict[str, TensorSource | None], says: str) -> None:
    shapes = moe_shapes()
    config = config_for(shapes)
    tensors = write_adapter(tmp_path / "good", shapes, config)
    write_safetensors(tmp_path / "bad", _with(tensors, **changes), config.to_metadata())
    for refused in (lambda: pack(tmp_path / "bad", tmp_path / "blob"), lambda: validate_adapter(tmp_path / "bad")):
        with pytest.raises(InvalidArgument) as caught:
            refused()
        assert says in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad", "good"]


def test_unused_target_and_empty_file(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    config = config_for(
        shapes, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "x")
    )
    write_adapter(tmp_path / "f", shapes, config)
    with pytest.raises(InvalidArgument, match=r"names \['x'\]"):
        pack(tmp_path / "f", tmp_path / "blob")
    write_safetensors(tmp_path / "f", {}, config.to_metadata())
    with pytest.raises(InvalidArgument, match="no tensors"):
        pack(tmp_path / "f", tmp_path / "blob")


def test_what_validation_is_asked_for(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    write_adapter(tmp_path / "f", shapes, config_for(shapes))
    size_bytes = (tmp_path / "f").stat().st_size
    validate_adapter(tmp_path / "f", expected_base_digest=BASE_DIGEST, max_rank=4, max_size_bytes=size_bytes)
    with pytest.raises(BaseModelMismatch) as mismatch:
        validate_adapter(tmp_path / "f", expected_base_digest="sha256:" + "0" * 64)
    assert mismatch.value.metadata["adapter_base_digest"] == BASE_DIGEST
    with pytest.raises(ResourceExhausted, match="rank 4, allowed is 3"):
        validate_adapter(tmp_path / "f", max_rank=3)
    with pytest.raises(ResourceExhausted, match="bytes, allowed are"):
        validate_adapter(tmp_path / "f", max_size_bytes=size_bytes - 1)
    with pytest.raises(InvalidArgument, match="packed-1"):
        validate_adapter(tmp_path / "f", layout=LAYOUT_PACKED)


def test_truncated_at_every_kind_of_place(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    write_adapter(tmp_path / "whole", shapes, config_for(shapes))
    data = (tmp_path / "whole").read_bytes()
    for length in (0, 4, 8, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(InvalidArgument):
            validate_adapter(tmp_path / "cut")


def test_unpack_takes_packed_blobs_only(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    write_adapter(tmp_path / "source", shapes, config_for(shapes))
    with pytest.raises(InvalidArgument, match="expected 'packed-1'"):
        unpack(tmp_path / "source", tmp_path / "out", LAYOUT_PEFT)
    pack(tmp_path / "source", tmp_path / "blob")
    with pytest.raises(InvalidArgument, match="known are packed-1, peft-1, peft-parameters-1, shared-outer-1"):
        unpack(tmp_path / "blob", tmp_path / "out", "packed-9")


def test_packing_a_blob_again_changes_nothing(tmp_path: Path) -> None:
    shapes = moe_shapes()
    write_adapter(tmp_path / "source", shapes, config_for(shapes))
    assert pack(tmp_path / "source", tmp_path / "blob").digest == pack(tmp_path / "blob", tmp_path / "again").digest


def test_the_registry_knows_its_layouts_by_name() -> None:
    assert set(LAYOUTS) == {LAYOUT_PEFT, LAYOUT_PARAMETERS, LAYOUT_PACKED, LAYOUT_SHARED_OUTER}
    assert all(layout_named(name).name == name for name in LAYOUTS)
