"""Entry point ``sglang.srt.plugins`` / ``mint``: the list of hooks, their application and its proof.

SGLang logs what a plugin raises and goes on without it, and only logs a hook that found no target. Here a process
either has every hook or ends: :func:`apply_hooks` raises, :func:`register` turns that into the end of its process, and
every scheduler answers :func:`~mint_engine.sglang_plugin.hooks.self_check`, which the host asks before it serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin import (
    expert_lora,
    fast_upload,
    lora_ops,
    mla_dispatch,
    quiet_loads,
    residency_guard,
    seeded_sampling,
    slot_prefetch,
    slot_turns,
    unpinned_memory,
    upload_check,
)
from mint_engine.sglang_plugin.version import check_sglang_version, runs_without_gpu

__all__ = ["HOOKS", "SELF_CHECK_METHOD", "Hook", "apply_hooks", "register", "self_check"]

SELF_CHECK_METHOD = "mint_self_check"
"""Method that :func:`apply_hooks` adds to SGLang's scheduler; called through ``Engine.collective_rpc``."""

_FAILED_EXIT_CODE = 78
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"


@dataclass(frozen=True, slots=True)
class Hook:
    """One function of SGLang that MinT changes."""

    target: str
    """Dotted path of the function."""
    kind: str
    """Name of a ``HookType``: BEFORE, AFTER, AROUND or REPLACE."""
    function: Callable[..., Any]
    """What runs; its module says why."""
    only_without_gpu: bool = True
    """Kernels and CPU gaps only; guards apply everywhere."""


HOOKS = (
    Hook("sglang.srt.lora.layers.FusedMoEWithLoRA._forward_with_lora", "REPLACE", expert_lora.forward_with_lora),
    Hook("sglang.srt.lora.torch_ops.lora_ops.sgemm_lora_a_fwd", "REPLACE", lora_ops.sgemm_lora_a_fwd),
    Hook("sglang.srt.lora.torch_ops.lora_ops.sgemm_lora_b_fwd", "REPLACE", lora_ops.sgemm_lora_b_fwd),
    Hook("sglang.srt.lora.mem_pool.LoRAMemoryPool.init_buffers", "AFTER", lora_ops.after_init_buffers),
    Hook("sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter", "REPLACE", quiet_loads.load_lora_adapter),
    Hook("sglang.srt.lora.lora_manager.LoRAManager.unload_lora_adapter", "REPLACE", quiet_loads.unload_lora_adapter),
    Hook("sglang.srt.lora.lora_manager.LoRAManager.load_lora_weights", "AROUND", fast_upload.around_load_lora_weights),
    Hook(
        "sglang.srt.lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer", "AROUND", fast_upload.around_load_to_slot
    ),
    Hook(
        "sglang.srt.lora.mem_pool.LoRAMemoryPool._clear_buffer_slot_for_base", "AROUND", fast_upload.around_clear_slot
    ),
    Hook("sglang.srt.layers.sampler.multinomial_with_seed", "REPLACE", seeded_sampling.multinomial_with_seed),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.load_model", "BEFORE", mla_dispatch.before_load_model),
    Hook(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        "AFTER",
        seeded_sampling.after_from_schedule_batch,
        only_without_gpu=False,
    ),
    Hook(
        "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch",
        "BEFORE",
        residency_guard.before_prepare_lora_batch,
        only_without_gpu=False,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.load_lora_adapter",
        "AFTER",
        slot_prefetch.after_load_lora_adapter,
        only_without_gpu=False,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        "AROUND",
        slot_turns.around_get_next_batch_to_run,
        only_without_gpu=False,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.collect_inflight_reqs",
        "AFTER",
        slot_turns.after_collect_inflight_reqs,
        only_without_gpu=False,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.is_fully_idle",
        "AFTER",
        slot_turns.after_is_fully_idle,
        only_without_gpu=False,
    ),
)
"""Every hook; ``unpinned_memory``, which rebinds names instead, comes on top on a machine without a GPU."""

_registered: set[str] = set()


def register() -> None:
    """Called by SGLang in each of its processes; ends the process with one sentence if a hook cannot be applied.

    Processes that neither schedule nor start schedulers (the detokenizer) are left alone.
    """
    if _SCHEDULER_MODULE not in sys.modules:
        return
    try:
        apply_hooks()
    except Exception as error:
        # SGLang swallows every Exception of a plugin and would go on unpatched; SystemExit is not one.
        sys.stderr.write(f"mint-engine: {error}\n")
        sys.stderr.flush()
        raise SystemExit(_FAILED_EXIT_CODE) from error


def apply_hooks() -> None:
    """Apply every hook in this process and prove it; calling it again changes nothing.

    Raises :class:`FailedPrecondition` for another SGLang version or for a hook that found no target.
    """
    check_sglang_version()
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if runs_without_gpu():
        unpinned_memory.apply()
    for hook in _wanted_hooks():
        if hook.target not in _registered:
            HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
            _registered.add(hook.target)
    HookRegistry.apply_hooks()
    setattr(Scheduler, SELF_CHECK_METHOD, self_check)
    setattr(Scheduler, fast_upload.SET_FAST_UPLOAD_METHOD, fast_upload.set_fast_upload)
    setattr(Scheduler, slot_turns.SET_SLOT_TURNS_METHOD, slot_turns.set_slot_turns)
    setattr(Scheduler, upload_check.UPLOAD_CHECK_METHOD, upload_check.check_upload)
    self_check()


def self_check(*_: object) -> None:
    """Raise :class:`FailedPrecondition` unless this process has every hook and the right platform."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [hook.target for hook in _wanted_hooks() if hook.target not in HookRegistry._patched]
    if runs_without_gpu():
        if not unpinned_memory.is_applied():
            missing.append("unpinned_memory")
        if type(current_platform).__name__ != "MintCpuPlatform":
            missing.append(f"platform mint_cpu (found {type(current_platform).__name__})")
    if missing:
        raise FailedPrecondition(
            f"MinT's SGLang plugin is not fully in place, missing: {', '.join(missing)}; "
            "the installed SGLang differs from the release the plugin was made for, or another plugin interferes"
        )


def _wanted_hooks() -> list[Hook]:
    without_gpu = runs_without_gpu()
    return [hook for hook in HOOKS if without_gpu or not hook.only_without_gpu]
