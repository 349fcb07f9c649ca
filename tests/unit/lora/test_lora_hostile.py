"""Hostile files are refused by name, in little time, and before anything is allocated for what they claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import hostile_adapters
from support.hostile_adapters import HOSTILE, write_hostile

# The longest header here has 24 MB and is read as bytes, never parsed; nothing else comes near.
HEADROOM_BYTES = 64 << 20


@pytest.mark.timeout(60)
def test_hostile_files_are_refused_before_allocation(tmp_path: Path) -> None:
    (tmp_path / "hostile").mkdir()
    write_hostile(tmp_path / "hostile")
    done = subprocess.run(
        [sys.executable, str(hostile_adapters.__file__), str(tmp_path / "hostile"), str(HEADROOM_BYTES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert not result["is_written"]
    assert result["found"].keys() == HOSTILE.keys()
    wrong = {
        name: result["found"][name] for name, (_, says) in HOSTILE.items() if says not in result["found"][name]["said"]
    }
    assert not wrong
    assert {name for name, each in result["found"].items() if each["seconds"] > 5} == set()


def test_a_pattern_for_one_module_does_not_blow_up_the_others(tmp_path: Path) -> None:
    """One module of rank 512 among many of rank 1 would make 512 times the bytes; the limit is asked before writing."""
    from mint_core.errors import ResourceExhausted
    from mint_lora import pack
    from support.adapters import config_for, write_adapter

    shapes = {f"model.layers.{layer}.self_attn.q_proj": (600, 600) for layer in range(50)}
    config = config_for(shapes, rank=1, rank_pattern={"layers.0.self_attn.q_proj": 512})
    write_adapter(tmp_path / "source", shapes, config)
    size_bytes = (tmp_path / "source").stat().st_size
    with pytest.raises(ResourceExhausted, match="with rank 512 for all its modules"):
        pack(tmp_path / "source", tmp_path / "blob", max_size_bytes=4 * size_bytes)
    assert not (tmp_path / "blob").exists()
