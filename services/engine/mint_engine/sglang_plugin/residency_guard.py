"""Refuses to compute a batch whose adapter is not in a slot (BEFORE ``LoRAManager.prepare_lora_batch``).

Without this hook SGLang maps a row whose adapter has no slot to the base's slot and answers as the base, silently. The
batches are fetched right before, so this never happens; if it ever did, a dead engine that restarts is better than a
wrong answer. Applies on every device.
"""

from __future__ import annotations

from typing import Any

__all__ = ["before_prepare_lora_batch"]


def before_prepare_lora_batch(manager: Any, forward_batch: Any, *_: Any, **__: Any) -> None:
    """Raise if a row of ``forward_batch`` names an adapter outside the slots."""
    absent = {uid for uid in forward_batch.lora_ids if uid is not None} - manager.memory_pool.uid_to_buffer_id.keys()
    if absent and not manager.attn_dp_enabled:
        names = sorted(manager.lora_refs[uid].lora_name if uid in manager.lora_refs else uid for uid in absent)
        raise RuntimeError(
            f"adapters {names} are in the batch and not in a slot: stopping before the base answers for them"
        )
