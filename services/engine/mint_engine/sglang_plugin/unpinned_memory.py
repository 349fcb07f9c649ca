"""Pageable instead of pinned host memory where there is no device to pin it for.

Without this hook: ``pin_memory=True requires a CUDA or other accelerator backend`` in SGLang's LoRA layers, in its
torch LoRA backend and in the buffer that keeps routed experts. ``HookRegistry`` wraps functions only; the callers here
use names bound in their modules, so those names are rebound.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

__all__ = ["apply", "is_applied"]

_MODULES = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")
_MARK = "_mint_unpinned"


class _UnpinnedTorch(types.ModuleType):
    """``torch`` as one SGLang module sees it: tensor factories ignore ``pin_memory``."""

    def __init__(self, torch: types.ModuleType) -> None:
        super().__init__("torch")
        self.__dict__[_MARK] = True
        self.__dict__["_torch"] = torch
        for name in _FACTORIES:
            self.__dict__[name] = _unpinned(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_torch"], name)


class _UnpinnedAllocators(dict[str, Callable[..., Any]]):
    """SGLang's table of host allocators by device, each called with ``pin_memory=False``."""

    _mint_unpinned = True

    def __init__(self, allocators: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self._allocators = allocators

    def __missing__(self, device: str) -> Callable[..., Any]:
        allocate = self._allocators[device]
        return lambda *args, **kwargs: allocate(*args, **{**kwargs, "pin_memory": False})


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _keep_pageable(tensor: Any, *_: object, **__: object) -> Any:
    return tensor


def apply() -> None:
    """Rebind the names; calling it again changes nothing."""
    import torch

    if is_applied():
        return
    # Without a device the method can only raise.
    torch.Tensor.pin_memory = _keep_pageable
    for name in _MODULES:
        importlib.import_module(name).__dict__["torch"] = _UnpinnedTorch(torch)
    capturer = importlib.import_module("sglang.srt.state_capturer.base")
    capturer.__dict__["ALLOC_MEMORY_FUNCS"] = _UnpinnedAllocators(capturer.__dict__["ALLOC_MEMORY_FUNCS"])


def is_applied() -> bool:
    """Whether every name is rebound in this process."""
    import torch

    capturer = importlib.import_module("sglang.srt.state_capturer.base")
    return (
        torch.Tensor.pin_memory is _keep_pageable
        and all(hasattr(importlib.import_module(name).__dict__["torch"], _MARK) for name in _MODULES)
        and hasattr(capturer.__dict__["ALLOC_MEMORY_FUNCS"], _MARK)
    )
