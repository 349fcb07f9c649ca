"""Batched LoRA products for SGLang's torch backend (REPLACE ``sgemm_lora_a_fwd`` and ``sgemm_lora_b_fwd``).

Without this hook SGLang walks the segments of a batch with ``.item()`` per segment and slice: with four adapters in a
decode batch generation takes twice as long. A decode batch has one token per segment; there the adapters' weights are
gathered once and multiplied as one batch. Longer segments stay one product each. Both ways add exact zeros for rows
without an adapter, so such rows equal the base bit for bit.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["sgemm_lora_a_fwd", "sgemm_lora_b_fwd"]


def sgemm_lora_a_fwd(
    inputs: Tensor,
    weights: Tensor,
    weight_indices: Tensor,
    seg_len_tensor: Tensor,
    lora_ranks: Tensor,
    scaling_tensor: Tensor,
    num_slices: int = 1,
) -> Tensor:
    """``scaling · x Aᵀ`` of every segment with the A of its slot.

    ``inputs`` [num_tokens, in]; ``weights`` [num_slots, num_slices · max_rank, in]; ``weight_indices`` and
    ``seg_len_tensor`` [num_segments]; ``lora_ranks`` and ``scaling_tensor`` [num_slots]. Returns
    [num_tokens, num_slices · max_rank] with the slices of a segment side by side at its adapter's own rank.
    """
    num_tokens = inputs.shape[0]
    if weights.numel() == 0:
        return inputs.new_zeros(num_tokens, 0)
    slots, lengths = weight_indices.tolist(), seg_len_tensor.tolist()
    ranks, scalings = lora_ranks.tolist(), scaling_tensor.tolist()
    max_rank = weights.shape[1] // num_slices
    if _is_uniform_decode(slots, lengths, ranks, max_rank):
        scale = torch.tensor([scalings[slot] if ranks[slot] else 0.0 for slot in slots], dtype=inputs.dtype)
        product = torch.bmm(weights[weight_indices.long()], inputs.unsqueeze(-1)).squeeze(-1)
        return product * scale[:, None]
    output = inputs.new_zeros(num_tokens, num_slices * max_rank)
    start = 0
    for slot, length in zip(slots, lengths, strict=False):
        width, stop = num_slices * ranks[slot], start + length
        if length and width:
            output[start:stop, :width].addmm_(
                inputs[start:stop], weights[slot, :width].t(), beta=0, alpha=scalings[slot]
            )
        start = stop
    return output


def sgemm_lora_b_fwd(
    inputs: Tensor,
    weights: Tensor,
    weight_indices: Tensor,
    seg_len_tensor: Tensor,
    lora_ranks: Tensor,
    slice_offsets: Tensor,
    base_output: Tensor | None = None,
) -> Tensor:
    """Add ``x Bᵀ`` of every segment to ``base_output``, slice by slice.

    ``inputs`` as :func:`sgemm_lora_a_fwd` returns them; ``weights`` [num_slots, out, max_rank]; ``slice_offsets``
    [num_slices + 1] into ``out``. Returns [num_tokens, out], which is ``base_output`` itself when that is given.
    """
    num_tokens = inputs.shape[0]
    offsets = slice_offsets.tolist()
    out_features = offsets[-1] if offsets else 0
    if weights.numel() == 0:
        return inputs.new_zeros(num_tokens, out_features)
    output = base_output if base_output is not None else inputs.new_zeros(num_tokens, out_features)
    slots, lengths, ranks = weight_indices.tolist(), seg_len_tensor.tolist(), lora_ranks.tolist()
    max_rank, slices = weights.shape[2], list(enumerate(itertools.pairwise(offsets)))
    if _is_uniform_decode(slots, lengths, ranks, max_rank):
        gathered, columns = weights[weight_indices.long()], inputs.unsqueeze(-1)
        for index, (low, high) in slices:
            output[:, low:high] += torch.bmm(
                gathered[:, low:high], columns[:, index * max_rank : (index + 1) * max_rank]
            ).squeeze(-1)
        return output
    start = 0
    for slot, length in zip(slots, lengths, strict=False):
        rank, stop = ranks[slot], start + length
        if length and rank:
            for index, (low, high) in slices:
                output[start:stop, low:high].addmm_(
                    inputs[start:stop, index * rank : (index + 1) * rank], weights[slot, low:high, :rank].t()
                )
        start = stop
    return output


def _is_uniform_decode(slots: list[int], lengths: list[int], ranks: list[int], max_rank: int) -> bool:
    """One token per segment, and every adapter fills its slot: then slices lie at multiples of ``max_rank``."""
    one_token_each = len(lengths) > 1 and all(length == 1 for length in lengths)
    return one_token_each and all(ranks[slot] in (0, max_rank) for slot in slots)
