"""The torch and numpy functions that stand in for SGLang's kernels, against the plainest possible formulas."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from mint_engine.sglang_plugin.expert_lora import forward_with_lora
from mint_engine.sglang_plugin.lora_ops import after_init_buffers, sgemm_lora_a_fwd, sgemm_lora_b_fwd
from mint_engine.sglang_plugin.seeded_sampling import (
    after_from_schedule_batch,
    multinomial_with_seed,
    murmur_hash32,
)


def murmur3_of_bytes(key: bytes) -> int:
    """MurmurHash3 x86 32 of whole 4-byte blocks with seed 0, in plain integers."""
    mask, state = 0xFFFFFFFF, 0
    for start in range(0, len(key), 4):
        block = int.from_bytes(key[start : start + 4], "little") * 0xCC9E2D51 & mask
        block = (block << 15 | block >> 17) & mask
        state ^= block * 0x1B873593 & mask
        state = ((state << 13 | state >> 19) & mask) * 5 + 0xE6546B64 & mask
    state ^= len(key)
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16


def test_hash_is_murmur3_of_seed_position_and_column() -> None:
    # A published vector of the algorithm first, so that the plain version above is right.
    assert murmur3_of_bytes(b"\0\0\0\0") == 0x2362F9DE
    seeds, positions = np.array([0, -1, 1 << 40], dtype=np.int64), np.array([0, 7, 12345], dtype=np.int64)
    hashed = murmur_hash32(seeds, positions, 5)
    assert (hashed.shape, hashed.dtype) == ((3, 5), np.uint32)
    for row in range(3):
        for column in range(5):
            key = int(seeds[row]).to_bytes(8, "little", signed=True)
            key += int(positions[row]).to_bytes(4, "little") + column.to_bytes(4, "little")
            assert hashed[row, column] == murmur3_of_bytes(key)


def test_draws_follow_the_distribution_and_repeat() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    rows = 20_000
    logprobs = probabilities.log().repeat(rows, 1)
    seeds, positions = torch.arange(rows), torch.full((rows,), 3)
    drawn = multinomial_with_seed(logprobs, seeds, positions)
    assert drawn.shape == (rows, 1)
    frequencies = torch.bincount(drawn[:, 0], minlength=4) / rows
    assert torch.allclose(frequencies, probabilities, atol=0.015)
    assert torch.equal(drawn, multinomial_with_seed(logprobs, seeds, positions))
    assert not torch.equal(drawn, multinomial_with_seed(logprobs, seeds, positions + 1))
    # A row's draw does not depend on the other rows.
    assert torch.equal(drawn[5:6], multinomial_with_seed(logprobs[5:6], seeds[5:6], positions[5:6]))


def test_seeds_are_taken_from_the_requests() -> None:
    def batch(*seeds: int | None) -> SimpleNamespace:
        return SimpleNamespace(
            reqs=[SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in seeds]
        )

    def info() -> SimpleNamespace:
        return SimpleNamespace(sampling_seed=None, temperatures=torch.ones(2))

    assert after_from_schedule_batch(info(), type, batch(5, -1), 100).sampling_seed.tolist() == [5, -1]
    assert after_from_schedule_batch(info(), type, batch(None, None), 100).sampling_seed is None


def segments(lengths: list[int]) -> list[slice]:
    starts = np.cumsum([0, *lengths])
    return [slice(int(start), int(stop)) for start, stop in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    ("slots", "lengths", "ranks"),
    [
        ([0, 1, 2], [3, 1, 4], [2, 4, 0]),
        ([0, 1, 2, 1], [1, 1, 1, 1], [4, 4, 0]),
        ([0, 1, 2, 1], [1, 1, 1, 1], [4, 2, 0]),
        ([0, 2, 0], [1, 2, 3], [3, 4, 0]),
        ([1, 0], [1, 7], [4, 2, 0]),
        ([1, 0], [1, 8], [4, 2, 0]),
        ([0, 1], [1, 1], [1, 2, 4, 4, 4, 4, 4]),
        ([3, 5, 3], [1, 1, 2], [4, 4, 4, 4, 4, 4, 4]),
        ([2, 2], [2, 3], [4, 4, 0]),
        ([1], [1], [4, 3, 0]),
    ],
)
def test_batched_lora_equals_one_product_per_segment(slots: list[int], lengths: list[int], ranks: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    max_rank, num_slices, features, offsets = 4, 3, 6, [0, 5, 7, 12]
    num_slots = len(ranks)
    a = torch.randn(num_slots, num_slices * max_rank, features, generator=generator)
    b = torch.randn(num_slots, offsets[-1], max_rank, generator=generator)
    inputs = torch.randn(sum(lengths), features, generator=generator)
    base = torch.randn(sum(lengths), offsets[-1], generator=generator)
    scalings = torch.tensor([0.5, 2.0, 0.0, 1.5, 3.0, 0.25, 1.0])[:num_slots]
    expected = base.clone()
    for slot, rows in zip(slots, segments(lengths), strict=True):
        rank = ranks[slot]
        for index, (low, high) in enumerate(itertools.pairwise(offsets)):
            reduced = inputs[rows] @ a[slot, index * rank : (index + 1) * rank].T * scalings[slot]
            expected[rows, low:high] += reduced @ b[slot, low:high, :rank].T
    tensors = (torch.tensor(slots), torch.tensor(lengths), torch.tensor(ranks))
    reduced = sgemm_lora_a_fwd(inputs, a, *tensors, scalings, num_slices)
    output = base.clone()
    result = sgemm_lora_b_fwd(reduced, b, *tensors, torch.tensor(offsets), output)
    assert result is output
    assert torch.allclose(result, expected, atol=1e-5)
    for slot, rows in zip(slots, segments(lengths), strict=True):
        if ranks[slot] == 0:
            assert torch.equal(result[rows], base[rows])


def test_a_slot_that_overflows_harms_no_other() -> None:
    """A·x of one adapter may be infinite; the rows of the others, and those of the base, do not see it."""
    a, b = torch.ones(3, 2, 3), torch.ones(3, 5, 2)
    a[1] = 3e38
    tensors = (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1]), torch.tensor([2, 2, 0]))
    reduced = sgemm_lora_a_fwd(torch.ones(3, 3), a, *tensors, torch.ones(3))
    result = sgemm_lora_b_fwd(reduced, b, *tensors, torch.tensor([0, 5]))
    assert torch.equal(result[0], torch.full((5,), 6.0))
    assert not torch.isfinite(result[1]).any()
    assert torch.equal(result[2], torch.zeros(5))


def test_b_buffers_keep_their_shape_and_have_contiguous_transposes() -> None:
    experts = torch.zeros(2, 4, 5, 3)
    pool = SimpleNamespace(B_buffer={"o_proj": [torch.zeros(2, 5, 3)], "down_proj_moe": [experts]})
    after_init_buffers(None, pool, None)
    (buffer,) = pool.B_buffer["o_proj"]
    assert buffer.shape == (2, 5, 3)
    assert buffer.transpose(1, 2).is_contiguous()
    assert not buffer.any()
    assert pool.B_buffer["down_proj_moe"][0] is experts


def test_empty_slots_give_empty_products() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert sgemm_lora_a_fwd(torch.ones(2, 3), torch.zeros(0, 4, 3), none, none, none, none).shape == (2, 0)
    zero = sgemm_lora_b_fwd(torch.ones(2, 4), torch.zeros(0, 5, 4), none, none, none, torch.tensor([0, 5]))
    assert torch.equal(zero, torch.zeros(2, 5))


@pytest.mark.parametrize("shared_outer", [False, True])
def test_expert_lora_equals_merged_weights_per_token(shared_outer: bool) -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    num_slots, num_experts, hidden, width, rank, num_tokens = 3, 4, 6, 5, 2, 7
    outer = 1 if shared_outer else num_experts
    base = SimpleNamespace(
        w13_weight=random(num_experts, 2 * width, hidden), w2_weight=random(num_experts, hidden, width)
    )
    slot_of_token = torch.tensor([0, 1, 1, 2, -1, 0, 2])
    info = SimpleNamespace(
        gate_up_lora_a_weights=random(num_slots, outer, 2 * rank, hidden),
        gate_up_lora_b_weights=random(num_slots, num_experts, 2 * width, rank),
        down_lora_a_weights=random(num_slots, num_experts, rank, width),
        down_lora_b_weights=random(num_slots, outer, hidden, rank),
        token_lora_mapping=slot_of_token,
        max_lora_rank=rank,
        has_active_lora=True,
    )
    states = random(num_tokens, hidden)
    weights, ids = torch.rand(num_tokens, 2, generator=generator), torch.randint(0, 4, (num_tokens, 2))
    expected = torch.zeros_like(states)
    for token in range(num_tokens):
        slot = int(slot_of_token[token])
        for choice in range(2):
            expert = int(ids[token, choice])
            gate_up, down = base.w13_weight[expert].clone(), base.w2_weight[expert].clone()
            if slot >= 0:
                shared = 0 if shared_outer else expert
                lora_a, lora_b = info.gate_up_lora_a_weights[slot, shared], info.gate_up_lora_b_weights[slot, expert]
                gate_up[:width] += lora_b[:width] @ lora_a[:rank]
                gate_up[width:] += lora_b[width:] @ lora_a[rank:]
                down += info.down_lora_b_weights[slot, shared] @ info.down_lora_a_weights[slot, expert]
            both = gate_up @ states[token]
            expected[token] += weights[token, choice] * (down @ (silu(both[:width]) * both[width:]))
    layer = SimpleNamespace(base_layer=base)
    found = forward_with_lora(layer, states, (weights, ids, None), info)
    assert torch.allclose(found, expected, atol=1e-5)
    info.has_active_lora = False
    plain = forward_with_lora(layer, states, (weights, ids, None), info)
    assert torch.allclose(plain[4], expected[4], atol=1e-6)
    assert not torch.allclose(plain[0], expected[0], atol=1e-3)
