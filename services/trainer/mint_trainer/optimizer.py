"""AdamW over one policy's parameters (Loshchilov & Hutter 2019, arXiv 1711.05101), by torch's own kernel.

The moments are plain tensors of ours instead of a ``torch.optim.Optimizer``'s pickled state, and the hyper-parameters
come with each step, so a schedule belongs to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.adamw import adamw

from mint_core.errors import InvalidArgument

__all__ = ["AdamW", "AdamWConfig", "gradient_norm"]


@dataclass(frozen=True, slots=True)
class AdamWConfig:
    """Hyper-parameters of one optimizer step."""

    learning_rate: float
    """Taken as it is; 0 leaves the weights and moves the moments."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 0.0
    """The gradient is scaled down to this norm; 0 means no clipping."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps > 0):  # 0 would divide 0 by 0 where a gradient is 0
            raise InvalidArgument(
                f"optimizer.eps is {self.eps}: must be a positive finite number", field="optimizer.eps"
            )
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(
                    f"optimizer.{name} is {value}: must be a finite number of at least 0", field=f"optimizer.{name}"
                )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InvalidArgument(
                    f"optimizer.{name} is {value}: must be at least 0 and below 1", field=f"optimizer.{name}"
                )


def gradient_norm(gradients: list[torch.Tensor]) -> float:
    """Euclidean norm over all ``gradients`` together, 0 for none."""
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


class AdamW:
    """Moments of one policy, by parameter name; a parameter without gradient in a step is left alone."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.exp_avg = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.num_updates = {name: torch.zeros((), dtype=torch.float32) for name in parameters}
        """Times each parameter was updated: what the bias correction counts."""

    @torch.no_grad()
    def update(self, gradients: Mapping[str, torch.Tensor], config: AdamWConfig) -> None:
        """Move the parameters that have a gradient; the gradients are expected to be scaled and clipped."""
        names = list(gradients)
        adamw(
            [self._parameters[name] for name in names],
            [gradients[name] for name in names],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            [],
            [self.num_updates[name] for name in names],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )
