"""A rollout batch as plain data: everything an update is computed from, and who generated it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mint_api.v1 import common_pb2

__all__ = ["RolloutBatch", "RolloutGroup", "RolloutSample"]


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One completion of a prompt."""

    token_ids: tuple[int, ...]
    """The completion as the engine chose it, up to and with the token that ended it."""
    logprobs: tuple[float, ...]
    """Natural logarithm of each token's probability under the generating revision at temperature 1, float32."""
    finish_reason: str
    """``stop`` or ``length``."""
    text: str
    """The completion as its scorer saw it: without the end token and without a stop text."""
    reward: float | None
    """The score, float32; None if there is none."""
    error: str
    """Why there is no reward; empty if there is one."""
    routed_experts: npt.NDArray[np.int32] | None = None
    """Experts of prompt and completion, [num_tokens - 1, num_layers, top_k]; None where the base routes nothing."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A prompt and its samples."""

    line: int
    """Line of the data set, from 1."""
    prompt_token_ids: tuple[int, ...]
    """The prompt as the engine saw it."""
    samples: tuple[RolloutSample, ...]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """All groups of one step of a run."""

    run: str
    """Resource name."""
    step: int
    """From 1."""
    revision: str
    """Resource name of the revision that generated every sample."""
    revision_digest: str
    """Digest of that revision's blob."""
    numerics: common_pb2.Numerics
    """Arithmetic of the engine that generated."""
    temperature: float
    """Of the sampling."""
    groups: tuple[RolloutGroup, ...]

    def samples(self) -> Iterator[RolloutSample]:
        """All samples, group after group."""
        for group in self.groups:
            yield from group.samples

    @property
    def num_samples(self) -> int:
        return sum(len(group.samples) for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(sample.token_ids) for sample in self.samples())

    @property
    def rewards(self) -> list[float]:
        """Rewards of the scored samples."""
        return [sample.reward for sample in self.samples() if sample.reward is not None]

    @property
    def num_unscored(self) -> int:
        return self.num_samples - len(self.rewards)

    @property
    def reward_mean(self) -> float:
        """Over the scored samples; 0 if there is none."""
        return statistics.fmean(self.rewards) if self.rewards else 0.0

    @property
    def reward_std(self) -> float:
        """Population standard deviation over the scored samples; 0 if there is none."""
        return statistics.pstdev(self.rewards) if self.rewards else 0.0

    @property
    def entropy(self) -> float:
        """Monte-Carlo estimate of the entropy per token, in nats: the mean of -log p over the sampled tokens, which is
        unbiased at temperature 1. 0 if there are none."""
        logprobs = [logprob for sample in self.samples() for logprob in sample.logprobs]
        return -statistics.fmean(logprobs) if logprobs else 0.0
