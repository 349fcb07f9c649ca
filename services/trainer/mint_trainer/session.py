"""One policy in training: adapter weights, gathered gradient, optimizer and random state on the resident base.

Everything here runs on the torch thread, one step at a time. A step either happens whole or changes nothing: weights,
moments, gathered gradient and random state are only replaced after all of it has been computed and found finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from mint_core.errors import InvalidArgument, Unimplemented, WrongState
from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum, check_data, micro_batches
from mint_trainer.logprobs import split_logprobs, target_logprobs
from mint_trainer.losses import LOSSES, LossInputs
from mint_trainer.optimizer import AdamW, AdamWConfig, gradient_norm
from mint_trainer.recipe import AdapterRecipe

__all__ = ["StepResult", "TrainingSession", "initial_rng_state"]

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one step; a step fills in what applies to it."""

    step: int
    """Optimizer steps done after this step."""
    loss_sum: float = 0.0
    """Sum of the loss over all tokens."""
    weight_sum: float = 0.0
    """Sum of the weights."""
    num_tokens: int = 0
    """Number of targets with a weight other than 0."""
    logprobs: tuple[Sequence[float], ...] = ()
    """Log-probabilities of the targets, for each datum."""
    grad_norm: float = 0.0
    """Norm of the gradient after scaling and before clipping (optim_step)."""
    compute_ms: float = 0.0
    """Time on the torch thread; 0 in a result that was read back with a saved state."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """More figures of the loss, sums over the tokens of non-zero weight: see :class:`LossValue`."""


class TrainingSession:
    """See the module. ``limits`` are checked before anything is computed."""

    def __init__(
        self, base: ResidentBase, adapters: ResidentAdapters, recipe: AdapterRecipe, limits: BatchLimits
    ) -> None:
        self.base = base
        self.recipe = recipe
        self.step = 0
        """Optimizer steps done."""
        self._adapters = adapters
        self._limits = limits
        self.adapter = adapters.add(recipe)
        self.optimizer = AdamW(self.adapter.parameters)
        self.gradients: dict[str, torch.Tensor] = {}
        """Gathered since the last optim_step, by parameter name."""
        self.num_gathered = 0
        """forward_backward calls gathered in ``gradients``."""
        self.rng_state = initial_rng_state(recipe)
        """State of the generator that dropout draws from, uint8."""

    def close(self) -> None:
        """Free the adapter; the session must not be used after."""
        self._adapters.remove(self.adapter)
        self.gradients = {}

    def forward(self, data: Sequence[Datum], *, reference: bool = False) -> StepResult:
        """Log-probabilities and cross-entropy, without gradients and without dropout.

        With ``reference`` the base computes alone, as if the adapter were not there.
        """
        check_data(data, self._limits)
        started = time.monotonic()
        loss_sum, logprobs = 0.0, []
        self._adapters.activate(None if reference else self.adapter)
        with torch.no_grad():
            for batch in micro_batches(data, self._batch_limits(with_dropout=False)):
                values = target_logprobs(self.base, batch, None)
                loss_sum -= float((batch.weights * values).sum())
                logprobs += split_logprobs(batch, values)
        return replace(self._counted(data, loss_sum, started), logprobs=tuple(logprobs))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        loss_parameters: Mapping[str, float] | None = None,
        *,
        return_logprobs: bool = True,
    ) -> StepResult:
        """Compute ``loss`` and add its gradient to the gathered one.

        Without ``return_logprobs`` the result has none, and those of targets of weight 0 are not computed.

        Raises :class:`InvalidArgument` for bad data or parameters, :class:`Unimplemented` for a loss that this build
        does not have, :class:`WrongState` when a ratio, the loss or the gradient is not finite.
        """
        spec = LOSSES.get(loss)
        if spec is None:
            raise Unimplemented(f"loss is {loss!r}: this trainer computes {', '.join(sorted(LOSSES))}")
        parameters = spec.parameters(loss_parameters or {})
        check_data(data, self._limits)
        spec.check_side_inputs(data[0], parameters)
        started = time.monotonic()
        loss_sum, logprobs, metrics = 0.0, [], dict[str, float]()
        self._adapters.activate(self.adapter)
        with self._clean_gradients(), self._own_randomness():
            for batch in micro_batches(data, self._batch_limits(with_dropout=self.recipe.dropout > 0)):
                graded = batch.weights != 0
                values = target_logprobs(self.base, batch, graded, not return_logprobs)
                if return_logprobs:
                    logprobs += split_logprobs(batch, values)
                value = spec.compute(LossInputs.of(batch, values), parameters)
                loss_sum += float(value.total.detach())
                for name, figure in value.metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + figure
                if bool(graded.any()):
                    value.total.backward()
            fresh = {name: p.grad for name, p in self.adapter.parameters.items() if p.grad is not None}
            norm = gradient_norm(list(fresh.values()))
            figures = {"loss_sum": loss_sum, "gradient norm": norm, **metrics}
            if not all(math.isfinite(figure) for figure in figures.values()):
                raise WrongState(
                    f"{loss} gave {', '.join(f'{name} {figure:g}' for name, figure in figures.items())}: the weights "
                    "or the inputs have diverged; nothing was gathered; load an earlier state or lower the learning "
                    "rate"
                )
            rng_state = torch.get_rng_state() if self.recipe.dropout else self.rng_state
        # From here on nothing can fail.
        for name, gradient in fresh.items():
            gathered = self.gradients.get(name)
            self.gradients[name] = gradient if gathered is None else gathered.add_(gradient)
        self.num_gathered += 1
        self.rng_state = rng_state
        return replace(self._counted(data, loss_sum, started), logprobs=tuple(logprobs), metrics=metrics)

    def optim_step(self, config: AdamWConfig, gradient_scale: float = 1.0) -> StepResult:
        """Multiply the gathered gradient by ``gradient_scale``, clip it, apply it and clear it.

        Raises :class:`WrongState` when nothing was gathered, or when the gradient is not finite; it stays gathered.
        """
        if not (math.isfinite(gradient_scale) and gradient_scale > 0):
            raise InvalidArgument(
                f"gradient_scale is {gradient_scale}: must be a positive finite number", field="gradient_scale"
            )
        if self.num_gathered == 0:
            raise WrongState("no gradient was gathered since the last optim_step: call forward_backward first")
        started = time.monotonic()
        norm = gradient_norm(list(self.gradients.values())) * gradient_scale
        if not math.isfinite(norm):
            raise WrongState(
                f"the gathered gradient's norm times gradient_scale {gradient_scale} is {norm}: nothing was applied; "
                "load an earlier state"
            )
        factor = gradient_scale
        if config.max_grad_norm > 0:
            factor *= min(1.0, config.max_grad_norm / (norm + _CLIP_EPS))
        scaled = {name: gradient.mul(factor) for name, gradient in self.gradients.items()}
        self.optimizer.update(scaled, config)
        self.drop_gradients()
        self.step += 1
        return StepResult(step=self.step, grad_norm=norm, compute_ms=_ms_since(started))

    def drop_gradients(self) -> None:
        """Forget what was gathered."""
        self.gradients = {}
        self.num_gathered = 0

    def reset_optimizer(self) -> None:
        """Fresh moments, step 0, initial random state; the weights stay."""
        self.optimizer = AdamW(self.adapter.parameters)
        self.drop_gradients()
        self.rng_state = initial_rng_state(self.recipe)
        self.step = 0

    def _counted(self, data: Sequence[Datum], loss_sum: float, started: float) -> StepResult:
        weights = [weight for datum in data for weight in datum.weights]
        return StepResult(
            step=self.step,
            loss_sum=loss_sum,
            weight_sum=math.fsum(weights),
            num_tokens=sum(1 for weight in weights if weight != 0),
            compute_ms=_ms_since(started),
        )

    def _batch_limits(self, *, with_dropout: bool) -> BatchLimits:
        # In a shared row one dropout mask would be drawn for several data.
        is_able = self.base.shares_prefixes and not with_dropout
        return self._limits if is_able else replace(self._limits, share_prefixes=False)

    @contextmanager
    def _clean_gradients(self) -> Iterator[None]:
        # autograd adds into .grad; it is empty outside this block, so a failure inside leaves nothing to undo.
        try:
            yield
        finally:
            for parameter in self.adapter.parameters.values():
                parameter.grad = None

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        if self.recipe.dropout == 0:
            yield
            return
        with torch.random.fork_rng(devices=[]), self.adapter.dropout_on():
            torch.set_rng_state(self.rng_state)
            yield


def initial_rng_state(recipe: AdapterRecipe) -> torch.Tensor:
    """State of a generator seeded by the recipe, as a fresh session has it."""
    return torch.Generator().manual_seed(recipe.init_seed).get_state()


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1000.0
