"""The one SGLang release these hooks fit, and the refusal of any other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mint_core.errors import FailedPrecondition

__all__ = ["SUPPORTED_SGLANG_VERSION", "check_sglang_version", "runs_without_gpu"]

SUPPORTED_SGLANG_VERSION = "0.5.23"
"""Hooks name private functions of SGLang, which change between releases without notice."""


def check_sglang_version() -> str:
    """Return the installed SGLang version; :class:`FailedPrecondition` unless it is the supported one."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise FailedPrecondition(
            f"SGLang is not installed in this environment; install sglang=={SUPPORTED_SGLANG_VERSION}"
        ) from None
    if found != SUPPORTED_SGLANG_VERSION:
        raise FailedPrecondition(
            f"MinT's engine plugin fits sglang {SUPPORTED_SGLANG_VERSION} and found {found}; "
            f"install sglang=={SUPPORTED_SGLANG_VERSION}",
            metadata={"expected": SUPPORTED_SGLANG_VERSION, "found": found},
        )
    return found


def runs_without_gpu() -> bool:
    """Whether the CPU adaptations apply: no CUDA device is usable in this process."""
    import torch

    return not torch.cuda.is_available()
