"""The losses, one table. All are sums over tokens with explicit weights; no loss divides by anything.

A loss sees one micro-batch, flattened to its N tokens of non-zero weight, and may not look across micro-batches:
since every loss is a sum over tokens, the sum over micro-batches is the step's loss whatever way it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mint_core.errors import InvalidArgument

__all__ = ["LOSSES", "Loss", "LossInputs"]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch as a loss sees it; every tensor is float32 ``[N]``."""

    logprobs: torch.Tensor
    """Log-probabilities of the targets under the policy being trained; the only one with a gradient."""
    weights: torch.Tensor
    """Weights of the targets, none of them 0."""
    behavior_logprobs: torch.Tensor | None
    """Log-probabilities under the behaviour policy; never ``None`` for a loss that needs them."""
    advantages: torch.Tensor | None
    """Advantages; never ``None`` for a loss that needs them."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss function and what it needs."""

    compute: Callable[[LossInputs, Mapping[str, float]], torch.Tensor]
    """Inputs and all parameters, to a scalar."""
    needs: tuple[str, ...] = ()
    """Fields of :class:`LossInputs` beyond log-probabilities and weights that every datum must bring."""
    defaults: Mapping[str, float] | None = None
    """Parameters by name and their default values."""

    def parameters(self, given: Mapping[str, float]) -> dict[str, float]:
        """Defaults overlaid with ``given``; :class:`InvalidArgument` for a name this loss does not have."""
        known = dict(self.defaults or {})
        for name, value in given.items():
            if name not in known:
                raise InvalidArgument(
                    f"loss_parameters has {name!r}: this loss takes {', '.join(sorted(known)) or 'none'}",
                    field=f"loss_parameters[{name!r}]",
                )
            known[name] = value
        return known


def _cross_entropy(inputs: LossInputs, parameters: Mapping[str, float]) -> torch.Tensor:
    del parameters
    return -(inputs.weights * inputs.logprobs).sum()


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy),
}
"""Every loss by the name of its ``mint.v1.LossFunction`` in lower case."""
