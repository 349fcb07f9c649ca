"""LoRA adapters as files: layouts, packing, validation. numpy over safetensors bytes; no torch, no pickle.

===========================  ==================================================================
:mod:`mint_lora.header`        the strict header reader: nothing is believed before it agrees
:mod:`mint_lora.dtypes`        element types, bfloat16 over uint16 views
:mod:`mint_lora.tensors`       byte views of tensors, the deterministic writer
:mod:`mint_lora.config`        what an adapter's numbers mean, as canonical JSON
:mod:`mint_lora.layouts`       one codec per layout, with the packed layout as pivot
:mod:`mint_lora.packing`       training state to serving blob and back
:mod:`mint_lora.validation`    whether a file is an adapter that fits a base
:mod:`mint_lora.folders`       folders for engines and for PEFT
===========================  ==================================================================
"""

from __future__ import annotations

from mint_lora.config import LAYOUT_PACKED, LAYOUT_PEFT, METADATA_KEY, AdapterConfig
from mint_lora.folders import config_from_peft, read_peft_folder, write_peft_folder, write_serving_folder
from mint_lora.header import Header, TensorInfo, read_header
from mint_lora.packing import PackedAdapter, pack, unpack
from mint_lora.tensors import TensorFile, TensorSource, WrittenFile, write_safetensors
from mint_lora.validation import AdapterInfo, ModuleInfo, validate_adapter

__all__ = [
    "LAYOUT_PACKED",
    "LAYOUT_PEFT",
    "METADATA_KEY",
    "AdapterConfig",
    "AdapterInfo",
    "Header",
    "ModuleInfo",
    "PackedAdapter",
    "TensorFile",
    "TensorInfo",
    "TensorSource",
    "WrittenFile",
    "config_from_peft",
    "pack",
    "read_header",
    "read_peft_folder",
    "unpack",
    "validate_adapter",
    "write_peft_folder",
    "write_safetensors",
    "write_serving_folder",
]
