"""Log-probabilities of targets under the active adapter: the one forward pass that every step goes through."""

from __future__ import annotations

from array import array

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mint_trainer.base import ResidentBase
from mint_trainer.batch import MicroBatch

__all__ = ["split_logprobs", "target_logprobs"]

LOGITS_CHUNK_TOKENS = 1024
"""Logits are the largest tensor of a step (200 MB for so many tokens of a 49k vocabulary)."""


def target_logprobs(base: ResidentBase, batch: MicroBatch, graded: torch.Tensor | None) -> torch.Tensor:
    """float32 ``[N]`` log-probabilities of ``batch.targets``.

    ``graded`` (bool ``[N]``) tells which of them need a gradient; ``None`` means none and expects grad mode off. The
    others are computed without one, which for a prompt saves two thirds of the output embedding's work.
    """
    hidden = base.trunk(batch.token_ids, batch.attention_mask)
    hidden = hidden.flatten(0, 1).index_select(0, batch.positions())
    if graded is None or bool(graded.all()):
        return _in_chunks(base, hidden, batch.targets)
    logprobs = torch.empty(hidden.shape[0], dtype=torch.float32)
    with torch.no_grad():
        logprobs[~graded] = _in_chunks(base, hidden[~graded], batch.targets[~graded])
    if bool(graded.any()):
        logprobs = logprobs.masked_scatter(graded, _in_chunks(base, hidden[graded], batch.targets[graded]))
    return logprobs


def split_logprobs(batch: MicroBatch, logprobs: torch.Tensor) -> list[array[float]]:
    """One float32 array for each datum of ``batch``; results are kept, and lists are eight times as large."""
    return [array("f", part.tolist()) for part in logprobs.detach().split(batch.lengths)]


def _in_chunks(base: ResidentBase, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if hidden.shape[0] <= LOGITS_CHUNK_TOKENS:
        return _logprobs(base, hidden, targets)
    # With more than one chunk the logits of each are recomputed in the backward pass instead of all being kept.
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(_logprobs, base, h, t, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _logprobs(base, h, t)
        for h, t in zip(hidden.split(LOGITS_CHUNK_TOKENS), targets.split(LOGITS_CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(parts)


def _logprobs(base: ResidentBase, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(base.head(hidden).float(), targets, reduction="none")
