"""Entry point ``sglang.srt.platforms`` / ``mint_cpu``: makes SGLang importable and at home on a CPU."""

from __future__ import annotations

import os

from mint_engine.sglang_plugin.import_gaps import close_import_gaps
from mint_engine.sglang_plugin.version import check_sglang_version, runs_without_gpu

__all__ = ["CPU_ENGINE_VARIABLE", "activate"]

CPU_ENGINE_VARIABLE = "SGLANG_USE_CPU_ENGINE"
"""SGLang's own switch for its CPU path; read by many of its modules on import."""


def activate() -> str | None:
    """Return the platform class to use, or ``None`` where CUDA is present and SGLang's own platform is right."""
    check_sglang_version()
    if not runs_without_gpu():
        return None
    os.environ[CPU_ENGINE_VARIABLE] = "1"
    close_import_gaps()
    return "mint_engine.sglang_plugin.cpu_platform:MintCpuPlatform"
