"""Loads a packed adapter as one mapped file and copies it into its slot in few large pieces.

AROUND ``LoRAManager.load_lora_weights``, ``LoRAMemoryPool.load_lora_weight_to_buffer`` and
``LoRAMemoryPool._clear_buffer_slot_for_base``. Without these hooks SGLang reads tensor by tensor, joins q, k, v and
gate, up in memory, and copies routed experts one by one, each scaled into a new tensor first. Here

- the file is mapped once and split into views (``packed_weights``);
- every shape is held against its buffer at load, so an adapter that does not fit is refused before a slot is touched,
  as is one whose numbers the slots' type cannot hold: an infinity there would reach the other rows of its batch
  (:mod:`~mint_engine.sglang_plugin.lora_ops`);
- a joined module is copied part by part to its place, all experts at once, scaled on the way;
- a slot remembers how far each buffer may hold other numbers than zero (its high-water rank), so that only those are
  zeroed and a slot is always exactly its adapter.

An adapter in another layout, several devices, or slots that the map does not explain take SGLang's own path, with a
line in the log. :mod:`~mint_engine.sglang_plugin.upload_check` proves at every start that both paths write the same
bits. Without a GPU only: the copies are made by the processor, into host memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mint_core.errors import InvalidArgument
from mint_engine.sglang_plugin.packed_weights import read_packed_weights
from mint_engine.sglang_plugin.slot_map import Bank, PartWeights, SlotMap, SlotPlan

__all__ = [
    "SET_FAST_UPLOAD_METHOD",
    "SlotWriter",
    "around_clear_slot",
    "around_load_lora_weights",
    "around_load_to_slot",
    "plan_of",
    "set_fast_upload",
    "slot_writer",
]

SET_FAST_UPLOAD_METHOD = "mint_set_fast_upload"
"""Method that is added to SGLang's scheduler; called through ``Engine.collective_rpc``."""

_PLAN = "_mint_plan"
_WRITER = "_mint_slot_writer"
_NO_LAYERS = SimpleNamespace(num_hidden_layers=0)

logger = logging.getLogger(__name__)
_enabled = True


class SlotWriter:
    """Writes plans into the slots of one pool and knows what is in them."""

    def __init__(self, slot_map: SlotMap, *, num_slots: int, max_rank: int, used_slots: frozenset[int]) -> None:
        self.slot_map = slot_map
        self._max_rank = max_rank
        # Buffers begin as zeros; what was written before this writer came may fill all of a slot.
        self._high_water = [[max_rank if slot in used_slots else 0] * len(slot_map.banks) for slot in range(num_slots)]

    def write(self, slot: int, plan: SlotPlan) -> None:
        """Make ``slot`` exactly ``plan``: every other number in its banks is zero afterwards."""
        water = self._high_water[slot]
        for index, (bank, parts) in enumerate(zip(self.slot_map.banks, plan.banks, strict=True)):
            dirty = water[index]
            # Until the copy is complete, nothing is known about the bank.
            water[index] = self._max_rank
            if parts is None:
                _zero(bank, slot, dirty)
                water[index] = 0
            else:
                _write(bank, slot, parts, plan.rank, plan.scaling, dirty)
                water[index] = plan.rank

    def clear(self, slot: int) -> None:
        """Make ``slot`` all zeros."""
        water = self._high_water[slot]
        for index, bank in enumerate(self.slot_map.banks):
            _zero(bank, slot, water[index])
            water[index] = 0

    def give_away(self, slot: int) -> None:
        """Somebody else writes to ``slot``: from here on all of it may be filled."""
        self._high_water[slot] = [self._max_rank] * len(self.slot_map.banks)


def slot_writer(manager: Any) -> SlotWriter | str:
    """The writer of the pool of a ``LoRAManager``, made at the first call; a sentence where there can be none."""
    pool = manager.memory_pool
    writer: SlotWriter | str | None = getattr(pool, _WRITER, None)
    if writer is None:
        slot_map = SlotMap.read(pool, manager.lora_modules)
        if isinstance(slot_map, str):
            logger.warning("adapters take SGLang's own way into the slots: %s", slot_map)
            writer = slot_map
        else:
            used = frozenset(slot for uid, slot in pool.uid_to_buffer_id.items() if uid is not None)
            writer = SlotWriter(
                slot_map, num_slots=pool.max_loras_per_batch, max_rank=pool.max_lora_rank, used_slots=used
            )
        setattr(pool, _WRITER, writer)
    return writer


def plan_of(adapter: Any) -> SlotPlan | None:
    """The plan of an adapter that was loaded here; ``None`` for one that SGLang loaded."""
    plan: SlotPlan | None = getattr(adapter, _PLAN, None)
    return plan


def set_fast_upload(*_: object, enabled: bool) -> None:
    """Choose for adapters loaded from now on; those already loaded keep their way."""
    global _enabled
    _enabled = enabled


def around_load_lora_weights(original: Callable[..., None], manager: Any, lora_ref: Any) -> None:
    """Load the weights of ``lora_ref`` into host memory: map them if they are packed, else as SGLang does."""
    why = _load(manager, lora_ref) if _enabled and hasattr(manager, "memory_pool") else "it is switched off"
    if why is not None:
        logger.info("adapter %s is loaded by SGLang itself: %s", lora_ref.lora_name, why)
        original(manager, lora_ref)
        try:
            for layer in manager.loras[lora_ref.lora_id].layers:
                _check_range(layer.weights, manager.dtype)
        except InvalidArgument:
            del manager.loras[lora_ref.lora_id]
            raise


