"""Starts ``sglang.Engine`` with the plugin in place, or says in one sentence why it is not."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin.platform import CPU_ENGINE_VARIABLE
from mint_engine.sglang_plugin.version import check_sglang_version, runs_without_gpu

__all__ = ["ENTRY_POINTS", "check_entry_points", "launch_engine"]

ENTRY_POINTS = {
    "sglang.srt.platforms": ("mint_cpu", "mint_engine.sglang_plugin.platform:activate"),
    "sglang.srt.plugins": ("mint", "mint_engine.sglang_plugin.hooks:register"),
}
"""By group: the name and the target that MinT's distribution declares."""

_ENVIRONMENT = {
    # Log-probabilities of the model's own distribution, so that generating and scoring the same tokens agree.
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
}

_NUM_CHECKED_LAYERS = 4

_CPU_ENVIRONMENT = {
    CPU_ENGINE_VARIABLE: "1",
    # SGLang compiles the routing of experts at the first request that needs it: with a C++ compiler, which the machine
    # may not have, for a minute, in which nothing else is served. Without a GPU there is nothing to win by it.
    "TORCHDYNAMO_DISABLE": "1",
}


def check_entry_points() -> None:
    """Raise :class:`FailedPrecondition` unless SGLang's processes will find MinT's plugin and are allowed to load
    it."""
    for group, (name, target) in ENTRY_POINTS.items():
        if not any(
            point.name == name and point.value.replace(" ", "") == target for point in entry_points(group=group)
        ):
            raise FailedPrecondition(
                f"no installed distribution declares entry point {name} = {target} in group {group}; "
                "install MinT into this environment (pip install -e .)"
            )
        allowed = os.environ.get("SGLANG_PLUGINS", "")
        if allowed and name not in {part.strip() for part in allowed.split(",")}:
            raise FailedPrecondition(
                f"SGLANG_PLUGINS is {allowed!r} and leaves out {name}; add it or unset the variable"
            )


@contextlib.contextmanager
def _kept_logging() -> Iterator[None]:
    """SGLang configures the root logger as if the process were its own; put ours back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def launch_engine(
    arguments: Mapping[str, Any], *, fast_upload: bool, slot_turn_passes: int, self_check_timeout_ms: int
) -> Any:
    """Start the engine, wait until the base is loaded, and have every scheduler prove its hooks.

    Adapters take turns of ``slot_turn_passes``; 0 lets each keep its slot. With ``fast_upload`` it also proves, without
    a GPU, that adapters get into the slots as SGLang would bring them.

    Blocks. Raises :class:`FailedPrecondition` when the plugin is not in place; what SGLang raises otherwise.
    """
    check_sglang_version()
    check_entry_points()
    os.environ.update(_ENVIRONMENT)
    if runs_without_gpu():
        os.environ.update(_CPU_ENVIRONMENT)
    # The first import of SGLang runs the platform entry point; applying the hooks here as well turns what would end a
    # scheduler process into an error of this one.
    from sglang.srt.entrypoints.engine import Engine

    from mint_engine.sglang_plugin.fast_upload import SET_FAST_UPLOAD_METHOD
    from mint_engine.sglang_plugin.hooks import SELF_CHECK_METHOD, apply_hooks
    from mint_engine.sglang_plugin.slot_turns import SET_SLOT_TURNS_METHOD
    from mint_engine.sglang_plugin.upload_check import UPLOAD_CHECK_METHOD

    apply_hooks()
    with _kept_logging():
        engine = Engine(**arguments)
    # SGLang's clean-up at exit kills every child of this process; MinT ends the engine's own processes itself.
    atexit.unregister(engine.shutdown)
    import zmq

    engine.send_to_rpc.setsockopt(zmq.RCVTIMEO, self_check_timeout_ms)
    try:
        engine.collective_rpc(SELF_CHECK_METHOD)
        engine.collective_rpc(SET_FAST_UPLOAD_METHOD, enabled=fast_upload)
        engine.collective_rpc(SET_SLOT_TURNS_METHOD, passes=slot_turn_passes)
        if fast_upload and runs_without_gpu():
            # Small ones, of which the second is lower: the slot must also be clean. A model's first layers have every
            # kind of module that it has.
            ranks = [min(4, arguments["max_lora_rank"]), 1]
            engine.collective_rpc(UPLOAD_CHECK_METHOD, ranks=ranks, max_layers=_NUM_CHECKED_LAYERS)
    except (AssertionError, zmq.ZMQError) as error:
        raise FailedPrecondition(f"SGLang started without MinT's plugin: {error}") from error
    return engine
