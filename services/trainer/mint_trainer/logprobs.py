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


def target_logprobs(
    base: ResidentBase, batch: MicroBatch, graded: torch.Tensor | None, is_graded_only: bool = False
) -> torch.Tensor:
    """float32 ``[N]`` log-probabilities of ``batch.targets``.

    ``graded`` (bool ``[N]``) tells which of them need a gradient; ``None`` means none and expects grad mode off. The
    others are computed without one, which for a prompt saves two thirds of the output embedding's work, or with
    ``is_graded_only`` not at all, and are 0.
    """
    hidden = base.trunk(batch.token_ids, batch.attention_mask, batch.position_ids).flatten(0, 1)
    if graded is None or bool(graded.all()):
        return _logprobs_at(base, hidden, batch, slice(None))
    logprobs = torch.zeros(graded.shape[0], dtype=torch.float32)
    if not is_graded_only:
        with torch.no_grad():
            logprobs[~graded] = _logprobs_at(base, hidden, batch, ~graded)
    if bool(graded.any()):
        logprobs = logprobs.masked_scatter(graded, _logprobs_at(base, hidden, batch, graded))
    return logprobs


def split_logprobs(batch: MicroBatch, logprobs: torch.Tensor) -> list[array[float]]:
    """One float32 array for each datum of ``batch``; results are kept, and lists are eight times as large."""
    return [array("f", part.tolist()) for part in logprobs.detach().split(batch.lengths)]


def _logprobs_at(
    base: ResidentBase, hidden: torch.Tensor, batch: MicroBatch, chosen: torch.Tensor | slice
) -> torch.Tensor:
    """Log-probabilities of the ``chosen`` targets, for hidden states ``[rows * length, hidden]``."""
    places, targets = batch.places[chosen], batch.targets[chosen]
    if not batch.is_shared:
        return _in_chunks(base, hidden.index_select(0, places), targets)
    # Data that share a token mostly share its target too.
    pairs, which = torch.unique(places * base.vocab_size + targets, return_inverse=True)
    places, targets = pairs // base.vocab_size, pairs % base.vocab_size
    return _in_chunks(base, hidden.index_select(0, places), targets).index_select(0, which)


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
