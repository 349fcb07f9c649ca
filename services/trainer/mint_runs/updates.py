"""From a rollout batch to the data of one update: a pure function of the batch and the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mint_api.v1 import run_service_pb2, session_service_pb2
from mint_runs.advantages import group_advantages, is_informative, token_weights
from mint_runs.rollouts import RolloutBatch, RolloutGroup, RolloutSample

__all__ = ["UpdateData", "pieces", "update_data"]

_MAX_PIECE_TOKENS = 1 << 16
_MAX_PIECE_BYTES = 4 << 20
"""Half of what a gRPC message may have by default."""


@dataclass(frozen=True, slots=True)
class UpdateData:
    """What one update is computed from."""

    data: tuple[session_service_pb2.Datum, ...]
    """One for each sample that teaches; a single one of weight 0 if none does."""
    num_used_samples: int
    num_uninformative_groups: int


def update_data(
    batch: RolloutBatch,
    *,
    advantage: run_service_pb2.GroupAdvantage.ValueType,
    weighting: run_service_pb2.TokenWeighting.ValueType,
    max_new_tokens: int,
    keep_uninformative: bool,
    replay_routed_experts: bool = False,
) -> UpdateData:
    """Advantages by group, weights over all samples that are used.

    A sample without a reward or without a token is left out, and so is a group that is not informative, unless
    ``keep_uninformative`` (a KL penalty teaches there too). Weights add up over the samples that are used, so that a
    step with few of them is as large as any other. Recorded experts go along with ``replay_routed_experts`` only.
    """
    used: list[tuple[RolloutGroup, RolloutSample, float]] = []
    num_uninformative_groups = 0
    for group in batch.groups:
        rewards = [sample.reward for sample in group.samples]
        if not is_informative(rewards):
            num_uninformative_groups += 1
            if not keep_uninformative:
                continue
        for sample, value in zip(group.samples, group_advantages(rewards, advantage), strict=True):
            if value is not None and sample.token_ids:
                used.append((group, sample, value))
    if not used:
        return UpdateData((_idle_datum(batch.groups[0]),), 0, num_uninformative_groups)
    lengths = [len(sample.token_ids) for _, sample, _ in used]
    weights = token_weights(lengths, weighting, max_new_tokens=max_new_tokens)
    data = tuple(
        _datum(group, sample, value, weight, with_routed_experts=replay_routed_experts)
        for (group, sample, value), weight in zip(used, weights, strict=True)
    )
    return UpdateData(data, len(used), num_uninformative_groups)


def pieces(data: Sequence[session_service_pb2.Datum]) -> Iterator[list[session_service_pb2.Datum]]:
    """``data`` in order, cut where a call to the trainer would grow too large; gradients add up over calls."""
    piece: list[session_service_pb2.Datum] = []
    num_tokens = num_bytes = 0
    for datum in data:
        # A reference log-probability may be added to each target.
        size_bytes = datum.ByteSize() + 4 * len(datum.tokens)
        too_large = num_tokens + len(datum.tokens) > _MAX_PIECE_TOKENS or num_bytes + size_bytes > _MAX_PIECE_BYTES
        if piece and too_large:
            yield piece
            piece, num_tokens, num_bytes = [], 0, 0
        piece.append(datum)
        num_tokens += len(datum.tokens)
        num_bytes += size_bytes
    if piece:
        yield piece


def _datum(
    group: RolloutGroup, sample: RolloutSample, advantage: float, weight: float, *, with_routed_experts: bool
) -> session_service_pb2.Datum:
    """Prompt and completion, the targets one place ahead; only the completion's targets count."""
    token_ids = (*group.prompt_token_ids, *sample.token_ids)
    masked = [0.0] * (len(group.prompt_token_ids) - 1)
    num_tokens = len(sample.token_ids)
    experts = sample.routed_experts if with_routed_experts else None
    return session_service_pb2.Datum(
        tokens=token_ids[:-1],
        targets=token_ids[1:],
        weights=[*masked, *[weight] * num_tokens],
        behavior_logprobs=[*masked, *sample.logprobs],
        advantages=[*masked, *[advantage] * num_tokens],
        routed_experts=b"" if experts is None else experts.astype("<i4").tobytes(),
    )


def _idle_datum(group: RolloutGroup) -> session_service_pb2.Datum:
    """A step counts also where nothing is learnt: one target of weight 0."""
    token_id = group.prompt_token_ids[0]
    return session_service_pb2.Datum(
        tokens=[token_id], targets=[token_id], weights=[0.0], behavior_logprobs=[0.0], advantages=[0.0]
    )
