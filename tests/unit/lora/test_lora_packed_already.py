"""A file that is what packing would write is not written again; anything else is."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mint_core.errors import InvalidArgument
from mint_lora import LAYOUT_PACKED, is_packed_name, pack
from mint_lora.tensors import write_safetensors
from support.adapters import config_for, dense_shapes, moe_shapes, write_adapter

DIGEST = "sha256:" + "0" * 64


def test_what_was_packed_is_its_own_result(tmp_path: Path) -> None:
    shapes = moe_shapes()
    write_adapter(tmp_path / "peft", shapes, config_for(shapes))
    first = pack(tmp_path / "peft", tmp_path / "packed", source_digest=DIGEST)
    assert (first.path, first.digest == DIGEST) == (tmp_path / "packed", False)
    again = pack(first.path, tmp_path / "again", source_digest=first.digest)
    assert again == first
    assert not (tmp_path / "again").exists()
    assert pack(first.path, tmp_path / "again").digest == first.digest


def test_another_spelling_of_the_same_header_is_written_anew(tmp_path: Path) -> None:
    shapes = dense_shapes()
    write_adapter(tmp_path / "peft", shapes, config_for(shapes))
    first = pack(tmp_path / "peft", tmp_path / "packed")
    data = first.path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 8)
    other = tmp_path / "spaced"
    other.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    repacked = pack(other, tmp_path / "again", source_digest=DIGEST)
    assert (repacked.path, repacked.digest) == (tmp_path / "again", first.digest)


def test_unequal_ranks_and_bad_numbers_are_seen_in_a_packed_file_too(tmp_path: Path) -> None:
    shapes = dense_shapes(num_layers=1)
    config = config_for(shapes, rank_pattern={"q_proj": 2}, layout=LAYOUT_PACKED)
    write_adapter(tmp_path / "patterned", shapes, config)
    assert pack(tmp_path / "patterned", tmp_path / "blob", source_digest=DIGEST).path == tmp_path / "blob"
    module = "model.layers.0.self_attn.q_proj"
    bad = {
        f"base_model.model.{module}.lora_A.weight": np.full((4, 12), np.nan, dtype=np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((12, 4), dtype=np.float32),
    }
    config = config_for({module: (12, 12)}, layout=LAYOUT_PACKED)
    write_safetensors(tmp_path / "bad", bad, config.to_metadata())
    with pytest.raises(InvalidArgument, match="NaN"):
        pack(tmp_path / "bad", tmp_path / "blob", source_digest=DIGEST)


@pytest.mark.parametrize(
    ("module", "is_packed"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.mlp.experts.gate_proj", True),
        ("model.layers.0.mlp.experts.3.gate_proj", False),
        ("model.layers.0.block_sparse_moe.gate", False),
    ],
)
def test_names_that_the_packed_layout_has(module: str, is_packed: bool) -> None:
    assert is_packed_name(f"base_model.model.{module}.lora_A.weight") is is_packed
