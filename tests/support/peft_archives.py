"""Random adapters as archives of PEFT folders."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from mint_lora import pack, write_peft_folder
from support.adapters import config_for, write_adapter

__all__ = ["peft_archive", "tar_of"]


def peft_archive(folder: Path, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0) -> bytes:
    """A tar.gz; ``folder`` is made, with the PEFT folder ``peft`` inside."""
    folder.mkdir()
    write_adapter(folder / "source", shapes, config_for(shapes), seed=seed)
    pack(folder / "source", folder / "blob")
    write_peft_folder(folder / "blob", folder / "peft")
    return tar_of(folder / "peft")


def tar_of(folder: Path) -> bytes:
    """A tar.gz of a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.add(folder, folder.name)
    return buffer.getvalue()
