"""Adapter folders: the one an engine is shown, and PEFT's, in both directions.

An engine is only ever shown a folder that was made here: its loader would fall back to pickled files if it found any.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mint_core.errors import InvalidArgument
from mint_core.files import TEMP_SUFFIX, atomic_file, fsync_dir
from mint_lora.config import LAYOUT_PACKED, LAYOUT_PARAMETERS, LAYOUT_PEFT, AdapterConfig
from mint_lora.families import family_of
from mint_lora.header import read_header
from mint_lora.packing import unpack
from mint_lora.peft_config import CONFIG_NAME, config_from_peft

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "read_peft_folder",
    "write_peft_folder",
    "write_serving_folder",
]

WEIGHTS_NAME = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 1 << 20
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def write_serving_folder(
    blob_path: Path, folder: Path, *, durable: bool = True, config: AdapterConfig | None = None
) -> AdapterConfig:
    """Make ``folder`` for an engine out of a verified packed blob, whole or not at all; returns the configuration.

    The folder holds the blob (a hard link where the file system allows, else a copy) and a generated
    ``adapter_config.json``, nothing else. An existing folder is taken as made earlier: name it by the blob's digest.
    Without ``durable`` nothing is synced: for whoever syncs the folder before it counts. ``config`` is the blob's own,
    from whoever has just read it. Raises :class:`InvalidArgument` if the blob is not in packed layout.
    """
    if config is None:
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
            _copy(blob_path, temporary / WEIGHTS_NAME, durable=durable)
        _write_json(temporary / CONFIG_NAME, serving_config, durable=durable)

    _make_folder(folder, fill, durable=durable)
    return config


def write_peft_folder(
    blob_path: Path, folder: Path, *, layout: str | None = None, architecture: str = ""
) -> AdapterConfig:
    """Make ``folder`` for ``PeftModel.from_pretrained`` out of a packed blob; returns the configuration.

    Without ``layout``, an adapter of a model with routed experts is written as parameters, which PEFT loads into
    transformers 5 for every family, any other as modules. ``LAYOUT_PEFT`` gives single experts to consumers that want
    them; ``architecture`` of the base then says what its family calls them. Raises :class:`InvalidArgument` if the
    folder exists.
    """
    if layout is None:
        layout = LAYOUT_PARAMETERS if _has_experts(blob_path, architecture) else LAYOUT_PEFT
    configs: list[AdapterConfig] = []

    def fill(temporary: Path) -> None:
        configs.append(unpack(blob_path, temporary / WEIGHTS_NAME, layout, architecture=architecture))
        _write_json(temporary / CONFIG_NAME, configs[0].to_peft_config())

    if folder.exists():
        raise InvalidArgument(f"{folder} exists: name a new folder", field="folder")
    _make_folder(folder, fill)
    return configs[0]


def _has_experts(blob_path: Path, architecture: str) -> bool:
    family = family_of(architecture)
    if family is not None:
        return family.has_experts
    return any("expert" in name for name in read_header(blob_path).tensors)


def read_peft_folder(
    folder: Path, *, base_model: str, base_digest: str, architecture: str = ""
) -> tuple[Path, AdapterConfig]:
    """Find the weights and the configuration of a PEFT folder, ready for :func:`mint_lora.packing.pack`.

    Only the two files are looked at, and only if they are regular files and no links. Raises :class:`InvalidArgument`
    if one is missing, the weights are pickled, or an option is not supported; see :func:`config_from_peft`.
    """
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    if not _is_regular(weights):
        pickled = sorted(each.name for each in folder.glob("*") if each.suffix in _PICKLES)
        if pickled:
            raise InvalidArgument(
                f"{pickled[0]} is a Python pickle, which MinT never opens; save the adapter as safetensors",
                field="weights",
            )
        raise InvalidArgument(f"{folder.name} has no {WEIGHTS_NAME}: name a PEFT adapter folder", field="weights")
    if not _is_regular(config):
        raise InvalidArgument(f"{folder.name} has no {CONFIG_NAME}: name a PEFT adapter folder", field="adapter_config")
    size_bytes = config.lstat().st_size
    if size_bytes > _MAX_CONFIG_BYTES:
        raise InvalidArgument(
            f"{CONFIG_NAME} has {size_bytes} bytes, allowed are {_MAX_CONFIG_BYTES}", field="adapter_config"
        )
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{CONFIG_NAME} is not UTF-8: {error}", field="adapter_config") from None
    adapter_config = config_from_peft(
        text, read_header(weights), base_model=base_model, base_digest=base_digest, architecture=architecture
    )
    return weights, adapter_config


def _is_regular(path: Path) -> bool:
    """Whether there is a file itself: a link could lead out of the folder."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise InvalidArgument(f"{path.name} is a link: an adapter folder holds the files themselves", field="folder")
    return stat.S_ISREG(mode)


def _make_folder(folder: Path, fill: Any, *, durable: bool = True) -> None:
    if folder.is_dir():
        return
    temporary = folder.parent / f".{folder.name[:100]}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
    temporary.mkdir()
    try:
        fill(temporary)
        if durable:
            fsync_dir(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another thread or process made the same folder first; theirs is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if durable:
        fsync_dir(folder.parent)


def _copy(source: Path, target: Path, *, durable: bool) -> None:
    with source.open("rb") as reading, atomic_file(target, durable=durable) as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)


def _write_json(path: Path, value: Mapping[str, object], *, durable: bool = True) -> None:
    with atomic_file(path, durable=durable) as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode("ascii") + b"\n")
