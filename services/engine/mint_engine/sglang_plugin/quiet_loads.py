"""Loads and unloads adapters without the lines that SGLang makes up for its log (REPLACE ``load_lora_adapter`` and
``unload_lora_adapter`` of ``LoRAManager``).

Both only wrap the work in two lines each, which are put together whether or not anybody reads them: for each, SGLang
asks the kernel and the control group for free memory and goes through all fields of the adapter's reference. That is a
fifth of what a small adapter's load and unload take, in the loop that also computes. The host logs each of them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_lora_adapter", "unload_lora_adapter"]


def load_lora_adapter(manager: Any, lora_ref: Any) -> Any:
    """Load the adapter of ``lora_ref``; SGLang's own result."""
    return manager._load_lora_adapter(lora_ref)


def unload_lora_adapter(manager: Any, lora_ref: Any) -> Any:
    """Forget the adapter of ``lora_ref``; SGLang's own result."""
    return manager._unload_lora_adapter(lora_ref)
