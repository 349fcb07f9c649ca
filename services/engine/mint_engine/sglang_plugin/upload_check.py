"""Proves in a running scheduler that the fast way into a slot writes what SGLang's own way writes, bit for bit.

Asked at every start with small adapters, and by tests with long series of mixed ranks: the reference is SGLang's code
on a pool of one empty slot, the fast way fills one and the same slot over and over, as evictions do. An SGLang that
arranges its slots differently ends the start here instead of serving wrong adapters.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin.fast_upload import plan_of, slot_writer
from mint_engine.sglang_plugin.slot_map import Bank

__all__ = ["UPLOAD_CHECK_METHOD", "check_upload"]

UPLOAD_CHECK_METHOD = "mint_check_upload"
"""Method that is added to SGLang's scheduler; called through ``Engine.collective_rpc``."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARE_LEFT_OUT = 0.25


def check_upload(
    scheduler: Any,
    *,
    ranks: Sequence[int],
    max_layers: int | None = None,
    seed: int = 0,
    required: bool = False,
    mapped: Sequence[str] = (),
) -> None:
    """Upload a random adapter of each rank both ways, into the first ``max_layers`` layers, and compare the slots.

    Needs one empty slot, and memory for another; leaves the slot empty. Without ranks nothing is uploaded. Raises
    :class:`FailedPrecondition` naming the first buffer that differs, if ``required`` the reason why SGLang's own way is
    taken here, and for a name in ``mapped`` that is not loaded the fast way.
    """
    manager = scheduler.tp_worker.model_runner.lora_manager
    names = {ref.lora_name: uid for uid, ref in manager.lora_refs.items()}
    if strangers := [name for name in mapped if plan_of(manager.loras.get(names.get(name))) is None]:
        raise FailedPrecondition(f"adapters {strangers} are not loaded the fast way")
    writer = slot_writer(manager)
    if isinstance(writer, str):
        if required:
            raise FailedPrecondition(f"adapters take SGLang's own way into the slots: {writer}")
        return
    if not ranks:
        return
    from sglang.srt.lora.mem_pool import EMPTY_SLOT

    pool = manager.memory_pool
    if EMPTY_SLOT not in pool.buffer_id_to_uid:
        raise FailedPrecondition("the check of the fast upload needs an empty slot; unload an adapter first")
    slot = pool.buffer_id_to_uid.index(EMPTY_SLOT)
    num_layers = pool.num_layer if max_layers is None else min(max_layers, pool.num_layer)
    banks = [bank for bank in writer.slot_map.banks if bank.layer < num_layers]
    reference = _Reference(manager, banks, num_layers)
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    try:
        for turn, rank in enumerate(ranks):
            weights = _random_weights(banks, rank, _DTYPES[turn % len(_DTYPES)], draw, generator)
            scaling = draw.choice((1.0, 0.5, 1.7))
            plan = writer.slot_map.plan(weights, rank=rank, scaling=scaling)
            if isinstance(plan, str):
                raise FailedPrecondition(f"an adapter made from the slots' own shapes has no plan: {plan}")
            writer.write(slot, plan)
            reference.upload(weights, rank, scaling)
            reference.compare(slot, f"adapter {turn} with rank {rank}, seed {seed}")
    finally:
        writer.clear(slot)
    reference.zero()
    reference.compare(slot, f"the slot cleared after ranks {list(ranks)}")


class _Reference:
    """A pool of one slot and the first layers, filled by SGLang."""

    def __init__(self, manager: Any, banks: Sequence[Bank], num_layers: int) -> None:
        self._manager = manager
        self._banks = banks
        self._pool = copy.copy(manager.memory_pool)
        self._pool.num_layer = num_layers
        for name in ("A_buffer", "B_buffer"):
            buffers: dict[str, list[Tensor]] = getattr(self._pool, name)
            copies = {
                key: [each.new_zeros(1, *each.shape[1:]) for each in layers[:num_layers]]
                for key, layers in buffers.items()
            }
            setattr(self._pool, name, copies)
        theirs = {
            id(buffer): mine
            for name in ("A_buffer", "B_buffer")
            for key, layers in getattr(manager.memory_pool, name).items()
            for buffer, mine in zip(layers, getattr(self._pool, name)[key], strict=False)
        }
        self._copies = [(theirs[id(bank.lora_a)][0], theirs[id(bank.lora_b)][0]) for bank in self._banks]

    def zero(self) -> None:
        for lora_a, lora_b in self._copies:
            lora_a.zero_()
            lora_b.zero_()

    def upload(self, weights: dict[str, Tensor], rank: int, scaling: float) -> None:
        from sglang.srt.lora.lora import LoRAAdapter
        from sglang.srt.lora.lora_config import LoRAConfig
        from sglang.srt.lora.mem_pool import LoRAMemoryPool

        self.zero()
        manager = self._manager
        targets = sorted({name.split(".")[-3] for name in weights})
        config = LoRAConfig.from_dict(
            {"peft_type": "LORA", "target_modules": targets, "r": rank, "lora_alpha": scaling * rank}
        )
        adapter = LoRAAdapter(
            "mint-check",
            config,
            manager.base_hf_config,
            manager.load_config,
            manager.lora_backend,
            base_model=manager.base_model,
        )
        adapter.initialize_weights_from_tensors(weights)
        # What SGLang does without the hook around it.
        upload = LoRAMemoryPool.load_lora_weight_to_buffer.__wrapped__
        upload(self._pool, "mint-check", 0, adapter, manager.lora_modules, None, None)

    def compare(self, slot: int, what: str) -> None:
        for bank, copies in zip(self._banks, self._copies, strict=True):
            for side, found, expected in zip("AB", (bank.lora_a[slot], bank.lora_b[slot]), copies, strict=True):
                if not _same_bytes(found, expected):
                    raise FailedPrecondition(
                        f"the fast upload differs from SGLang's own in lora_{side} of {bank.name}, {what}; "
                        "set sglang.fast_upload to false and report this"
                    )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whatever the order in memory. Equal numbers could still be zeros of different signs.

    Flat first: a last dimension of 1, which rank 1 has, counts as contiguous whatever its stride, and then cannot be
    viewed as bytes.
    """
    flat = [each.contiguous().flatten().view(torch.uint8) for each in (one, other)]
    return torch.equal(*flat)


def _random_weights(
    banks: Sequence[Bank], rank: int, dtype: torch.dtype, draw: random.Random, generator: torch.Generator
) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for bank in banks:
        if draw.random() < _SHARE_LEFT_OUT:
            continue
        left_out = {"k_proj", "up_proj"} if draw.random() < _SHARE_LEFT_OUT and not bank.has_experts else set()
        for place, part in enumerate(bank.parts):
            if part not in left_out:
                prefix = f"base_model.model.{bank.module_of(part)}"
                for side, shape in zip("AB", _shapes(bank, place, rank), strict=True):
                    weights[f"{prefix}.lora_{side}.weight"] = torch.randn(shape, generator=generator).to(dtype)
    return weights


def _shapes(bank: Bank, place: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    outputs = bank.offsets[place + 1] - bank.offsets[place]
    shape_a: tuple[int, ...] = (rank, bank.lora_a.shape[-1])
    shape_b: tuple[int, ...] = (outputs, rank)
    if bank.has_experts:
        return (bank.lora_a.shape[1], *shape_a), (bank.lora_b.shape[1], *shape_b)
    return shape_a, shape_b
