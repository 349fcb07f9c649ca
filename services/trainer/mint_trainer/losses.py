"""The losses, one table. All are sums over tokens with explicit weights; no loss divides by anything.

A loss sees one micro-batch, flattened to its N tokens of non-zero weight, and may not look across micro-batches. Since
every loss is a sum over tokens, and a micro-batch holds whole data, the sum over micro-batches is the step's loss
whatever way it was cut.

In the formulas w is a token's weight, A its advantage, p its probability under the policy in training, q under the
behaviour policy, p_ref under the reference policy and r = p / q. With ``sequence_level`` r is the same for all tokens
of a datum: the geometric mean of their ratios (Zheng et al. 2025, GSPO, arXiv 2507.18071).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from mint_core.errors import InvalidArgument, WrongState
from mint_trainer.batch import Datum, MicroBatch

__all__ = ["LOSSES", "Loss", "LossInputs", "LossValue"]

_MAX_PARAMETER = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch as a loss sees it; every tensor is ``[N]`` and float32 unless it says otherwise."""

    logprobs: torch.Tensor
    """Log-probabilities of the targets under the policy in training; the only one with a gradient."""
    weights: torch.Tensor
    """Weights of the targets, none of them 0."""
    datum_index: torch.Tensor
    """int64, rising: which datum of the micro-batch each token belongs to."""
    behavior_logprobs: torch.Tensor | None = None
    """Log-probabilities under the behaviour policy; never ``None`` for a loss that needs them."""
    advantages: torch.Tensor | None = None
    """Advantages; never ``None`` for a loss that needs them."""
    reference_logprobs: torch.Tensor | None = None
    """Log-probabilities under the reference policy; never ``None`` if ``kl_coefficient`` is positive."""

    @classmethod
    def of(cls, batch: MicroBatch, logprobs: torch.Tensor) -> Self:
        """The tokens of ``batch`` that count, with ``logprobs`` of all its targets."""
        graded = batch.weights != 0
        side_inputs = (batch.behavior_logprobs, batch.advantages, batch.reference_logprobs)
        return cls(
            logprobs[graded],
            batch.weights[graded],
            batch.datum_index()[graded],
            *(None if values is None else values[graded] for values in side_inputs),
        )


@dataclass(frozen=True, slots=True)
class LossValue:
    """What a loss is over one micro-batch."""

    total: torch.Tensor
    """Scalar, with a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """More figures, sums over the tokens: ``num_clipped`` where the loss clips, and of every loss with advantages
    ``behavior_kl`` and, given reference log-probabilities, ``reference_kl``."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss function and what it needs."""

    name: str
    """Its ``mint.v1.LossFunction`` in lower case."""
    compute: Callable[[LossInputs, Mapping[str, float]], LossValue]
    """Inputs and all parameters, to the value; raises :class:`WrongState` where a ratio overflows."""
    needs: tuple[str, ...] = ()
    """Fields of :class:`Datum` beyond tokens, targets and weights that every datum must bring."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Parameters by name and their default values."""

    def parameters(self, given: Mapping[str, float]) -> dict[str, float]:
        """Defaults overlaid with ``given``; :class:`InvalidArgument` names the first that is unknown or impossible."""
        known = dict(self.defaults)
        for name, value in given.items():
            where = f"loss_parameters[{name!r}]"
            if name not in known:
                raise InvalidArgument(
                    f"{where} is set, but {self.name} takes {', '.join(sorted(known)) or 'no parameters'}", field=where
                )
            if not 0 <= value <= _MAX_PARAMETER:  # false for NaN too
                raise InvalidArgument(f"{where} is {value}: must be a finite float32 of at least 0", field=where)
            if name == "sequence_level" and value not in (0, 1):
                raise InvalidArgument(
                    f"{where} is {value}: must be 0 (ratio of a token) or 1 (of a datum)", field=where
                )
            known[name] = value
        low, high = known.get("clip_low", 0.0), known.get("clip_high", math.inf)
        if low > high:
            blamed = "clip_low" if "clip_low" in given else "clip_high"
            raise InvalidArgument(
                f"loss_parameters has clip_low {low} above clip_high {high}: they are the bounds of the ratio, "
                "0.8 and 1.2 unless given",
                field=f"loss_parameters[{blamed!r}]",
            )
        return known

    def check_side_inputs(self, datum: Datum, parameters: Mapping[str, float]) -> None:
        """Raise :class:`InvalidArgument` naming a field that ``datum``, and so the whole step, does not bring."""
        needed = dict.fromkeys(self.needs, f"{self.name} needs one for each target")
        if parameters.get("kl_coefficient", 0.0) > 0:
            needed["reference_logprobs"] = (
                f"kl_coefficient {parameters['kl_coefficient']} needs one for each target; Forward with reference "
                "computes them"
            )
        for name, why in needed.items():
            if not len(getattr(datum, name)):
                raise InvalidArgument(f"data have no {name}: {why}", field=f"data.{name}")


