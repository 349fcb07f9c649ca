"""Every loss by hand: small cases whose numbers are written out, and what is no good parameter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mint_core.errors import InvalidArgument, WrongState
from mint_trainer.batch import Datum
from mint_trainer.losses import LOSSES, LossInputs, LossValue

RATIO_LOSSES = ("cispo", "importance_sampling", "ppo")
POLICY_GRADIENTS = ("cispo", "dro", "importance_sampling", "ppo")


def inputs(
    p: list[float],
    q: list[float],
    advantages: list[float],
    weights: list[float],
    *,
    datum_index: list[int] | None = None,
    p_ref: list[float] | None = None,
) -> LossInputs:
    return LossInputs(
        logprobs=torch.tensor(p).log().requires_grad_(True),
        weights=torch.tensor(weights),
        datum_index=torch.tensor(datum_index or [0] * len(p)),
        behavior_logprobs=torch.tensor(q).log(),
        advantages=torch.tensor(advantages),
        reference_logprobs=None if p_ref is None else torch.tensor(p_ref).log(),
    )


def compute(loss: str, given: LossInputs, **parameters: float) -> tuple[LossValue, list[float]]:
    """The value, and its gradient by the log-probabilities."""
    value = LOSSES[loss].compute(given, LOSSES[loss].parameters(parameters))
    (gradient,) = torch.autograd.grad(value.total, given.logprobs)
    return replace(value, total=value.total.detach()), gradient.tolist()


def by_token() -> LossInputs:
    """Ratios 1.5, 1.5, 0.5, 0.5, 1 and 1.1: both sides of the bounds under both signs, and two inside."""
    return inputs(
        p=[0.75, 0.75, 0.25, 0.25, 0.5, 0.55],
        q=[0.5] * 6,
        advantages=[2.0, -2.0, 2.0, -2.0, 1.0, -1.0],
        weights=[1.0, 1.0, 1.0, 1.0, 0.5, 2.0],
    )


@pytest.mark.parametrize(
    ("loss", "parameters", "total", "gradient", "num_clipped"),
    [
        # 3 - 3 + 1 - 1 + 0.5 - 2.2 = -1.7
        ("importance_sampling", {}, 1.7, [-3.0, 3.0, -1.0, 1.0, -0.5, 2.2], None),
        # 2.4 (clipped) - 3 + 1 - 1.6 (clipped) + 0.5 - 2.2 = -2.9
        ("ppo", {}, 2.9, [0.0, 3.0, -1.0, 0.0, -0.5, 2.2], 2),
        # The first is inside, the fourth still clipped: 3 - 3 + 1 - 1.6 + 0.5 - 2.2 = -2.3
        ("ppo", {"clip_high": 1.75}, 2.3, [-3.0, 3.0, -1.0, 0.0, -0.5, 2.2], 1),
        # Also 1.1 is above now, but with a negative advantage that is the minimum: 2.1 - 3 + 1 - 1 + 0.5 - 2.2 = -2.6
        ("ppo", {"clip_low": 0.25, "clip_high": 1.05}, 2.6, [0.0, 3.0, -1.0, 1.0, -0.5, 2.2], 1),
        # 2.4 ln 0.75 - 2.4 ln 0.75 + 1.6 ln 0.25 - 1.6 ln 0.25 + 0.5 ln 0.5 - 2.2 ln 0.55 = -0.3465736 + 1.3152414
        ("cispo", {}, -0.9686678, [-2.4, 2.4, -1.6, 1.6, -0.5, 2.2], 4),
        # 0.5 ln 0.5 - 2 ln 0.55 = 0.8491004, less 0.25 (2 ln² 1.5 + 2 ln² 0.5 + 2 ln² 1.1) = 0.3269695
        ("dro", {"beta": 0.5}, -0.5221309, [-1.7972674, 2.2027326, -2.3465736, 1.6534264, -0.5, 2.0953102], None),
    ],
)
def test_token_level(
    loss: str, parameters: dict[str, float], total: float, gradient: list[float], num_clipped: int | None
) -> None:
    value, found = compute(loss, by_token(), **parameters)
    assert float(value.total) == pytest.approx(total, abs=1e-6)
    assert found == pytest.approx(gradient, abs=1e-6)
    # 2 (0.5 - ln 1.5) + 2 (ln 2 - 0.5) + 0 + (0.1 - ln 1.1), whatever the weights
    figures = {"behavior_kl": pytest.approx(0.5800540, abs=1e-6)}
    assert value.metrics == (figures if num_clipped is None else figures | {"num_clipped": num_clipped})


def by_datum() -> LossInputs:
    """Ratios 4, 1 and 1/4, 1, 1/2: geometric means 2 and 1/2. A datum between them has no token of non-zero weight."""
    return inputs(
        p=[0.8, 0.5, 0.2, 0.5, 0.3],
        q=[0.2, 0.5, 0.8, 0.5, 0.6],
        advantages=[1.0, -2.0, 1.0, -1.0, 2.0],
        weights=[1.0, 0.25, 1.0, 1.0, 0.5],
        datum_index=[0, 0, 2, 2, 2],
    )


@pytest.mark.parametrize(
    ("loss", "total", "gradient", "num_clipped"),
    [
        # 2 (1 - 0.5) + 1/2 (1 - 1 + 1) = 1.5; a token's gradient is its datum's sum over the number of its tokens
        ("importance_sampling", -1.5, [-0.5, -0.5, -1 / 6, -1 / 6, -1 / 6], None),
        # 1.2 (clipped) - 1 and 0.5 - 0.8 (clipped) + 0.5; only what is not clipped moves the ratios
        ("ppo", -0.4, [0.5, 0.5, -1 / 3, -1 / 3, -1 / 3], 2),
        # 1.2 (ln 0.8 - 0.5 ln 0.5) + 0.8 (ln 0.2 - ln 0.5 + ln 0.3) = -1.5480948; every token by its own log p
        ("cispo", 1.5480948, [-1.2, 0.6, -0.8, 0.8, -0.8], 5),
    ],
)
def test_sequence_level(loss: str, total: float, gradient: list[float], num_clipped: int | None) -> None:
    value, found = compute(loss, by_datum(), sequence_level=1.0)
    assert float(value.total) == pytest.approx(total, abs=1e-6)
    assert found == pytest.approx(gradient, abs=1e-6)
    assert value.metrics.get("num_clipped") == num_clipped
    # By token even so: (3 - ln 4) + 0 + (ln 4 - 0.75) + 0 + (ln 2 - 0.5)
    assert value.metrics["behavior_kl"] == pytest.approx(1.75 + math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", RATIO_LOSSES)
def test_sequence_of_one_token_is_the_token(loss: str) -> None:
    alone = by_token()
    by_sequence = LossInputs(alone.logprobs, alone.weights, torch.arange(6), alone.behavior_logprobs, alone.advantages)
    token, sequence = compute(loss, alone), compute(loss, by_sequence, sequence_level=1.0)
    assert float(sequence[0].total) == pytest.approx(float(token[0].total), abs=1e-6)
    assert sequence[1] == pytest.approx(token[1], abs=1e-6)
    assert sequence[0].metrics == token[0].metrics


@pytest.mark.parametrize("loss", POLICY_GRADIENTS)
@pytest.mark.parametrize("sequence_level", [0.0, 1.0])
def test_kl_penalty_is_the_same_for_all(loss: str, sequence_level: float) -> None:
    given = {"advantages": [0.0, 0.0], "weights": [2.0, 0.5]}
    probabilities = {"p": [0.5, 0.25], "q": [0.5, 0.25], "p_ref": [0.25, 0.5]}
    parameters = {"sequence_level": sequence_level} if loss in RATIO_LOSSES else {}
    # x = 1/2 and 2: 0.1 (2 (0.5 + ln 2 - 1) + 0.5 (2 - ln 2 - 1)); gradient 0.1 w (1 - x)
    value, gradient = compute(loss, inputs(**probabilities, **given), kl_coefficient=0.1, **parameters)
    assert float(value.total) == pytest.approx(0.0539721, abs=1e-6)
    assert gradient == pytest.approx([0.1, -0.05], abs=1e-6)
    assert value.metrics["reference_kl"] == pytest.approx(0.5, abs=1e-6)
    assert value.metrics["behavior_kl"] == 0.0
    free, gradient = compute(loss, inputs(**probabilities, **given), **parameters)
    assert float(free.total) == 0.0
    assert gradient == [0.0, 0.0]
    assert free.metrics == value.metrics


def test_on_policy_all_ratios_are_one() -> None:
    given = {"p": [0.3, 0.9], "q": [0.3, 0.9], "advantages": [1.0, -3.0], "weights": [1.0, 0.5]}
    for loss in POLICY_GRADIENTS:
        value, gradient = compute(loss, inputs(**given))
        assert gradient == pytest.approx([-1.0, 1.5]), loss  # REINFORCE
        assert value.metrics.get("num_clipped", 0.0) == value.metrics["behavior_kl"] == 0.0


def test_no_tokens_are_no_loss() -> None:
    for loss in POLICY_GRADIENTS:
        parameters = {"sequence_level": 1.0} if loss in RATIO_LOSSES else {}
        none = inputs([], [], [], [], p_ref=[])
        value, gradient = compute(loss, none, kl_coefficient=1.0, **parameters)
        assert float(value.total) == 0.0
        assert gradient == []
        assert set(value.metrics.values()) == {0.0}


@pytest.mark.parametrize("loss", RATIO_LOSSES)
@pytest.mark.parametrize("sequence_level", [0.0, 1.0])
def test_ratio_without_a_number_is_refused(loss: str, sequence_level: float) -> None:
    given = inputs([0.5, 0.5], [0.5, 0.5], [1.0, 1.0], [1.0, 1.0], datum_index=[0, 1])
    far = LossInputs(given.logprobs, given.weights, given.datum_index, torch.tensor([-100.0, -0.7]), given.advantages)
    with pytest.raises(WrongState, match=r"log p - log q of a target is 99\.3069"):
        compute(loss, far, sequence_level=sequence_level)


def test_penalty_without_a_number_is_refused() -> None:
    given = inputs([1e-44], [1e-44], [1.0], [1.0], p_ref=[1.0])
    with pytest.raises(WrongState, match=r"log p_ref - log p of a target is 101\."):
        compute("dro", given, kl_coefficient=0.1)
    assert compute("dro", given)[0].metrics["reference_kl"] > 1e43


@pytest.mark.parametrize(
    ("loss", "parameters", "field", "words"),
    [
        ("cross_entropy", {"clip_low": 0.8}, "clip_low", "cross_entropy takes no parameters"),
        ("importance_sampling", {"clip_low": 0.8}, "clip_low", "takes kl_coefficient, sequence_level"),
        ("dro", {"sequence_level": 1.0}, "sequence_level", "takes beta, kl_coefficient"),
        ("ppo", {"clip_high": -0.1}, "clip_high", "is -0.1: must be a finite float32 of at least 0"),
        ("ppo", {"clip_high": math.inf}, "clip_high", "is inf"),
        ("ppo", {"clip_high": 1e39}, "clip_high", "must be a finite float32"),
        ("cispo", {"clip_low": math.nan}, "clip_low", "is nan"),
        ("dro", {"beta": -1.0}, "beta", "is -1.0"),
        ("ppo", {"kl_coefficient": -0.01}, "kl_coefficient", "is -0.01"),
        ("ppo", {"sequence_level": 0.5}, "sequence_level", r"is 0.5: must be 0 .* or 1"),
        ("ppo", {"clip_low": 1.3}, "clip_low", r"clip_low 1.3 above clip_high 1.2"),
        ("cispo", {"clip_high": 0.7}, "clip_high", r"clip_low 0.8 above clip_high 0.7"),
    ],
)
def test_bad_parameters_are_refused_by_name(loss: str, parameters: dict[str, float], field: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        LOSSES[loss].parameters(parameters)
    assert caught.value.field == f"loss_parameters[{field!r}]"


def test_missing_side_inputs_are_refused_by_name() -> None:
    side_inputs = {"behavior_logprobs": [-1.0], "advantages": [1.0], "reference_logprobs": [-1.0]}
    for loss in POLICY_GRADIENTS:
        for missing in side_inputs:
            datum = Datum([1], [2], [1.0], **{name: v for name, v in side_inputs.items() if name != missing})
            with pytest.raises(InvalidArgument, match=f"data have no {missing}") as caught:
                LOSSES[loss].check_side_inputs(datum, {"kl_coefficient": 0.1})
            assert caught.value.field == f"data.{missing}"
        LOSSES[loss].check_side_inputs(Datum([1], [2], [1.0], [-1.0], [1.0]), {"kl_coefficient": 0.0})
    LOSSES["cross_entropy"].check_side_inputs(Datum([1], [2], [1.0]), {})
