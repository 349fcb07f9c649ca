"""Closes what SGLang imports unconditionally and a machine without a GPU does not have.

Both gaps must be closed before SGLang's own modules are imported, so this module imports nothing of SGLang.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, NoReturn

__all__ = ["close_import_gaps", "ensure_torchvision_imports", "provide_sgl_kernel"]

# Library registrations live as long as the object that made them.
_libraries: list[Any] = []


def close_import_gaps() -> None:
    """Make ``import sgl_kernel`` and ``import torchvision`` work on a CPU build of torch."""
    provide_sgl_kernel()
    ensure_torchvision_imports()


def provide_sgl_kernel() -> None:
    """Put an empty ``sgl_kernel`` in place if none is installed.

    With ``SGLANG_USE_CPU_ENGINE=1`` SGLang imports the package on start, and PyPI has no CPU build of it. Registering
    no operators is what makes SGLang's layers choose their pure-torch path; whatever is called all the same says its
    name.
    """
    if "sgl_kernel" in sys.modules or importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel", "Provided by MinT: SGLang without compiled CPU operators.")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__path__ = []
    module.__dict__["__version__"] = "0.0.0+mint.cpu"

    def missing_kernel(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel and this machine has no GPU")

        return refuse

    module.__dict__["__getattr__"] = missing_kernel
    sys.modules["sgl_kernel"] = module


def ensure_torchvision_imports() -> None:
    """Import torchvision; where its compiled part does not fit this torch, declare the operators it then lacks.

    PyPI's torchvision for Linux is linked against CUDA. Beside a CPU build of torch its library does not load and the
    import dies with ``operator torchvision::nms does not exist``, because the package attaches shape rules to operators
    that nobody declared. The declarations have no implementation; nothing on MinT's way calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return
    import torch

    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    importlib.import_module("torchvision")
