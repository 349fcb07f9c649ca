"""LoRA on routed experts in plain torch (REPLACE ``FusedMoEWithLoRA._forward_with_lora``).

Without this hook a LoRA on routed experts needs SGLang's Triton or CUTLASS runners. The semantics are theirs: the
update is added to gate and up before the activation and to down before the weighted sum over experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

__all__ = ["forward_with_lora"]


def forward_with_lora(layer: Any, hidden_states: Tensor, topk_output: Any, lora_info: Any, **_: object) -> Tensor:
    """The MoE block of one layer with every row's own adapter.

    ``hidden_states`` [num_tokens, hidden]. Slots of the pool, B already scaled: gate_up A [num_slots, E or 1, 2r,
    hidden], gate_up B [num_slots, E, 2·width, r], down A [num_slots, E, r, width], down B [num_slots, E or 1, hidden,
    r]. ``lora_info.token_lora_mapping`` [num_tokens] is the slot of each token, negative without one. Returns
    [num_tokens, hidden] in the dtype of ``hidden_states``; the sum over experts is float32.
    """
    base = layer.base_layer
    gate_up_weight, down_weight = base.w13_weight, base.w2_weight
    expert_weights, expert_ids = topk_output[0], topk_output[1]
    slot_of_token = lora_info.token_lora_mapping[: hidden_states.shape[0]].long()
    slots = [int(slot) for slot in slot_of_token.unique() if slot >= 0] if lora_info.has_active_lora else []
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    width = down_weight.shape[-1]
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, choice = (expert_ids == expert).nonzero(as_tuple=True)
        inputs = hidden_states[tokens]
        gate_up = linear(inputs, gate_up_weight[expert])
        rows_of_slot = [(slot, (slot_of_token[tokens] == slot).nonzero(as_tuple=True)[0]) for slot in slots]
        rows_of_slot = [(slot, rows) for slot, rows in rows_of_slot if rows.numel()]
        for slot, rows in rows_of_slot:
            _add_gate_up(gate_up, inputs, rows, lora_info, slot, expert, width)
        hidden = silu(gate_up[:, :width]) * gate_up[:, width:]
        result = linear(hidden, down_weight[expert])
        for slot, rows in rows_of_slot:
            lora_a = lora_info.down_lora_a_weights[slot, expert]
            lora_b = _of_expert(lora_info.down_lora_b_weights[slot], expert)
            result[rows] += linear(linear(hidden[rows], lora_a), lora_b)
        output.index_add_(0, tokens, result.float() * expert_weights[tokens, choice].float()[:, None])
    return output.to(hidden_states.dtype)


def _add_gate_up(
    gate_up: Tensor, inputs: Tensor, rows: Tensor, lora_info: Any, slot: int, expert: int, width: int
) -> None:
    rank = lora_info.max_lora_rank
    reduced = linear(inputs[rows], _of_expert(lora_info.gate_up_lora_a_weights[slot], expert))
    lora_b = lora_info.gate_up_lora_b_weights[slot, expert]
    gate_up[rows, :width] += linear(reduced[:, :rank], lora_b[:width])
    gate_up[rows, width:] += linear(reduced[:, rank:], lora_b[width:])


def _of_expert(weights: Tensor, expert: int) -> Tensor:
    """One expert's matrix of ``[E or 1, …]``; a leading 1 means that the experts share it."""
    return weights[expert if weights.shape[0] > 1 else 0]
