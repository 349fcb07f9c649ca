"""What the engine is never shown."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mint_core.errors import BaseModelMismatch, DigestMismatch, InvalidArgument, NotFound, ResourceExhausted
from mint_engine.adapter_folder import AdapterRules, check_adapter_folder
from mint_engine.base_geometry import BaseGeometry, ExpertShape
from mint_lora import AdapterConfig, pack, write_safetensors, write_serving_folder
from mint_lora.config import LAYOUT_SHARED_OUTER

BASE = "sha256:" + "ba5e" * 16
GEOMETRY = BaseGeometry.from_shapes(
    {
        "model.embed_tokens.weight": [50, 16],
        "model.norm.weight": [16],
        **{f"model.layers.0.self_attn.{name}.weight": [8, 16] for name in ("q_proj", "k_proj", "v_proj")},
        "model.layers.0.self_attn.o_proj.weight": [16, 8],
        **{f"model.layers.0.mlp.experts.{e}.gate_proj.weight": [12, 16] for e in range(3)},
        **{f"model.layers.0.mlp.experts.{e}.up_proj.weight": [12, 16] for e in range(3)},
        **{f"model.layers.0.mlp.experts.{e}.down_proj.weight": [16, 12] for e in range(3)},
        "model.layers.1.mlp.gate_proj.weight": [24, 16],
        "model.layers.1.mlp.up_proj.weight": [24, 16],
        "model.layers.1.mlp.down_proj.weight": [16, 24],
    }
)
RULES = AdapterRules(
    base_digest=BASE,
    geometry=GEOMETRY,
    max_lora_rank=8,
    target_modules=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
)
ATTENTION = {
    "model.layers.0.self_attn.q_proj": (8, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.0.self_attn.o_proj": (16, 8),
}


def experts(leaf: str, out_features: int, in_features: int, count: int = 3) -> dict[str, tuple[int, int]]:
    return {f"model.layers.0.mlp.experts.{e}.{leaf}": (out_features, in_features) for e in range(count)}


ROUTED = experts("gate_proj", 12, 16) | experts("up_proj", 12, 16) | experts("down_proj", 16, 12)


def make(
    folder: Path, shapes: dict[str, tuple[int, int]] = ATTENTION, *, rank: int = 4, **changes: object
) -> tuple[Path, str]:
    """A folder as the loader makes it, and its digest."""
    folder.mkdir(exist_ok=True)
    config = AdapterConfig(
        **(
            {
                "rank": rank,
                "alpha": 8.0,
                "target_modules": tuple({name.rpartition(".")[2] for name in shapes}),
                "base_model": "tiny",
                "base_digest": BASE,
                "dtype": "float32",
            }
            | changes
        )
    )
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((rank, in_features), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((out_features, rank), np.float32)
    write_safetensors(folder / "source", tensors, config.to_metadata())
    packed = pack(folder / "source", folder / "blob")
    write_serving_folder(packed.path, folder / "adapter")
    return folder / "adapter", packed.digest


@pytest.mark.parametrize(
    "shapes",
    [
        ATTENTION,
        ROUTED,
        ATTENTION | ROUTED,
        {"model.layers.1.mlp.gate_proj": (24, 16)},
        {"model.layers.1.mlp.gate_proj": (24, 16), "model.layers.1.mlp.up_proj": (24, 16)},
        {"model.layers.1.mlp.down_proj": (16, 24)},
    ],
)
def test_what_the_loader_writes_passes(tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    path, digest = make(tmp_path, shapes)
    folder = check_adapter_folder(path, digest, RULES)
    assert (folder.path, folder.rank) == (path, 4)
    assert folder.size_bytes == (path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (ATTENTION | {"model.layers.7.self_attn.q_proj": (8, 16)}, "no linear module model.layers.7"),
        (ATTENTION | {"model.embed_tokens": (50, 16)}, "slots for"),
        ({**ATTENTION, "model.layers.0.self_attn.o_proj": (16, 9)}, "o_proj has"),
        ({**ATTENTION, "model.layers.0.self_attn.q_proj": (9, 16)}, "q_proj has"),
        ({"model.layers.0.self_attn.q_proj": (8, 16)}, "lacks.*v_proj"),
        ({"model.layers.0.self_attn.k_proj": (8, 16)}, "lacks.*q_proj"),
        ({"model.layers.1.mlp.up_proj": (24, 16)}, "lacks.*gate_proj"),
        (experts("gate_proj", 12, 16) | experts("up_proj", 12, 16), "lacks.*down_proj"),
        (experts("down_proj", 16, 12), "gate, up and down together"),
        ({**ROUTED, **experts("gate_proj", 13, 16)}, "gate_proj has"),
    ],
)
def test_what_the_base_does_not_have_is_named(tmp_path: Path, shapes: dict[str, tuple[int, int]], message: str) -> None:
    path, digest = make(tmp_path, shapes)
    with pytest.raises(InvalidArgument, match=message):
        check_adapter_folder(path, digest, RULES)


def test_wrong_number_of_experts_is_named(tmp_path: Path) -> None:
    shapes = experts("gate_proj", 12, 16, 4) | experts("up_proj", 12, 16, 4) | experts("down_proj", 16, 12, 4)
    path, digest = make(tmp_path, shapes)
    with pytest.raises(InvalidArgument, match=r"\(4, .*base has \(3,"):
        check_adapter_folder(path, digest, RULES)


def test_experts_may_share_a_matrix_only_where_the_engine_spreads_it(tmp_path: Path) -> None:
    tensors = {}
    for leaf, (out_features, in_features) in (("gate_proj", (12, 16)), ("up_proj", (12, 16)), ("down_proj", (16, 12))):
        prefix = f"base_model.model.model.layers.0.mlp.experts.{leaf}"
        num_a, num_b = (3, 1) if leaf == "down_proj" else (1, 3)
        tensors[f"{prefix}.lora_A.weight"] = np.ones((num_a, 4, in_features), np.float32)
        tensors[f"{prefix}.lora_B.weight"] = np.ones((num_b, out_features, 4), np.float32)
    config = AdapterConfig(
        rank=4,
        alpha=8.0,
        target_modules=("gate_proj", "up_proj", "down_proj"),
        base_model="tiny",
        base_digest=BASE,
        dtype="float32",
        layout=LAYOUT_SHARED_OUTER,
    )
    write_safetensors(tmp_path / "source", tensors, config.to_metadata())
    packed = pack(tmp_path / "source", tmp_path / "blob")
    write_serving_folder(packed.path, tmp_path / "adapter")
    spreading = dataclasses.replace(RULES, spreads_shared_experts=True)
    assert check_adapter_folder(tmp_path / "adapter", packed.digest, spreading).num_tensors == 6
    with pytest.raises(InvalidArgument, match="share a matrix"):
        check_adapter_folder(tmp_path / "adapter", packed.digest, RULES)


def test_foreign_base_high_rank_and_other_bytes(tmp_path: Path) -> None:
    path, digest = make(tmp_path / "foreign", base_digest="sha256:" + "0" * 64)
    with pytest.raises(BaseModelMismatch):
        check_adapter_folder(path, digest, RULES)
    path, digest = make(tmp_path / "high", rank=9)
    with pytest.raises(ResourceExhausted, match="rank 9"):
        check_adapter_folder(path, digest, RULES)
    path, _ = make(tmp_path / "good")
    with pytest.raises(DigestMismatch, match="fetch it again"):
        check_adapter_folder(path, "sha256:" + "1" * 64, RULES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.bin", pickle.dumps({"weights": [1]})),
        ("added_tokens.json", b'{"<new>": 50}'),
        ("model.pt", b"x"),
        (".hidden", b""),
    ],
)
def test_any_other_file_in_the_folder_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path, digest = make(tmp_path)
    (path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match="also holds"):
        check_adapter_folder(path, digest, RULES)


def test_missing_files_and_folders_and_links(tmp_path: Path) -> None:
    path, digest = make(tmp_path)
    with pytest.raises(NotFound):
        check_adapter_folder(tmp_path / "absent", digest, RULES)
    with pytest.raises(NotFound):
        check_adapter_folder(path / "adapter_config.json", digest, RULES)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InvalidArgument, match="link"):
        check_adapter_folder(tmp_path / "link", digest, RULES)
    weights = path / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match="missing"):
        check_adapter_folder(path, digest, RULES)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match="not a regular file"):
        check_adapter_folder(path, digest, RULES)


def test_pickle_in_place_of_weights_and_truncated_weights(tmp_path: Path) -> None:
    path, digest = make(tmp_path)
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(InvalidArgument, match="pickle"):
        check_adapter_folder(path, digest, RULES)
    weights.write_bytes(whole[:-4])
    with pytest.raises(InvalidArgument, match="cut off"):
        check_adapter_folder(path, digest, RULES)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 8},
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"peft_type": "IA3"},
    ],
)
def test_configuration_must_be_the_one_the_weights_imply(tmp_path: Path, change: dict[str, object]) -> None:
    path, digest = make(tmp_path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InvalidArgument, match=next(iter(change))):
        check_adapter_folder(path, digest, RULES)


def test_configuration_that_is_no_json(tmp_path: Path) -> None:
    path, digest = make(tmp_path)
    for content in (b"\xff\xfe", b"[]", b"{", b"{" + b" " * (1 << 20)):
        (path / "adapter_config.json").write_bytes(content)
        with pytest.raises(InvalidArgument):
            check_adapter_folder(path, digest, RULES)


def test_geometry_reads_fused_experts_like_separate_ones() -> None:
    fused = BaseGeometry.from_shapes(
        {
            "model.layers.0.mlp.experts.gate_up_proj": [3, 24, 16],
            "model.layers.0.mlp.experts.down_proj": [3, 16, 12],
        }
    )
    assert fused.experts == GEOMETRY.experts
    assert fused.experts["model.layers.0.mlp.experts"]["up_proj"] == ExpertShape(3, 12, 16)
    assert "model.norm" not in GEOMETRY.linears


def test_geometry_calls_the_experts_of_mixtral_as_the_packed_layout_does() -> None:
    geometry = BaseGeometry.from_shapes(
        {
            "model.layers.0.block_sparse_moe.gate.weight": [2, 16],
            **{
                f"model.layers.0.block_sparse_moe.experts.{e}.{leaf}.weight": [12, 16]
                for e in (0, 1)
                for leaf in ("w1", "w3")
            },
            **{f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight": [16, 12] for e in (0, 1)},
        }
    )
    wide, narrow = ExpertShape(2, 12, 16), ExpertShape(2, 16, 12)
    assert geometry.experts == {"model.layers.0.mlp.experts": {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}}
    assert geometry.linears == {"model.layers.0.mlp.gate": (2, 16)}
