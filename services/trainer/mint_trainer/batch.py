"""What a step is computed on: checked token sequences, and how they are cut into micro-batches.

The shift is the caller's: ``targets[i]`` is what should follow ``tokens[0..i]``, so for a text ``t`` of n+1 tokens
``tokens = t[:-1]`` and ``targets = t[1:]``. Inside, the sequences become right-padded, masked rows (see
:mod:`mint_trainer.rows`); nothing computed for a padded position is ever read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mint_core.errors import InvalidArgument
from mint_trainer.rows import MAX_SHARED_ROW_TOKENS, Row, attention_of, rows_of

__all__ = ["BatchLimits", "Datum", "MicroBatch", "check_data", "micro_batches"]


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence: tokens in, targets and their side inputs at the same positions."""

    tokens: Sequence[int]
    """Input token ids, length n of at least 1."""
    targets: Sequence[int]
    """Target token ids, length n."""
    weights: Sequence[float]
    """Weight of each target in the loss, length n; a target of weight 0 contributes nothing to loss or gradient."""
    behavior_logprobs: Sequence[float] = ()
    """Log-probabilities of the targets under the behaviour policy, length n or empty."""
    advantages: Sequence[float] = ()
    """Advantage of each target, length n or empty."""
    reference_logprobs: Sequence[float] = ()
    """Log-probabilities of the targets under a reference policy, length n or empty."""


