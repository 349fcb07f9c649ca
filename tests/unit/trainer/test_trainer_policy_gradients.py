"""The losses of reinforcement learning in a session: against plain torch and PEFT, however cut, and in trouble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unit.trainer.trainer_lab import OPTIMIZER, MakeData, NewSession, PlainPeft, assert_near, bits

from mint_core.errors import InvalidArgument, WrongState
from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import TrainingSession

CASES = [
    ("importance_sampling", {}),
    ("importance_sampling", {"sequence_level": 1.0}),
    ("ppo", {}),
    ("ppo", {"clip_low": 0.7, "clip_high": 1.1, "kl_coefficient": 0.3}),
    ("ppo", {"clip_low": 0.95, "clip_high": 1.05, "sequence_level": 1.0}),
    ("cispo", {}),
    ("cispo", {"clip_low": 0.0, "clip_high": 1.05, "sequence_level": 1.0, "kl_coefficient": 0.1}),
    ("dro", {}),
    ("dro", {"beta": 0.7, "kl_coefficient": 0.2}),
]
EVERY_CASE = pytest.mark.parametrize(("loss", "parameters"), CASES, ids=[f"{n}-{'-'.join(p)}" for n, p in CASES])
JUNK = -1e4
"""Where the weight is 0, anything may stand."""


def rolled_out(session: TrainingSession, data: list[Datum], seed: int) -> list[Datum]:
    """``data`` with advantages of both signs, and policies around the session's: ratios on both sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for datum, logprobs in zip(data, session.forward(data).logprobs, strict=True):
        ours, is_masked = torch.tensor(logprobs), torch.tensor(datum.weights) == 0
        behavior, reference = (ours + s * torch.randn(len(ours), generator=generator) for s in (0.3, 0.5))
        advantages = torch.randn(len(ours), generator=generator)
        side_inputs = {"behavior_logprobs": behavior, "reference_logprobs": reference, "advantages": advantages}
        results.append(replace(datum, **{k: v.masked_fill(is_masked, JUNK).tolist() for k, v in side_inputs.items()}))
    return results


class Reference:
    """The losses once more, datum by datum, as their papers write them; and the figures that belong to them."""

    def __init__(self, loss: str, parameters: dict[str, float]) -> None:
        self.loss = loss
        self.low, self.high = parameters.get("clip_low", 0.8), parameters.get("clip_high", 1.2)
        self.beta = parameters.get("beta", 0.05)
        self.is_sequence_level = parameters.get("sequence_level", 0.0) == 1.0
        self.kl_coefficient = parameters.get("kl_coefficient", 0.0)
        self.metrics = {"behavior_kl": 0.0, "reference_kl": 0.0}
        if loss in ("ppo", "cispo"):
            self.metrics["num_clipped"] = 0.0

    def __call__(self, logprobs: torch.Tensor, datum: Datum) -> torch.Tensor:
        keep = [i for i, weight in enumerate(datum.weights) if weight != 0]
        logp = logprobs[keep]
        w, logq, a, logref = (
            torch.tensor([values[i] for i in keep])
            for values in (datum.weights, datum.behavior_logprobs, datum.advantages, datum.reference_logprobs)
        )
        ratio = torch.exp(logp - logq)
        if self.is_sequence_level:
            ratio = torch.prod(ratio) ** (1 / len(keep)) * torch.ones(len(keep))
        clipped = torch.clamp(ratio, self.low, self.high)
        x = torch.exp(logref - logp)
        penalty = x - torch.log(x) - 1
        with torch.no_grad():
            if self.loss == "ppo":
                self.metrics["num_clipped"] += int(((ratio > self.high) & (a > 0) | (ratio < self.low) & (a < 0)).sum())
            if self.loss == "cispo":
                self.metrics["num_clipped"] += int(((ratio > self.high) | (ratio < self.low)).sum())
            token_ratio = torch.exp(logp - logq)
            self.metrics["behavior_kl"] += float((token_ratio - 1 - torch.log(token_ratio)).sum())
            self.metrics["reference_kl"] += float(penalty.sum())
        objective = {
            "importance_sampling": lambda: ratio * a,
            "ppo": lambda: torch.minimum(ratio * a, clipped * a),
            "cispo": lambda: clipped.detach() * a * logp,
            "dro": lambda: a * logp - self.beta / 2 * (logp - logq) ** 2,
        }[self.loss]()
        return -(w * (objective - self.kl_coefficient * penalty)).sum()


