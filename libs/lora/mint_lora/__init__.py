"""LoRA adapters as files: layouts, packing, validation. numpy over safetensors bytes; no torch, no pickle.

===========================  ==================================================================
:mod:`mint_lora.header`        the strict header reader: nothing is believed before it agrees
:mod:`mint_lora.dtypes`        element types, bfloat16 over uint16 views
:mod:`mint_lora.tensors`       byte views of tensors, the deterministic writer
:mod:`mint_lora.config`        what an adapter's numbers mean, as canonical JSON
:mod:`mint_lora.families`      what model families call their modules
:mod:`mint_lora.pivot`         what every layout is turned into
:mod:`mint_lora.layouts`       one codec per layout (``layout_…``), with the packed layout as pivot
:mod:`mint_lora.stacks`        what codecs do with stacks of experts
:mod:`mint_lora.packing`       training state to serving blob and back
:mod:`mint_lora.validation`    whether a file is an adapter that fits a base
:mod:`mint_lora.peft_config`   PEFT's configuration as ours
:mod:`mint_lora.folders`       folders for engines and for PEFT
:mod:`mint_lora.diff`          what lies between two adapters
===========================  ==================================================================
"""

from __future__ import annotations

from mint_lora.config import (
    LAYOUT_PACKED,
    LAYOUT_PARAMETERS,
    LAYOUT_PEFT,
    LAYOUT_SHARED_OUTER,
    METADATA_KEY,
    AdapterConfig,
)
from mint_lora.diff import AdapterDiff, ConfigChange, ModuleDiff, diff_adapters
from mint_lora.folders import read_peft_folder, write_peft_folder, write_serving_folder
from mint_lora.header import Header, TensorInfo, read_header
from mint_lora.layout_packed import is_packed_name
from mint_lora.packing import PackedAdapter, pack, unpack
from mint_lora.peft_config import config_from_peft
from mint_lora.tensors import TensorFile, TensorSource, WrittenFile, write_safetensors
from mint_lora.validation import AdapterInfo, ModuleInfo, validate_adapter

__all__ = [
    "LAYOUT_PACKED",
    "LAYOUT_PARAMETERS",
    "LAYOUT_PEFT",
    "LAYOUT_SHARED_OUTER",
    "METADATA_KEY",
    "AdapterConfig",
    "AdapterDiff",
    "AdapterInfo",
    "ConfigChange",
    "Header",
    "ModuleDiff",
    "ModuleInfo",
    "PackedAdapter",
    "TensorFile",
    "TensorInfo",
    "TensorSource",
    "WrittenFile",
    "config_from_peft",
    "diff_adapters",
    "is_packed_name",
    "pack",
    "read_header",
    "read_peft_folder",
    "unpack",
    "validate_adapter",
    "write_peft_folder",
    "write_safetensors",
    "write_serving_folder",
]
