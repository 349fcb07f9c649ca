"""One seed per request: AFTER ``SamplingBatchInfo.from_schedule_batch``, and REPLACE ``multinomial_with_seed`` without
a GPU.

Without the first hook SGLang ignores ``sampling_seed`` unless its deterministic mode is on, and that mode refuses the
torch attention backend. SGLang's torch sampler itself is complete: given seeds it draws each token by hashing seed,
position and column, so that a request's tokens depend on its seed and not on who shares its batch. MinT's host gives
every request a seed; batches are therefore seeded throughout and merge without gaps.

Without the second, the hash needs a Triton kernel or a compiled CPU operator that no package brings. This one computes
the same numbers, MurmurHash3 (x86, 32 bits, public domain, Austin Appleby) over seed, position and column, so that a
seed means the same draw on every device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["after_from_schedule_batch", "multinomial_with_seed", "murmur_hash32"]

_SEED_OF_UNSEEDED = 42
_KEY_BYTES = 16
# The largest uniform below 1 that the hash can make, as a logarithm: at 1 the noise would be infinite.
_MAX_LOG_UNIFORM = -(2.0**-32)

_UInt32s = npt.NDArray[np.uint32]


def after_from_schedule_batch(result: Any, _cls: type, batch: Any, *_: Any, **__: Any) -> Any:
    """Fill ``sampling_seed`` [batch size], int64, from the requests of the batch."""
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    if result.sampling_seed is None and any(seed is not None for seed in seeds):
        result.sampling_seed = torch.tensor(
            [_SEED_OF_UNSEEDED if seed is None else seed for seed in seeds],
            dtype=torch.int64,
            device=result.temperatures.device,
        )
    return result


def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """Draw one column per row by the Gumbel-max trick, with noise hashed from ``seed`` and ``positions``.

    ``logprobs`` [n, num_columns], up to a constant per row, ``-inf`` never drawn; ``seed`` [n], int64; ``positions``
    [n]. Returns [n, 1], int64.
    """
    hashed = murmur_hash32(seed.numpy(), positions.numpy(), logprobs.shape[1])
    noise = torch.from_numpy(hashed.astype(np.float64)).div_(float(np.iinfo(np.uint32).max))
    noise.log_().clamp_(min=torch.finfo(torch.float64).min, max=_MAX_LOG_UNIFORM).neg_()
    noise.log_().neg_()
    return noise.add_(logprobs.to(torch.float64)).argmax(dim=1, keepdim=True)


def murmur_hash32(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.integer[Any]], num_columns: int) -> _UInt32s:
    """Hash of (seed's low half, its high half, position, column) as four 32-bit blocks: [n, num_columns]."""
    wide = seeds.astype(np.int64).view(np.uint64)
    state: _UInt32s = np.zeros((len(wide), 1), dtype=np.uint32)
    for block in (wide & np.uint64(0xFFFFFFFF), wide >> np.uint64(32), positions):
        state = _mix(state, block.astype(np.uint32)[:, None])
    state = _mix(state, np.arange(num_columns, dtype=np.uint32)[None, :])
    state ^= np.uint32(_KEY_BYTES)
    state ^= state >> np.uint32(16)
    state *= np.uint32(0x85EBCA6B)
    state ^= state >> np.uint32(13)
    state *= np.uint32(0xC2B2AE35)
    state ^= state >> np.uint32(16)
    return state


def _mix(state: _UInt32s, block: _UInt32s) -> _UInt32s:
    block = _rotate_left(block * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate_left(state ^ block, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate_left(value: _UInt32s, bits: int) -> _UInt32s:
    return (value << np.uint32(bits)) | (value >> np.uint32(32 - bits))