def _cross_entropy(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
    """``-sum w log p``."""
    del parameters
    return LossValue(-(inputs.weights * inputs.logprobs).sum())


def _importance_sampling(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
    """``-sum w A r``; the gradient flows through r."""
    return LossValue(-(inputs.weights * _given(inputs.advantages) * _ratios(inputs, parameters)).sum())


def _ppo(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
    """``-sum w min(r A, clip(r) A)`` (Schulman et al. 2017, arXiv 1707.06347); the gradient flows through r.

    A token counts as clipped where the minimum is the clipped side: above ``clip_high`` with a positive advantage,
    below ``clip_low`` with a negative one. Such a token has no gradient.
    """
    ratios, advantages = _ratios(inputs, parameters), _given(inputs.advantages)
    unbounded, bounded = ratios * advantages, _clip(ratios, parameters) * advantages
    is_clipped = bounded < unbounded
    chosen = torch.where(is_clipped, bounded.detach(), unbounded)
    return LossValue(-(inputs.weights * chosen).sum(), {"num_clipped": float(is_clipped.sum())})


def _cispo(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
    """``-sum w stop_gradient(clip(r)) A log p`` (MiniMax 2025, CISPO, arXiv 2506.13585).

    The ratio is a weight, so a clipped token keeps its gradient, and every token's gradient flows through its own log p
    alone. ``sequence_level`` makes that weight the same for all tokens of a datum and changes nothing else.
    """
    ratios = _ratios(inputs, parameters).detach()
    bounded = _clip(ratios, parameters)
    total = -(inputs.weights * bounded * _given(inputs.advantages) * inputs.logprobs).sum()
    return LossValue(total, {"num_clipped": float((bounded != ratios).sum())})


def _dro(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
    """``-sum w (A log p - beta / 2 (log p - log q)^2)`` (Richemond et al. 2024, DRO, arXiv 2405.19107)."""
    pull = parameters["beta"] / 2 * _log_ratios(inputs).square()
    return LossValue(-(inputs.weights * (_given(inputs.advantages) * inputs.logprobs - pull)).sum())


def _policy_gradient(
    name: str, objective: Callable[[LossInputs, Mapping[str, float]], LossValue], **defaults: float
) -> Loss:
    """``objective`` with what all losses with advantages share: the KL penalty and the figures on divergence.

    The penalty is ``kl_coefficient sum w k3(p_ref / p)``, token by token whatever the level of the ratio.
    """

    def compute(inputs: LossInputs, parameters: Mapping[str, float]) -> LossValue:
        value = objective(inputs, parameters)
        total, metrics = value.total, dict(value.metrics)
        metrics["behavior_kl"] = _sum_k3(_log_ratios(inputs))
        if inputs.reference_logprobs is not None:
            to_reference = inputs.reference_logprobs - inputs.logprobs
            metrics["reference_kl"] = _sum_k3(to_reference)
            if parameters["kl_coefficient"] > 0:
                penalties = _k3(_checked(to_reference, "log p_ref - log p"))
                total = total + parameters["kl_coefficient"] * (inputs.weights * penalties).sum()
        return LossValue(total, metrics)

    return Loss(name, compute, ("behavior_logprobs", "advantages"), {**defaults, "kl_coefficient": 0.0})


def _given(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None  # check_side_inputs saw to it
    return values


def _log_ratios(inputs: LossInputs) -> torch.Tensor:
    return inputs.logprobs - _given(inputs.behavior_logprobs)


def _ratios(inputs: LossInputs, parameters: Mapping[str, float]) -> torch.Tensor:
    """r of every token, float32 ``[N]``."""
    log_ratios = _log_ratios(inputs)
    if parameters["sequence_level"]:
        _, index, num_tokens = torch.unique(inputs.datum_index, return_inverse=True, return_counts=True)
        sums = log_ratios.new_zeros(len(num_tokens)).index_add(0, index, log_ratios)
        log_ratios = (sums / num_tokens).index_select(0, index)
    return _checked(log_ratios, "log p - log q").exp()


def _clip(ratios: torch.Tensor, parameters: Mapping[str, float]) -> torch.Tensor:
    return ratios.clamp(parameters["clip_low"], parameters["clip_high"])


def _k3(log_ratios: torch.Tensor) -> torch.Tensor:
    """``x - log x - 1`` for x = exp(``log_ratios``), never negative.

    With tokens sampled from a, its mean for x = b / a is KL(a || b) (Schulman 2020, "Approximating KL divergence").
    """
    return log_ratios.expm1() - log_ratios


def _sum_k3(log_ratios: torch.Tensor) -> float:
    # A figure only: in float64 no gap between two policies that have anything to do with each other overflows.
    return float(_k3(log_ratios.detach().double()).sum())


def _checked(log_ratios: torch.Tensor, what: str) -> torch.Tensor:
    """``log_ratios``, all of which have an exponential."""
    # Clipping an infinite ratio would not help: its gradient is 0 * inf.
    if not bool(log_ratios.detach().exp().isfinite().all()):
        raise WrongState(
            f"{what} of a target is {float(log_ratios.detach().max()):g}, whose exponential is no finite float32; "
            "nothing was gathered; the log-probabilities sent do not belong to these targets, or the policy has "
            "diverged: check them, or load an earlier state"
        )
    return log_ratios


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", _cross_entropy),
        _policy_gradient("importance_sampling", _importance_sampling, sequence_level=0.0),
        _policy_gradient("ppo", _ppo, clip_low=0.8, clip_high=1.2, sequence_level=0.0),
        _policy_gradient("cispo", _cispo, clip_low=0.8, clip_high=1.2, sequence_level=0.0),
        _policy_gradient("dro", _dro, beta=0.05),
    )
}
"""Every loss by its name."""