@EVERY_CASE
def test_value_gradients_and_updates_equal_plain_torch(
    base_folder: Path,
    new_session: NewSession,
    make_data: MakeData,
    recipe: AdapterRecipe,
    loss: str,
    parameters: dict[str, float],
) -> None:
    session = new_session(recipe)
    plain = PlainPeft(base_folder, session)
    for step in range(3):
        data = rolled_out(session, make_data(step, (5, 17, 9, 30)), seed=step)
        reference = Reference(loss, parameters)
        result = session.forward_backward(data, loss, parameters)
        assert result.loss_sum == pytest.approx(plain.backward(data, reference), rel=1e-4, abs=1e-5)
        assert result.metrics == pytest.approx(reference.metrics, rel=1e-4)
        assert 0 < reference.metrics.get("num_clipped", 1) < result.num_tokens
        for name, gradient in session.gradients.items():
            assert_near(gradient, plain.parameters[name].grad, 2e-5)
        stepped = session.optim_step(OPTIMIZER, 0.1)
        assert stepped.grad_norm == pytest.approx(plain.step(OPTIMIZER, 0.1), rel=1e-5)
        assert stepped.metrics == {}
        for name, parameter in session.adapter.parameters.items():
            assert_near(parameter, plain.parameters[name], 1e-4)  # Adam divides by what may be rounding noise
            with torch.no_grad():
                plain.parameters[name].copy_(parameter)  # so that the next gradient is taken at the same weights
    session.close()


@EVERY_CASE
def test_how_a_step_is_cut_does_not_change_it(
    base: ResidentBase,
    adapters: ResidentAdapters,
    make_data: MakeData,
    recipe: AdapterRecipe,
    loss: str,
    parameters: dict[str, float],
) -> None:
    results, gradients, data = [], [], []
    for micro_batch_tokens in (1, 60, 1000):
        session = TrainingSession(base, adapters, recipe, BatchLimits(base.vocab_size, 128, 2048, micro_batch_tokens))
        data = data or rolled_out(session, make_data(3, (9, 30, 4, 11, 25)), seed=3)
        results.append(session.forward_backward(data, loss, parameters))
        gradients.append(dict(session.gradients))
        session.close()
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        # Of a sum that cancels out, the loss of a token is what is exact to so many digits.
        assert result.loss_sum / result.num_tokens == pytest.approx(results[0].loss_sum / result.num_tokens, abs=1e-6)
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-6)
        assert_near(whole(gradient), whole(gradients[0]), 1e-6)


