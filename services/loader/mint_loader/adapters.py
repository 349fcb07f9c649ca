"""What an engine may be shown: a folder generated from a checked blob, and whether it still is what was generated."""

from __future__ import annotations

import json
from pathlib import Path

from mint_blobs.digests import digest_file_sync
from mint_core.errors import InvalidArgument
from mint_lora import LAYOUT_PACKED, AdapterConfig, read_header, validate_adapter, write_serving_folder
from mint_lora.folders import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["verify_adapter", "write_adapter"]


def write_adapter(blob: Path, folder: Path, *, base_digest: str) -> None:
    """Check the blob and make ``folder`` of it; an :class:`~mint_loader.model.AdapterWriter`."""
    info = validate_adapter(blob, expected_base_digest=base_digest, layout=LAYOUT_PACKED)
    # The cache syncs the folder before it gives it its name; until then it is nobody's.
    write_serving_folder(blob, folder, durable=False, config=info.config)


def verify_adapter(folder: Path, digest: str) -> bool:
    """Whether the weights still have their digest and the configuration is the one they generate; blocks while it
    reads.

    A flipped bit in the configuration would scale the adapter wrongly and no digest would tell. Raises
    :class:`OSError` for what cannot be read.
    """
    weights = folder / WEIGHTS_NAME
    if digest_file_sync(weights) != digest:
        return False
    try:
        config = AdapterConfig.from_metadata(read_header(weights).metadata, file_name=weights.name)
        return bool(json.loads((folder / CONFIG_NAME).read_bytes()) == config.to_serving_config())
    except (InvalidArgument, ValueError):
        return False
