"""What tests of training share: a plain reference to compare with, and a session's state as bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mint_trainer.base  # noqa: F401  # before PEFT

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mint_trainer.batch import Datum
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import StepResult, TrainingSession

OPTIMIZER = AdamWConfig(learning_rate=3e-2, beta2=0.95, weight_decay=0.1, max_grad_norm=0.5)

NewSession = Callable[[AdapterRecipe], TrainingSession]
MakeData = Callable[..., list[Datum]]


class PlainPeft:
    """The same training written the usual way: whole logits, autograd, torch.optim, one datum at a time."""

    def __init__(self, folder: Path, session: TrainingSession) -> None:
        recipe = session.recipe
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.target_modules),
            use_rslora=recipe.use_rslora,
        )
        self.model = get_peft_model(base, config)
        named = {name.replace(".default", ""): p for name, p in self.model.named_parameters() if p.requires_grad}
        assert sorted(named) == sorted(session.adapter.parameters)
        with torch.no_grad():
            for name, parameter in session.adapter.parameters.items():
                named[name].copy_(parameter)
        self.parameters = named
        self.optimizer = torch.optim.AdamW(named.values(), lr=1.0)

    def logprobs(self, datum: Datum) -> torch.Tensor:
        logits = self.model(torch.tensor([list(datum.tokens)])).logits[0]
        return logits.log_softmax(-1)[torch.arange(len(datum.tokens)), torch.tensor(list(datum.targets))]

    def backward(self, data: list[Datum], loss: Callable[[torch.Tensor, Datum], torch.Tensor]) -> float:
        """Gather the gradient of the sum of ``loss(log-probabilities, datum)`` over ``data``."""
        total = torch.stack([loss(self.logprobs(datum), datum) for datum in data]).sum()
        total.backward()
        return float(total.detach())

    def step(self, config: AdamWConfig, gradient_scale: float) -> float:
        for parameter in self.parameters.values():
            parameter.grad.mul_(gradient_scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.optimizer.param_groups[0].update(
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.detach())


def train(session: TrainingSession, make_data: MakeData, seed: int, num_steps: int) -> list[StepResult]:
    results = []
    for step in range(num_steps):
        results.append(session.forward_backward(make_data(100 * seed + step)))
        results.append(session.optim_step(OPTIMIZER, 0.25))
    return results


def bits(session: TrainingSession) -> dict[str, bytes]:
    tensors = {
        **session.adapter.parameters,
        **{f"m/{name}": t for name, t in session.optimizer.exp_avg.items()},
        **{f"v/{name}": t for name, t in session.optimizer.exp_avg_sq.items()},
        **{f"n/{name}": t for name, t in session.optimizer.num_updates.items()},
        **{f"g/{name}": t for name, t in session.gradients.items()},
        "rng": session.rng_state,
    }
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items()}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Sums in another order differ by rounding, which is small against the whole tensor, not against each entry."""
    difference = float((actual - expected).detach().norm())
    assert difference <= relative * float(expected.detach().norm()), (difference, float(expected.detach().norm()))


def outcome(result: StepResult) -> tuple[object, ...]:
    return (result.step, result.loss_sum, result.weight_sum, result.num_tokens, result.logprobs, result.grad_norm)
