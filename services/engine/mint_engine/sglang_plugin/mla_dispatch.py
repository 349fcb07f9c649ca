"""Multi-head latent attention on the torch attention backend (BEFORE ``ModelRunner.load_model``).

Without this hook the answers of MLA models are silently wrong: SGLang's dispatch has no entry for ``torch_native`` and
falls back to a method whose shapes do not fit; log-probabilities were off by up to 3.5.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["before_load_model"]


def before_load_model(*_: Any, **__: Any) -> None:
    """Register ``torch_native`` with the rule that every backend without MLA kernels of its own uses."""
    handler = importlib.import_module("sglang.srt.models.deepseek_common.attention_backend_handler")
    handler.AttentionBackendRegistry.register("torch_native", handler._dispatch_mla_subtype)
