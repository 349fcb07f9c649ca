"""One mapped file instead of a read for each tensor: the same numbers, and what is not ours to read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint_core.errors import InvalidArgument
from mint_engine.sglang_plugin.packed_weights import read_packed_weights

TENSORS = {
    "base_model.model.a.lora_A.weight": torch.randn(3, 5),
    "base_model.model.a.lora_B.weight": torch.randn(7, 3),
    "base_model.model.b.experts.up_proj.lora_A.weight": torch.randn(4, 3, 5),
    "base_model.model.c.lora_A.weight": torch.randn(1, 5),
    "base_model.model.c.lora_B.weight": torch.zeros(0, 1),
    "base_model.model.d.scalar": torch.tensor(7.0),
}


def folder_of(path: Path, tensors: dict[str, torch.Tensor], **files: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    save_file(tensors, path / "adapter_model.safetensors", metadata={"some": "thing"})
    for name, content in files.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = folder_of(tmp_path / "adapter", {name: tensor.to(dtype) for name, tensor in TENSORS.items()})
    found = read_packed_weights(folder)
    expected = load_file(folder / "adapter_model.safetensors")
    assert found is not None
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == dtype
        assert torch.equal(found.tensors[name], tensor)


def test_tensors_outlive_the_file_and_do_not_write_to_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter", TENSORS)
    weights = folder / "adapter_model.safetensors"
    before, link = weights.read_bytes(), tmp_path / "other name"
    found = read_packed_weights(folder)
    assert found is not None
    link.hardlink_to(weights)
    weights.unlink()
    for name, tensor in TENSORS.items():
        assert torch.equal(found.tensors[name], tensor)
        found.tensors[name].zero_()
    assert link.read_bytes() == before


def test_header_that_leaves_tensors_unaligned_is_read_all_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter", TENSORS)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()
    header += b" " * (3 - len(header) % 2)
    assert len(header) % 2
    weights.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    found = read_packed_weights(folder)
    assert found is not None
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_what_is_not_a_packed_adapter_is_left_to_sglang(tmp_path: Path) -> None:
    assert read_packed_weights(tmp_path / "absent") is None
    assert read_packed_weights(folder_of(tmp_path / "more", TENSORS, other="file")) is None
    mixed = {**TENSORS, "base_model.model.e.lora_A.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    assert read_packed_weights(folder_of(tmp_path / "mixed", mixed)) is None
    assert read_packed_weights(folder_of(tmp_path / "fp8", {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)})) is None
    linked = folder_of(tmp_path / "linked", TENSORS)
    (linked / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (linked / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert read_packed_weights(linked) is None


def test_damaged_file_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter", TENSORS)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidArgument, match="cut off"):
        read_packed_weights(folder)
