"""From rewards to what an update is computed from: advantages of groups, weights of tokens. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mint_api.v1 import run_service_pb2
from mint_core.errors import InvalidArgument

__all__ = ["STD_EPSILON", "group_advantages", "is_informative", "token_weights"]

STD_EPSILON = 1e-4
"""Added to a group's standard deviation before it divides."""


def is_informative(rewards: Sequence[float | None]) -> bool:
    """Whether a group tells better samples from worse ones: at least two rewards that are not all equal."""
    return len({reward for reward in rewards if reward is not None}) > 1


def group_advantages(
    rewards: Sequence[float | None], advantage: run_service_pb2.GroupAdvantage.ValueType
) -> list[float | None]:
    """Advantage of each sample of one group; None for a sample without a reward, which neither mean nor deviation
    counts.

    STANDARDIZED (Shao et al. 2024, arXiv 2402.03300): (reward - mean) / (population standard deviation + 1e-4).
    CENTERED (Liu et al. 2025, arXiv 2503.20783): reward - mean. In a group that is not informative all are 0.
    """
    scores = [reward for reward in rewards if reward is not None]
    if not is_informative(rewards):
        return [None if reward is None else 0.0 for reward in rewards]
    mean = statistics.fmean(scores)
    match advantage:
        case run_service_pb2.GROUP_ADVANTAGE_STANDARDIZED:
            scale = statistics.pstdev(scores) + STD_EPSILON
        case run_service_pb2.GROUP_ADVANTAGE_CENTERED:
            scale = 1.0
        case _:
            raise InvalidArgument(
                f"grpo.advantage is {advantage}: expected STANDARDIZED or CENTERED", field="advantage"
            )
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def token_weights(
    num_tokens: Sequence[int], weighting: run_service_pb2.TokenWeighting.ValueType, *, max_new_tokens: int
) -> list[float]:
    """Weight of every token of each completion, of ``num_tokens`` tokens each, at least 1.

    The losses are sums over tokens, and with these weights the sum is the mean that ``weighting`` names: over the
    tokens (TOKEN_MEAN: Yu et al. 2025, arXiv 2503.14476), over the completions' means (SEQUENCE_MEAN: Shao et al.
    2024), or over the completions' sums divided by ``max_new_tokens`` (FIXED_LENGTH: Liu et al. 2025).
    """
    num_samples = len(num_tokens)
    match weighting:
        case run_service_pb2.TOKEN_WEIGHTING_TOKEN_MEAN:
            return [1.0 / sum(num_tokens)] * num_samples
        case run_service_pb2.TOKEN_WEIGHTING_SEQUENCE_MEAN:
            return [1.0 / (num_samples * count) for count in num_tokens]
        case run_service_pb2.TOKEN_WEIGHTING_FIXED_LENGTH:
            return [1.0 / (num_samples * max_new_tokens)] * num_samples
        case _:
            raise InvalidArgument(
                f"grpo.weighting is {weighting}: expected TOKEN_MEAN, SEQUENCE_MEAN or FIXED_LENGTH", field="weighting"
            )
