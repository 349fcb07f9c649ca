"""Adapter folders: the one an engine is shown, and PEFT's, in both directions.

An engine is only ever shown a folder that was made here: its loader would fall back to pickled files if it found any.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mint_core.errors import InvalidArgument
from mint_core.files import TEMP_SUFFIX, atomic_file, fsync_dir
from mint_lora.config import LAYOUT_PACKED, LAYOUT_PEFT, AdapterConfig, load_json_object
from mint_lora.dtypes import DTYPES
from mint_lora.header import Header, read_header
from mint_lora.layouts import parse_lora_name
from mint_lora.packing import unpack

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "config_from_peft",
    "read_peft_folder",
    "write_peft_folder",
    "write_serving_folder",
]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}
"""PEFT options that change what an adapter does and that are not supported, each with the values that mean "off"."""


def write_serving_folder(blob_path: Path, folder: Path) -> AdapterConfig:
    """Make ``folder`` for an engine out of a verified packed blob, whole or not at all; returns the configuration.

    The folder holds the blob (a hard link where the file system allows, else a copy) and a generated
    ``adapter_config.json``, nothing else. An existing folder is taken as made earlier: name it by the blob's digest.
    Raises :class:`InvalidArgument` if the blob is not in packed layout.
    """
    config = AdapterConfig.from_metadata(read_header(blob_path).metadata, file_name=blob_path.name)
    if config.layout != LAYOUT_PACKED:
        raise InvalidArgument(
            f"{blob_path.name} has layout {config.layout!r}, expected {LAYOUT_PACKED!r}", field="layout"
        )
    serving_config = config.to_serving_config()

    def fill(temporary: Path) -> None:
        try:
            os.link(blob_path, temporary / WEIGHTS_NAME)
        except OSError:  # another file system, or one without links
            _copy(blob_path, temporary / WEIGHTS_NAME)
        _write_json(temporary / CONFIG_NAME, serving_config)

    _make_folder(folder, fill)
    return config


def write_peft_folder(blob_path: Path, folder: Path) -> AdapterConfig:
    """Make ``folder`` for ``PeftModel.from_pretrained`` out of a packed blob; returns the configuration."""
    configs: list[AdapterConfig] = []

    def fill(temporary: Path) -> None:
        configs.append(unpack(blob_path, temporary / WEIGHTS_NAME, LAYOUT_PEFT))
        _write_json(temporary / CONFIG_NAME, configs[0].to_peft_config())

    if folder.exists():
        raise InvalidArgument(f"{folder} exists: name a new folder", field="folder")
    _make_folder(folder, fill)
    return configs[0]


def read_peft_folder(folder: Path, *, base_model: str, base_digest: str) -> tuple[Path, AdapterConfig]:
    """Find the weights and the configuration of a PEFT folder, ready for :func:`mint_lora.packing.pack`.

    Raises :class:`InvalidArgument` if a file is missing, the weights are pickled, or an option is not supported.
    """
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    if not weights.is_file():
        pickled = sorted(each.name for each in folder.glob("*") if each.suffix in _PICKLES)
        if pickled:
            raise InvalidArgument(
                f"{pickled[0]} is a Python pickle, which MinT never opens; save the adapter as safetensors",
                field="weights",
            )
        raise InvalidArgument(f"{folder.name} has no {WEIGHTS_NAME}: name a PEFT adapter folder", field="weights")
    if not config.is_file():
        raise InvalidArgument(f"{folder.name} has no {CONFIG_NAME}: name a PEFT adapter folder", field="adapter_config")
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{CONFIG_NAME} is not UTF-8: {error}", field="adapter_config") from None
    return weights, config_from_peft(text, read_header(weights), base_model=base_model, base_digest=base_digest)


def config_from_peft(text: str, header: Header, *, base_model: str, base_digest: str) -> AdapterConfig:
    """The configuration of a PEFT adapter from its ``adapter_config.json`` and the tensors it really has.

    PEFT matches the keys of its patterns as regular expressions, first match first; here they are plain names, resolved
    to one entry per module.
    """
    values = load_json_object(text, what="adapter_config.json")
    if str(values.get("peft_type", "")).upper() != "LORA":
        raise _unsupported("peft_type", values.get("peft_type"), "LORA")
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral:
            raise _unsupported(key, values[key], str(neutral[-1]))
    if not header.tensors:
        raise InvalidArgument("the adapter has no tensors", field="weights")
    modules = sorted({parse_lora_name(name).module for name in header.tensors})
    rank, alpha = values.get("r"), values.get("lora_alpha")
    return AdapterConfig(
        rank=rank,  # type: ignore[arg-type]  # checked by AdapterConfig, which names the field
        alpha=alpha,  # type: ignore[arg-type]
        use_rslora=values.get("use_rslora") or False,
        target_modules=tuple({each.rpartition(".")[2] for each in modules}),
        base_model=base_model,
        base_digest=base_digest,
        dtype=DTYPES[next(iter(header.tensors.values())).dtype].common_name,
        rank_pattern=_resolved(values.get("rank_pattern"), "rank_pattern", modules, rank),
        alpha_pattern=_resolved(values.get("alpha_pattern"), "alpha_pattern", modules, alpha),
    )


def _unsupported(key: str, value: Any, expected: str) -> InvalidArgument:
    return InvalidArgument(
        f"{CONFIG_NAME}: {key} is {str(value)[:100]!r}, which is not supported; expected {expected}", field=key
    )


def _resolved(pattern: Any, what: str, modules: list[str], default: Any) -> dict[str, Any]:
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        raise _unsupported(what, pattern, "an object")
    for key in pattern:
        if not key.replace(".", "").replace("_", "").isalnum():
            raise _unsupported(what, key, "plain module names as keys, not regular expressions")
    resolved: dict[str, Any] = {}
    for module in modules:
        value = next((each for key, each in pattern.items() if f".{module}".endswith(f".{key}")), default)
        if value != default:
            resolved[module] = value
    return resolved


def _make_folder(folder: Path, fill: Any) -> None:
    if folder.is_dir():
        return
    temporary = folder.parent / f".{folder.name[:100]}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
    temporary.mkdir()
    try:
        fill(temporary)
        fsync_dir(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another thread or process made the same folder first; theirs is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_dir(folder.parent)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, atomic_file(target) as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode("ascii") + b"\n")
