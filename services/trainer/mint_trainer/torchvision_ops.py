"""Makes torchvision importable beside a torch it was not built for; import this before transformers or PEFT.

transformers imports torchvision wherever it is installed. A torchvision built for CUDA beside the CPU build of torch
(what pip installs on a machine without GPU) fails at import because the operators of its compiled part are not
declared. The trainer reads no images, so declaring them is enough; they are never called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

__all__: list[str] = []

_libraries: list[torch.library.Library] = []  # a Library's declarations vanish when it is collected


def _declare_missing_operators() -> None:
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


_declare_missing_operators()