def _load(manager: Any, lora_ref: Any) -> str | None:
    packed = read_packed_weights(Path(lora_ref.lora_path))
    if packed is None:
        return "its folder is not that of a packed adapter"
    if _is_wider(packed.dtype, manager.dtype):
        _check_range(packed.tensors, manager.dtype)
    config = manager.configs[lora_ref.lora_id]
    scaling = config.lora_alpha / config.r
    writer = slot_writer(manager)
    plan = (
        writer
        if isinstance(writer, str)
        else writer.slot_map.plan(packed.tensors, rank=config.r, scaling=scaling, layout=packed.header)
    )
    if isinstance(plan, str):
        if len({tensor.shape[0] for tensor in packed.tensors.values() if tensor.dim() == 3}) > 1:
            # SGLang would give a matrix of all experts to the first one, without a word.
            raise InvalidArgument(f"its experts share a matrix, and {plan}; give each its own", field="weights")
        return plan
    from sglang.srt.lora.lora import LoRAAdapter

    # SGLang asks it for rank and scaling only, so it has no weights of its own, and no layers to keep them in.
    adapter = LoRAAdapter(
        lora_ref.lora_id, config, _NO_LAYERS, manager.load_config, manager.lora_backend, base_model=None
    )
    object.__setattr__(adapter, _PLAN, plan)
    manager.loras[lora_ref.lora_id] = adapter
    return None


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether ``dtype`` has numbers that are infinite in the other."""
    return torch.finfo(dtype).max > torch.finfo(than).max


def _check_range(weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise :class:`InvalidArgument` for finite numbers that are infinite in ``dtype``."""
    largest = torch.finfo(dtype).max
    for name, tensor in weights.items():
        if _is_wider(tensor.dtype, dtype) and not (found := float(tensor.abs().max())) <= largest:
            raise InvalidArgument(
                f"{name} holds {found:g}, the engine computes in {dtype}, whose largest number is {largest:g}; "
                "train with a smaller learning rate, or serve the base in another type",
                field="weights",
            )


def around_load_to_slot(
    original: Callable[..., None], pool: Any, uid: str | None, buffer_id: int, lora_adapter: Any, *rest: Any
) -> None:
    """Fill slot ``buffer_id``; called right before the slot is used."""
    writer = getattr(pool, _WRITER, None)
    plan = None if lora_adapter is None else plan_of(lora_adapter)
    if plan is not None and isinstance(writer, SlotWriter):
        writer.write(buffer_id, plan)
        return
    if uid is not None and isinstance(writer, SlotWriter):
        writer.give_away(buffer_id)
    original(pool, uid, buffer_id, lora_adapter, *rest)


def around_clear_slot(original: Callable[..., None], pool: Any, buffer_id: int) -> None:
    """Zero slot ``buffer_id``, as far as it can hold anything else."""
    writer = getattr(pool, _WRITER, None)
    if isinstance(writer, SlotWriter):
        writer.clear(buffer_id)
    else:
        original(pool, buffer_id)


def _write(bank: Bank, slot: int, parts: tuple[PartWeights | None, ...], rank: int, scaling: float, dirty: int) -> None:
    lora_a, lora_b = bank.lora_a, bank.lora_b
    # Dense A lies part by part at the adapter's own rank; the kernels of experts look at multiples of the slot's.
    stride = bank.max_rank if bank.has_experts else rank
    for place, part in enumerate(parts):
        low, high = bank.offsets[place], bank.offsets[place + 1]
        target_a = _window(lora_a, slot, place * stride, place * stride + rank)
        target_b = _window(lora_b, slot, low, high, 0, rank)
        if part is None:
            target_a.zero_()
            target_b.zero_()
        else:
            target_a.copy_(part.lora_a)
            if bank.has_experts:
                _copy_scaled(target_b, part.lora_b, scaling)
            else:
                # SGLang scales dense modules when it computes.
                target_b.copy_(part.lora_b)
        if bank.has_experts and rank < dirty:
            _window(lora_a, slot, place * stride + rank, place * stride + dirty).zero_()
    if rank < dirty:
        if not bank.has_experts:
            _window(lora_a, slot, len(parts) * rank, len(parts) * dirty).zero_()
        _window(lora_b, slot, 0, lora_b.shape[-2], rank, dirty).zero_()


def _window(buffer: Tensor, slot: int, low: int, high: int, left: int = 0, right: int | None = None) -> Tensor:
    """``buffer[slot, ..., low:high, left:right]`` in one call; as slices it is three, a millisecond per few hundred."""
    strides, shape = buffer.stride(), buffer.shape
    size = (*shape[1:-2], high - low, (shape[-1] if right is None else right) - left)
    begin = buffer.storage_offset() + slot * strides[0] + low * strides[-2] + left * strides[-1]
    return buffer.as_strided(size, strides[1:], begin)


def _copy_scaled(target: Tensor, source: Tensor, scaling: float) -> None:
    """``target = source · scaling`` rounded as SGLang rounds it: in the adapter's type, then to the slot's."""
    if scaling == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source if source.shape == target.shape else source.expand_as(target), scaling, out=target)
    else:
        target.copy_(source * scaling)


def _zero(bank: Bank, slot: int, dirty: int) -> None:
    if not dirty:
        return
    if bank.has_experts:
        for place in range(len(bank.parts)):
            _window(bank.lora_a, slot, place * bank.max_rank, place * bank.max_rank + dirty).zero_()
    else:
        _window(bank.lora_a, slot, 0, len(bank.parts) * dirty).zero_()
    _window(bank.lora_b, slot, 0, bank.lora_b.shape[-2], 0, dirty).zero_()
