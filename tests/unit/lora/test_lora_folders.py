from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mint_core.errors import InvalidArgument
from mint_lora.config import AdapterConfig
from mint_lora.folders import read_peft_folder, write_peft_folder, write_serving_folder
from mint_lora.packing import pack
from support.adapters import BASE_DIGEST, config_for, delta_weights, dense_shapes, moe_shapes, write_adapter


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    shapes = moe_shapes()
    write_adapter(tmp_path / "source", shapes, config_for(shapes, use_rslora=True, rank=4, alpha=6))
    pack(tmp_path / "source", tmp_path / "blob")
    return tmp_path / "blob"


def _import(folder: Path) -> tuple[Path, AdapterConfig]:
    return read_peft_folder(folder, base_model="tiny", base_digest=BASE_DIGEST)


def test_serving_folder_holds_two_files(blob: Path, tmp_path: Path) -> None:
    folder = tmp_path / "serve"
    config = write_serving_folder(blob, folder)
    assert sorted(each.name for each in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").samefile(blob)
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["lora_alpha"] / values["r"] == config.scaling == 3.0
    assert values["peft_type"] == "LORA"
    assert values["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    inode = folder.stat().st_ino
    write_serving_folder(blob, folder)
    assert folder.stat().st_ino == inode
    assert sorted(each.name for each in tmp_path.iterdir()) == ["blob", "serve", "source"]


def test_serving_folder_over_a_file_system_border(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    write_serving_folder(blob, tmp_path / "serve")
    assert (tmp_path / "serve" / "adapter_model.safetensors").read_bytes() == blob.read_bytes()


def test_unpacked_files_are_not_shown_to_engines(blob: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="packed-1"):
        write_serving_folder(tmp_path / "source", tmp_path / "serve")
    assert not (tmp_path / "serve").exists()


def test_peft_folder_there_and_back(blob: Path, tmp_path: Path) -> None:
    write_peft_folder(blob, tmp_path / "peft")
    weights, config = _import(tmp_path / "peft")
    assert config.scaling == 3.0
    assert config.use_rslora
    again = pack(weights, tmp_path / "again", config)
    assert (tmp_path / "again").read_bytes() == blob.read_bytes()
    assert again.config.base_digest == BASE_DIGEST
    with pytest.raises(InvalidArgument, match="exists"):
        write_peft_folder(blob, tmp_path / "peft")


def test_import_resolves_patterns_as_peft_does(tmp_path: Path) -> None:
    shapes = dense_shapes()
    config = config_for(
        shapes, rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 6}, alpha_pattern={"mlp.up_proj": 3.0}
    )
    folder = tmp_path / "peft"
    folder.mkdir()
    write_adapter(folder / "adapter_model.safetensors", shapes, config)
    values = config.to_peft_config()
    # First match first: in this order the longer name counts, in the other order it never would.
    values["rank_pattern"] = {"layers.0.self_attn.q_proj": 2, "q_proj": 6}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    weights, imported = _import(folder)
    assert imported.rank_of("model.layers.0.self_attn.q_proj") == 2
    assert imported.rank_of("model.layers.1.self_attn.q_proj") == 6
    assert imported.scaling_of("model.layers.1.mlp.up_proj") == 0.75
    pack(weights, tmp_path / "blob", imported)
    assert delta_weights(tmp_path / "blob").keys() == delta_weights(weights).keys()
    values["rank_pattern"] = {"q_proj": 6, "layers.0.self_attn.q_proj": 2}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    weights, imported = _import(folder)
    with pytest.raises(InvalidArgument, match="rank 2, the configuration says 6"):
        pack(weights, tmp_path / "blob2", imported)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", "mlp.experts.down_proj"),
        ("target_parameters", [1]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("rank_pattern", {"^model.*": 2}),
        ("rank_pattern", [1]),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
    ],
)
def test_options_that_are_not_supported(blob: Path, tmp_path: Path, key: str, value: Any) -> None:
    write_peft_folder(blob, tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(InvalidArgument) as caught:
        _import(tmp_path / "peft")
    assert caught.value.field in (key, {"r": "rank", "lora_alpha": "alpha"}.get(key))


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"no adapter_model\.safetensors"):
        _import(folder)
    for name in ("adapter_model.bin", "adapter_model.pt", "weights.pth"):
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(InvalidArgument, match=f"{name} is a Python pickle"):
            _import(folder)
        (folder / name).unlink()


def test_links_and_long_files_are_refused(blob: Path, tmp_path: Path) -> None:
    write_peft_folder(blob, tmp_path / "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = tmp_path / "elsewhere"
        (tmp_path / "peft" / name).rename(kept)
        (tmp_path / "peft" / name).symlink_to(kept)
        with pytest.raises(InvalidArgument, match=f"{name} is a link"):
            _import(tmp_path / "peft")
        (tmp_path / "peft" / name).unlink()
        kept.rename(tmp_path / "peft" / name)
    _import(tmp_path / "peft")
    with (tmp_path / "peft" / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json has 1099511627776 bytes"):
        _import(tmp_path / "peft")


def test_modules_of_another_family_are_refused(tmp_path: Path) -> None:
    shapes = dense_shapes()
    write_adapter(tmp_path / "source", shapes, config_for(shapes))
    pack(tmp_path / "source", tmp_path / "blob")
    write_peft_folder(tmp_path / "blob", tmp_path / "peft")

    def read(architecture: str) -> AdapterConfig:
        return read_peft_folder(
            tmp_path / "peft", base_model="tiny", base_digest=BASE_DIGEST, architecture=architecture
        )[1]

    assert read("LlamaForCausalLM") == read("Qwen3ForCausalLM") == read("NeverHeardOfForCausalLM") == read("")
    with pytest.raises(InvalidArgument, match=r"self_attn\.k_proj' is not in models of the DeepSeek-V2/V3 family"):
        read("DeepseekV3ForCausalLM")
    with pytest.raises(InvalidArgument, match=r"mlp\.down_proj' is not in models of the Mixtral family"):
        read("MixtralForCausalLM")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"r": 1, "r": 2}', b"\xff\xfe", b'{"r": Infinity}', b"[" * 100_000])
def test_bad_adapter_config(blob: Path, tmp_path: Path, text: bytes) -> None:
    write_peft_folder(blob, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_bytes(text)
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json"):
        _import(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(InvalidArgument, match=r"no adapter_config\.json"):
        _import(tmp_path / "peft")
    shutil.rmtree(tmp_path / "peft")