def whole(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_training_on_rewards_raises_what_was_rewarded(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    for loss in ("importance_sampling", "ppo", "cispo", "dro"):
        session = new_session(recipe)
        good, bad = make_data(1, (12, 12))
        before = session.forward([good, bad]).logprobs
        data = [
            replace(datum, behavior_logprobs=list(logprobs), advantages=[advantage] * 12)
            for datum, logprobs, advantage in zip((good, bad), before, (1.0, -1.0), strict=True)
        ]
        for _ in range(3):
            result = session.forward_backward(data, loss)
            session.optim_step(OPTIMIZER)
        assert result.metrics["behavior_kl"] > 0
        after = session.forward([good, bad]).logprobs
        assert sum(after[0][4:]) > sum(before[0][4:]), loss
        assert sum(after[1][4:]) < sum(before[1][4:]), loss
        session.close()


def test_reference_is_the_base_alone_bit_for_bit(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    untrained, session = new_session(recipe), new_session(recipe)  # a fresh B is zero
    session.forward_backward(make_data(1))
    session.optim_step(OPTIMIZER)
    data = make_data(2, (40, 3, 25))
    before = bits(session)
    of_base, of_policy = session.forward(data, reference=True), session.forward(data)
    assert of_base.logprobs == untrained.forward(data).logprobs == untrained.forward(data, reference=True).logprobs
    assert of_base.loss_sum == untrained.forward(data).loss_sum
    assert of_policy.logprobs != of_base.logprobs
    assert bits(session) == before
    untrained.close()
    session.close()


def test_step_of_zero_weights_changes_nothing_and_has_figures(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    session = new_session(recipe)
    data = [replace(d, weights=[0.0] * len(d.tokens)) for d in rolled_out(session, make_data(1), seed=1)]
    before = bits(session)
    result = session.forward_backward(data, "ppo", {"sequence_level": 1.0, "kl_coefficient": 0.1})
    assert (result.loss_sum, result.num_tokens) == (0.0, 0)
    assert result.metrics == {"num_clipped": 0.0, "behavior_kl": 0.0, "reference_kl": 0.0}
    assert session.optim_step(OPTIMIZER).step == 1
    assert bits(session) == before
    session.close()


def far_behavior(datum: Datum) -> Datum:
    return replace(datum, behavior_logprobs=[-300.0] * len(datum.tokens))


def absurd_behavior(datum: Datum) -> Datum:
    return replace(datum, behavior_logprobs=[-1e30] * len(datum.tokens))


def far_reference(datum: Datum) -> Datum:
    return replace(datum, reference_logprobs=[200.0] * len(datum.tokens))


def huge_advantages(datum: Datum) -> Datum:
    return replace(datum, advantages=[3e38] * len(datum.tokens))


@pytest.mark.parametrize(
    ("loss", "parameters", "change", "words"),
    [
        ("importance_sampling", {}, far_behavior, "log p - log q of a target is"),
        ("ppo", {}, far_behavior, "log p - log q of a target is"),
        ("ppo", {"sequence_level": 1.0}, far_behavior, "log p - log q of a target is"),
        ("cispo", {"kl_coefficient": 0.1}, far_reference, "log p_ref - log p of a target is"),
        ("dro", {}, absurd_behavior, "dro gave loss_sum inf.* diverged; nothing was gathered"),
        ("ppo", {}, huge_advantages, "diverged; nothing was gathered"),
        ("cispo", {}, huge_advantages, "diverged; nothing was gathered"),
    ],
)
def test_step_without_a_number_says_why_and_harms_nobody(
    new_session: NewSession,
    make_data: MakeData,
    recipe: AdapterRecipe,
    loss: str,
    parameters: dict[str, float],
    change: Callable[[Datum], Datum],
    words: str,
) -> None:
    recipe = replace(recipe, dropout=0.1)
    session, neighbour, undisturbed = (new_session(recipe) for _ in range(3))
    good = rolled_out(session, make_data(1, (9, 60, 60)), seed=1)
    for each in (session, neighbour, undisturbed):
        each.forward_backward(good, loss, parameters)
    before, before_neighbour = bits(session), bits(neighbour)
    with pytest.raises(WrongState, match=words):
        session.forward_backward([*good[:-1], change(good[-1])], loss, parameters)  # only the last micro-batch is bad
    assert bits(session) == before
    assert bits(neighbour) == before_neighbour
    assert session.num_gathered == 1
    for each in (session, undisturbed):
        each.forward_backward(good, loss, parameters)
        each.optim_step(OPTIMIZER)
    assert bits(session) == bits(undisturbed)
    for each in (session, neighbour, undisturbed):
        each.close()


@pytest.mark.parametrize(
    ("change", "parameters", "field"),
    [
        ({"advantages": ()}, {}, "data.advantages"),
        ({"behavior_logprobs": ()}, {}, "data.behavior_logprobs"),
        ({"reference_logprobs": ()}, {"kl_coefficient": 0.1}, "data.reference_logprobs"),
        ({"reference_logprobs": [0.0]}, {}, "data[0].reference_logprobs"),
        ({"reference_logprobs": [0.0, 0.0, float("inf")]}, {}, "data[0].reference_logprobs[2]"),
        ({}, {"clip_low": 2.0}, "loss_parameters['clip_low']"),
        ({}, {"beta": 0.1}, "loss_parameters['beta']"),
    ],
)
def test_bad_steps_are_refused_before_anything_is_computed(
    new_session: NewSession,
    recipe: AdapterRecipe,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, list[float]],
    parameters: dict[str, float],
    field: str,
) -> None:
    session = new_session(recipe)
    monkeypatch.delattr("mint_trainer.session.target_logprobs")
    side_inputs = {name: [-0.5] * 3 for name in ("behavior_logprobs", "advantages", "reference_logprobs")}
    datum = Datum([1, 2, 3], [2, 3, 4], [0.0, 1.0, 1.0], **side_inputs)
    with pytest.raises(InvalidArgument) as caught:
        session.forward_backward([replace(datum, **change)], "ppo", parameters)
    assert caught.value.field == field
    session.close()