_SIDE_INPUTS = ("behavior_logprobs", "advantages", "reference_logprobs")
"""Fields of :class:`Datum` that all data of a step have, or none."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one step may bring, and how much of it is computed at once."""

    vocab_size: int
    """Token ids are in ``[0, vocab_size)``."""
    max_datum_tokens: int
    """Longest sequence."""
    max_step_tokens: int
    """All tokens of one step."""
    micro_batch_tokens: int
    """Padded tokens computed at once; a single longer sequence is computed alone."""
    share_prefixes: bool = True
    """Whether tokens with which consecutive data begin alike are computed once."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some consecutive data of a step as tensors; N is the number of their tokens, shared ones counted every time."""

    first: int
    """Index in the step of the first datum."""
    lengths: tuple[int, ...]
    """Number of tokens of each datum."""
    token_ids: torch.Tensor
    """int64 ``[rows, length]``, right-padded."""
    attention_mask: torch.Tensor
    """int64 ``[rows, length]``, 1 at real tokens; bool ``[rows, 1, length, length]``, what is seen from where, if
    a row is shared."""
    position_ids: torch.Tensor | None
    """int64 ``[rows, length]``; ``None`` if no row is shared, when they simply count."""
    places: torch.Tensor
    """int64 ``[N]``: where in the flattened ``[rows * length]`` each token of the data is computed."""
    targets: torch.Tensor
    """int64 ``[N]``, data after data."""
    weights: torch.Tensor
    """float32 ``[N]``."""
    behavior_logprobs: torch.Tensor | None
    """float32 ``[N]``, if every datum of the step has them."""
    advantages: torch.Tensor | None
    """float32 ``[N]``, if every datum of the step has them."""
    reference_logprobs: torch.Tensor | None
    """float32 ``[N]``, if every datum of the step has them."""

    @property
    def is_shared(self) -> bool:
        """Whether some tokens are computed for several data."""
        return self.position_ids is not None

    def datum_index(self) -> torch.Tensor:
        """int64 ``[N]``: which datum of this micro-batch each token belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))


def check_data(data: Sequence[Datum], limits: BatchLimits) -> None:
    """Raise :class:`InvalidArgument` naming the first bad field."""
    if not data:
        raise InvalidArgument("data is empty: a step needs at least one datum", field="data")
    num_tokens = sum(len(datum.tokens) for datum in data)
    if num_tokens > limits.max_step_tokens:
        raise InvalidArgument(
            f"data has {num_tokens} tokens: one step takes {limits.max_step_tokens}; split it, gradients add up",
            field="data",
        )
    for index, datum in enumerate(data):
        _check_datum(datum, f"data[{index}]", limits)
    for name in _SIDE_INPUTS:
        given = sum(1 for datum in data if len(getattr(datum, name)))
        if given not in (0, len(data)):
            raise InvalidArgument(
                f"data: {given} of {len(data)} have {name}; either all data of a step have them or none",
                field=f"data.{name}",
            )


def _check_datum(datum: Datum, where: str, limits: BatchLimits) -> None:
    length = len(datum.tokens)
    if length == 0:
        raise InvalidArgument(f"{where}.tokens is empty: a sequence has at least one token", field=f"{where}.tokens")
    if length > limits.max_datum_tokens:
        raise InvalidArgument(
            f"{where}.tokens has {length} tokens: the longest sequence is {limits.max_datum_tokens}",
            field=f"{where}.tokens",
        )
    for name in ("targets", "weights", *_SIDE_INPUTS):
        given = len(getattr(datum, name))
        if given != length and (given or name not in _SIDE_INPUTS):
            raise InvalidArgument(
                f"{where}.{name} has {given} entries and tokens {length}: they must be equally many",
                field=f"{where}.{name}",
            )
    for name in ("tokens", "targets"):
        ids = getattr(datum, name)
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            bad = next(i for i, token in enumerate(ids) if not 0 <= token < limits.vocab_size)
            raise InvalidArgument(
                f"{where}.{name}[{bad}] is {ids[bad]}: token ids of this base are 0 to {limits.vocab_size - 1}",
                field=f"{where}.{name}[{bad}]",
            )
    for name in ("weights", *_SIDE_INPUTS):
        values = getattr(datum, name)
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise InvalidArgument(
                    f"{where}.{name}[{i}] is {value}: must be a finite number", field=f"{where}.{name}[{i}]"
                )


def micro_batches(data: Sequence[Datum], limits: BatchLimits) -> Iterator[MicroBatch]:
    """Cut checked ``data`` in their order; how it is cut depends on nothing but the data and the limits."""
    rows: list[Row] = []
    start = num_data = longest = 0
    for row in rows_of([datum.tokens for datum in data], limits.micro_batch_tokens if limits.share_prefixes else 0):
        longest = max(longest, len(row.token_ids))
        # What is seen from where is a square of the length: rows too long to be shared stay away from shared ones.
        is_too_long = longest > MAX_SHARED_ROW_TOKENS and any(each.is_shared for each in (*rows, row))
        if rows and (is_too_long or longest * (len(rows) + 1) > limits.micro_batch_tokens):
            yield _as_tensors(start, data[start : start + num_data], rows)
            start += num_data
            rows, num_data, longest = [], 0, len(row.token_ids)
        rows.append(row)
        num_data += len(row.paths)
    if rows:
        yield _as_tensors(start, data[start:], rows)


def _as_tensors(first: int, data: Sequence[Datum], rows: Sequence[Row]) -> MicroBatch:
    length = max(len(row.token_ids) for row in rows)
    shape = (len(rows), length)
    token_ids, position_ids, is_token = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for index, row in enumerate(rows):
        num_tokens = len(row.token_ids)
        token_ids[index, :num_tokens] = torch.tensor(row.token_ids)
        position_ids[index, :num_tokens] = torch.tensor(row.position_ids)
        is_token[index, :num_tokens] = 1
    is_shared = any(row.is_shared for row in rows)
    places = [index * length + place for index, row in enumerate(rows) for path in row.paths for place in path]
    return MicroBatch(
        first=first,
        lengths=tuple(len(datum.tokens) for datum in data),
        token_ids=token_ids,
        attention_mask=attention_of(rows, length) if is_shared else is_token,
        position_ids=position_ids if is_shared else None,
        places=torch.tensor(places),
        targets=torch.tensor([token for datum in data for token in datum.targets], dtype=torch.int64),
        weights=_flat(data, "weights"),
        **{name: _flat(data, name) if len(getattr(data[0], name)) else None for name in _SIDE_INPUTS},
    )


def _flat(data: Sequence[Datum], name: str) -> torch.Tensor:
    return torch.tensor([value for datum in data for value in getattr(datum, name)], dtype=torch.float32)
