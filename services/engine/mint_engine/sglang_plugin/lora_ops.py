"""Batched LoRA products for SGLang's torch backend (REPLACE ``sgemm_lora_a_fwd`` and ``sgemm_lora_b_fwd``).

Without these hooks SGLang walks the segments of a batch with ``.item()`` per segment and slice: with four adapters in
a decode batch generation takes twice as long. Where segments are long, as in a prefill, one product for each is right.
Where they are short, as in decoding, all slots are taken for one wide adapter: one product with every slot's A, of
which each row keeps its own slot's columns, and one product with every slot's B, in which a row has zeros for all slots
but its own. That is many more multiplications and far less time than as many products of one row each, and no weight
is copied; it wants B with its ranks side by side in memory, see :func:`after_init_buffers`.

A row takes another slot's B times zero, so slots must be finite (:mod:`~mint_engine.sglang_plugin.fast_upload` and the
loader see to that); of A it takes nothing. Rows without an adapter equal the base bit for bit.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["after_init_buffers", "sgemm_lora_a_fwd", "sgemm_lora_b_fwd"]

_SHORT = 4
"""Tokens per segment, on average, up to which a batch is taken row by row."""


def after_init_buffers(_: None, pool: Any, *__: Any) -> None:
    """Give SGLang's pool B buffers whose transpose is contiguous; AFTER ``LoRAMemoryPool.init_buffers``.

    They keep their shape [num_slots, out, max_rank]. Expert buffers, which have a dimension more, stay as they are.
    """
    for buffers in pool.B_buffer.values():
        for layer, buffer in enumerate(buffers):
            if buffer.dim() == 3:
                num_slots, out_features, max_rank = buffer.shape
                buffers[layer] = buffer.new_zeros(num_slots, max_rank, out_features).transpose(1, 2)


@dataclass(frozen=True)
class _Batch:
    """The segments of one batch, as every module of every layer needs them."""

    slots: list[int]
    lengths: list[int]
    ranks: list[int]
    """By slot."""

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def is_short(self) -> bool:
        """Whether it is taken row by row."""
        return len(self.slots) > 1 and self.num_tokens <= _SHORT * len(self.slots)

    @functools.cached_property
    def rows(self) -> Tensor:
        """0, 1, … num_tokens - 1."""
        return torch.arange(self.num_tokens)

    @functools.cached_property
    def slot_of_row(self) -> Tensor:
        """[num_tokens]"""
        return torch.repeat_interleave(torch.tensor(self.slots), torch.tensor(self.lengths))

    @functools.cached_property
    def rank_of_row(self) -> Tensor:
        """[num_tokens]"""
        return torch.tensor(self.ranks)[self.slot_of_row]

    @functools.cached_property
    def lowest_rank(self) -> int:
        return int(self.rank_of_row.min())

    @functools.cached_property
    def used(self) -> Tensor:
        """Slots of this batch."""
        return torch.unique(self.slot_of_row)

    @functools.cached_property
    def place_of_row(self) -> Tensor:
        """Of a row's slot among those used."""
        return torch.searchsorted(self.used, self.slot_of_row)

    def of_slots(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of ``weights`` [num_slots, …] that take part, and each row's place among them.

        All of them where that costs about as much as those in use and no copy.
        """
        if 2 * len(self.used) >= weights.shape[0]:
            return weights, self.slot_of_row
        return weights[self.used], self.place_of_row


_last: tuple[Tensor, Tensor, Tensor, _Batch] | None = None


def _batch(weight_indices: Tensor, seg_len_tensor: Tensor, lora_ranks: Tensor) -> _Batch:
    """What the segments are; one batch asks this once for every module, with the same tensors each time."""
    global _last
    if _last is None or not (_last[0] is weight_indices and _last[1] is seg_len_tensor and _last[2] is lora_ranks):
        pairs = zip(weight_indices.tolist(), seg_len_tensor.tolist(), strict=False)
        segments = [(slot, length) for slot, length in pairs if length]
        batch = _Batch([slot for slot, _ in segments], [length for _, length in segments], lora_ranks.tolist())
        _last = weight_indices, seg_len_tensor, lora_ranks, batch
    return _last[3]


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
    [num_tokens, num_slices · max_rank] with the slices of a segment side by side at its adapter's own rank, zeros
    after them.
    """
    num_tokens = inputs.shape[0]
    if weights.numel() == 0:
        return inputs.new_zeros(num_tokens, 0)
    batch = _batch(weight_indices, seg_len_tensor, lora_ranks)
    width = weights.shape[1]
    if batch.is_short and batch.num_tokens == num_tokens:
        blocks, places = batch.of_slots(weights)
        products = torch.nn.functional.linear(inputs, blocks.reshape(-1, weights.shape[2]))
        own = products.view(num_tokens, -1, width)[batch.rows, places]
        own *= scaling_tensor[batch.slot_of_row].to(own.dtype)[:, None]
        if num_slices * batch.lowest_rank < width:
            own.masked_fill_(torch.arange(width) >= num_slices * batch.rank_of_row[:, None], 0.0)
        return own
    scalings = scaling_tensor.tolist()
    output = inputs.new_zeros(num_tokens, width)
    start = 0
    for slot, length in zip(batch.slots, batch.lengths, strict=True):
        used, stop = num_slices * batch.ranks[slot], start + length
        if used:
            output[start:stop, :used].addmm_(inputs[start:stop], weights[slot, :used].t(), beta=0, alpha=scalings[slot])
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
    batch = _batch(weight_indices, seg_len_tensor, lora_ranks)
    slices = list(enumerate(itertools.pairwise(offsets)))
    if batch.is_short and batch.num_tokens == num_tokens:
        blocks, places = batch.of_slots(weights.transpose(1, 2))
        spread = _spread(inputs, batch, places, (len(slices), len(blocks), weights.shape[2]))
        columns = blocks.reshape(-1, weights.shape[1])
        for index, (low, high) in slices:
            output[:, low:high].addmm_(spread[index], columns[:, low:high])
        return output
    start = 0
    for slot, length in zip(batch.slots, batch.lengths, strict=True):
        rank, stop = batch.ranks[slot], start + length
        if rank:
            for index, (low, high) in slices:
                output[start:stop, low:high].addmm_(
                    inputs[start:stop, index * rank : (index + 1) * rank], weights[slot, low:high, :rank].t()
                )
        start = stop
    return output


def _spread(inputs: Tensor, batch: _Batch, places: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Each row's numbers at its own slot's place, zeros elsewhere: [num_slices, num_tokens, num_blocks · max_rank].

    ``shape`` is (num_slices, num_blocks, max_rank).
    """
    num_slices, num_blocks, max_rank = shape
    num_tokens = inputs.shape[0]
    wide = inputs.new_zeros(num_slices, num_tokens, num_blocks, max_rank)
    if batch.lowest_rank == max_rank:
        own = inputs.view(num_tokens, num_slices, max_rank)
    else:
        # At its own rank a row's slices begin elsewhere.
        within = torch.arange(max_rank)
        rank = batch.rank_of_row[:, None, None]
        source = (torch.arange(num_slices)[:, None] * rank + within).clamp_(max=inputs.shape[1] - 1)
        own = inputs.gather(1, source.view(num_tokens, -1)).view(num_tokens, num_slices, max_rank)
        own.masked_fill_(within >= rank, 0.0)
    wide[:, batch.rows, places] = own.transpose(0, 1)
    return wide.view(num_slices, num_tokens, num_blocks * max_rank)
