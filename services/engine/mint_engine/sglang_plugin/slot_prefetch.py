"""Uploads an adapter into a slot when it is loaded (AFTER ``Scheduler.load_lora_adapter``).

Without this hook SGLang uploads at the first batch that uses the adapter: the first request pays for it, and a tensor
that does not fit the pool raises inside the scheduler loop and takes the engine down. Uploading here moves the time
into the load and turns a misfit into a failed load. It happens when the load asks for it or an empty slot costs
nothing, and is left to the first batch, as in stock SGLang, when the running batches need all slots. Applies on every
device; tensor-parallel ranks see the same batches and decide alike.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["INTO_SLOT", "after_load_lora_adapter"]

INTO_SLOT = "mint:into-slot"
"""A load request with this ``rid``, a field SGLang leaves unused on loads, asks for a slot at the cost of another's."""

logger = logging.getLogger(__name__)


def after_load_lora_adapter(result: Any, scheduler: Any, request: Any, *_: Any, **__: Any) -> Any:
    """Bring the adapter of a successful load into a slot; a misfit undoes the load and reports it."""
    if not result.success:
        return result
    manager = scheduler.tp_worker.model_runner.lora_manager
    if manager.enable_lora_overlap_loading or manager.attn_dp_enabled:
        return result
    pool = manager.memory_pool
    num_free = pool.max_loras_per_batch - len(pool.uid_to_buffer_id)
    # One empty slot stays for the base, which takes a slot like any adapter.
    if request.rid != INTO_SLOT and num_free <= int(None not in pool.uid_to_buffer_id):
        return result
    running = _running_lora_ids(scheduler) & (manager.loras.keys() | {None})
    if not manager.validate_lora_batch({request.lora_id} | running):
        logger.info("no slot for %s while these batches run; it is uploaded at its first batch", request.lora_name)
        return result
    try:
        manager.fetch_new_loras({request.lora_id}, running)
    except Exception as error:  # noqa: BLE001
        # Whatever a tensor of the adapter makes torch raise is a fault of the adapter, not of the engine. The slot that
        # was being filled counts as empty by then, so undoing the load leaves nothing behind.
        pool.eviction_policy.remove(request.lora_id)
        manager.unload_lora_adapter(manager.lora_refs[request.lora_id])
        result.success = False
        result.error_message = f"the adapter does not fit the slots of this engine: {error}"
        result.loaded_adapters = {ref.lora_name: ref.lora_path for ref in manager.lora_refs.values()}
    return result


def _running_lora_ids(scheduler: Any) -> set[str | None]:
    """Adapters (``None`` is the base) of every request that holds a place in a batch, finished ones included."""
    ids: set[str | None] = set()
    for name in ("running_batch", "last_batch"):
        batch = getattr(scheduler, name, None)
        ids.update(request.lora_id for request in getattr(batch, "reqs", None) or ())
    chunked = getattr(scheduler, "chunked_req", None)
    if chunked is not None:
        ids.add(chunked.lora_id)
    return ids
