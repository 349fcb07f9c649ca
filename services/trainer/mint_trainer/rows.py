"""Rows: what the base computes side by side, in which data that begin alike have their common tokens computed once.

A step of reinforcement learning brings many samples of one prompt, and most of its tokens are that prompt again and
again. A row holds the tokens of one or several consecutive data as a tree: data go together as far as their tokens are
equal, and each branch sees its own ancestors only, at positions that count from the root. What comes out at a token is
what would have come out of its datum alone, and the gradient reaches a shared token from every branch, so in exact
arithmetic nothing changes; in floating point the sums have another order. The idea is that of Liu et al. 2025 (Prefix
Grouper, arXiv 2506.05433), who split attention in two where a mask does it here, and share one prefix where a tree
shares all of them.

With 8 samples each of 8 prompts (80 tokens and 15; SmolLM2-135M, float32, 2 threads of a CPU) a forward_backward that
returns no log-probabilities takes 13.6 s of processor time instead of 48.9 s, 3.6 times less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["MAX_SHARED_ROW_TOKENS", "Row", "attention_of", "rows_of"]

MAX_SHARED_ROW_TOKENS = 1024
"""Longest row of several data: attention is computed over all pairs of a row's tokens, seen or not."""


@dataclass(slots=True)
class Row:
    """Tokens of one or several data, each after its ancestors; with one datum simply its tokens."""

    token_ids: list[int] = field(default_factory=list)
    """Input token ids."""
    position_ids: list[int] = field(default_factory=list)
    """Position of each token in its data: the number of its ancestors."""
    paths: list[list[int]] = field(default_factory=list)
    """For each datum, rising, where its tokens are in ``token_ids``."""
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    """Place of the token that follows a place, -1 being before the first, with an id."""

    @property
    def is_shared(self) -> bool:
        """Whether it holds several data."""
        return len(self.paths) > 1

    def add(self, tokens: Sequence[int]) -> None:
        """Add a datum, computing anew only what follows its longest prefix in this row."""
        path = self._shared_path(tokens)
        for token in tokens[len(path) :]:
            place = len(self.token_ids)
            self._children[path[-1] if path else -1, token] = place
            self.token_ids.append(token)
            self.position_ids.append(len(path))
            path.append(place)
        self.paths.append(path)

    def takes(self, tokens: Sequence[int], max_tokens: int) -> bool:
        """Whether at least half of a further datum is here already, and the row stays within ``max_tokens``."""
        if len(self.token_ids) > max_tokens:
            return False
        num_shared = len(self._shared_path(tokens))
        return 2 * num_shared >= len(tokens) and len(self.token_ids) + len(tokens) - num_shared <= max_tokens

    def _shared_path(self, tokens: Sequence[int]) -> list[int]:
        path: list[int] = []
        place = -1
        for token in tokens:
            following = self._children.get((place, token))
            if following is None:
                break
            path.append(following)
            place = following
        return path


def rows_of(sequences: Sequence[Sequence[int]], max_shared_tokens: int) -> Iterator[Row]:
    """Put token ``sequences`` into rows, in their order; with 0 every one has its own.

    A sequence joins the row before it if at least half of its tokens are there already and the row then has at most
    ``max_shared_tokens``, itself at most :data:`MAX_SHARED_ROW_TOKENS`. Nothing else counts.
    """
    max_tokens = min(max_shared_tokens, MAX_SHARED_ROW_TOKENS)
    row = Row()
    for sequence in sequences:
        tokens = list(sequence)
        if row.paths and not row.takes(tokens, max_tokens):
            yield row
            row = Row()
        row.add(tokens)
    if row.paths:
        yield row


def attention_of(rows: Sequence[Row], length: int) -> torch.Tensor:
    """bool ``[rows, 1, length, length]``: which place (last) is seen from which.

    From a token that is the token itself and its ancestors; from a place of padding that place, because attention to
    nothing at all is not a number.
    """
    seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for index, row in enumerate(rows):
        for path in row.paths:
            places = torch.tensor(path)
            # No token of one path is an ancestor of an earlier one in another, so nothing is unset again.
            seen[index, places.unsqueeze(1), places] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return seen.unsqueeze(1)
