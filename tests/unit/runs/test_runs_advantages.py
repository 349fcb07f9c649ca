"""Advantages, weights and data against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mint_api.v1 import common_pb2, run_service_pb2
from mint_core.errors import InvalidArgument
from mint_runs.advantages import group_advantages, is_informative, token_weights
from mint_runs.grpo_plan import DEFAULT_LEARNING_RATE, GrpoPlan
from mint_runs.rollouts.batch import RolloutBatch, RolloutGroup, RolloutSample
from mint_runs.updates import UpdateData, pieces, update_data

STANDARDIZED = run_service_pb2.GROUP_ADVANTAGE_STANDARDIZED
CENTERED = run_service_pb2.GROUP_ADVANTAGE_CENTERED
TOKEN_MEAN = run_service_pb2.TOKEN_WEIGHTING_TOKEN_MEAN
SEQUENCE_MEAN = run_service_pb2.TOKEN_WEIGHTING_SEQUENCE_MEAN
FIXED_LENGTH = run_service_pb2.TOKEN_WEIGHTING_FIXED_LENGTH


@pytest.mark.parametrize(
    ("rewards", "centered", "standardized"),
    [
        # mean 1/2, deviation 1/2
        ([1.0, 0.0], [0.5, -0.5], [0.5 / 0.5001, -0.5 / 0.5001]),
        # mean 1, deviation sqrt(2/3)
        ([0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-1.0 / (0.81649658 + 1e-4), 0.0, 1.0 / (0.81649658 + 1e-4)]),
        # the unscored one counts nowhere: mean 3, deviation 1
        ([2.0, None, 4.0], [-1.0, None, 1.0], [-1 / 1.0001, None, 1 / 1.0001]),
        ([3.0, 3.0], [0.0, 0.0], [0.0, 0.0]),
        ([3.0, None], [0.0, None], [0.0, None]),
        ([None, None], [None, None], [None, None]),
        ([], [], []),
    ],
)
def test_advantages_of_a_group(
    rewards: list[float | None], centered: list[float | None], standardized: list[float | None]
) -> None:
    for advantage, expected in ((CENTERED, centered), (STANDARDIZED, standardized)):
        values = group_advantages(rewards, advantage)
        assert [value is None for value in values] == [value is None for value in expected]
        assert [v for v in values if v is not None] == pytest.approx([e for e in expected if e is not None])


@pytest.mark.parametrize(
    ("rewards", "informative"),
    [([1.0, 0.0], True), ([0.1, 0.1, 0.1], False), ([1.0, None], False), ([1.0, None, 0.5], True), ([], False)],
)
def test_what_a_group_tells(rewards: list[float | None], informative: bool) -> None:
    assert is_informative(rewards) is informative


def test_token_weights() -> None:
    assert token_weights([1, 3], TOKEN_MEAN, max_new_tokens=10) == pytest.approx([1 / 4, 1 / 4])
    assert token_weights([1, 3], SEQUENCE_MEAN, max_new_tokens=10) == pytest.approx([1 / 2, 1 / 6])
    assert token_weights([1, 3], FIXED_LENGTH, max_new_tokens=10) == pytest.approx([1 / 20, 1 / 20])


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="advantage is 9"):
        group_advantages([1.0, 0.0], 9)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="weighting is 9"):
        token_weights([1], 9, max_new_tokens=1)  # type: ignore[arg-type]


def sample(reward: float | None, *token_ids: int, routed: bool = False) -> RolloutSample:
    experts = np.arange(len(token_ids) + 1, dtype=np.int32).reshape(-1, 1, 1) if routed else None
    return RolloutSample(token_ids, tuple(-float(t) for t in token_ids), "stop", "", reward, "", experts)


def update(*groups: RolloutGroup, keep_uninformative: bool = False, replay: bool = False) -> UpdateData:
    batch = RolloutBatch("r", 1, "v", "d", common_pb2.Numerics(), 1.0, groups)
    return update_data(
        batch,
        advantage=CENTERED,
        weighting=SEQUENCE_MEAN,
        max_new_tokens=8,
        keep_uninformative=keep_uninformative,
        replay_routed_experts=replay,
    )


TEACHES = RolloutGroup(1, (50, 51), (sample(1.0, 1, 2, routed=True), sample(0.0, 3), sample(None, 4), sample(0.5)))
EQUAL = RolloutGroup(2, (60,), (sample(1.0, 5), sample(1.0, 6)))
LONELY = RolloutGroup(3, (70,), (sample(None, 7), sample(1.0, 8)))


def test_only_what_teaches_is_in_the_data() -> None:
    done = update(TEACHES, EQUAL, LONELY)
    assert (done.num_used_samples, done.num_uninformative_groups) == (2, 2)
    first, second = done.data
    assert list(first.tokens) == [50, 51, 1]
    assert list(first.targets) == [51, 1, 2]
    assert list(first.weights) == pytest.approx([0.0, 1 / 4, 1 / 4])
    assert list(first.behavior_logprobs) == [0.0, -1.0, -2.0]
    assert list(first.advantages) == pytest.approx([0.0, 0.5, 0.5])
    assert first.routed_experts == b""
    assert (list(second.tokens), list(second.targets)) == ([50, 51], [51, 3])
    assert list(second.weights) == pytest.approx([0.0, 1 / 2])
    assert list(second.advantages) == pytest.approx([0.0, -0.5])


def test_recorded_experts_go_to_the_trainer_where_they_are_replayed() -> None:
    first, second = update(TEACHES, replay=True).data
    assert first.routed_experts == np.array([0, 1, 2], "<i4").tobytes()
    assert second.routed_experts == b""


def test_a_penalty_keeps_what_else_teaches_nothing() -> None:
    done = update(EQUAL, LONELY, keep_uninformative=True)
    assert (done.num_used_samples, done.num_uninformative_groups) == (3, 2)
    assert [list(datum.advantages) for datum in done.data] == [[0.0], [0.0], [0.0]]
    assert [list(datum.targets) for datum in done.data] == [[5], [6], [8]]


def test_a_step_without_samples_has_one_datum_of_weight_0() -> None:
    done = update(EQUAL, LONELY)
    assert done.num_used_samples == 0
    (idle,) = done.data
    assert (list(idle.tokens), list(idle.targets), list(idle.weights)) == ([60], [60], [0.0])
    assert (list(idle.behavior_logprobs), list(idle.advantages)) == ([0.0], [0.0])


def test_pieces_keep_the_order_and_stay_small() -> None:
    long = RolloutGroup(1, (1,), tuple(sample(float(place % 2), *[9] * 40_000) for place in range(3)))
    data = update(long).data
    assert [len(piece) for piece in pieces(data)] == [1, 1, 1]
    assert [datum for piece in pieces(data) for datum in piece] == list(data)
    assert [len(piece) for piece in pieces(update(TEACHES).data)] == [2]


def recipe(**values: object) -> run_service_pb2.GrpoRecipe:
    needed = {"num_steps": 4, "num_prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "scorer": "exact_match"}
    return run_service_pb2.GrpoRecipe(**(needed | values))  # type: ignore[arg-type]


def test_defaults_of_the_plan() -> None:
    plan = GrpoPlan.of(recipe())
    assert (plan.temperature, plan.scorer_timeout_s, plan.rollout_ttl_s) == (1.0, 10.0, 604_800)
    assert plan.loss == common_pb2.LOSS_FUNCTION_PPO
    assert plan.loss_parameters == {"clip_low": 0.8, "clip_high": 1.2}
    assert (plan.advantage, plan.weighting) == (STANDARDIZED, TOKEN_MEAN)
    assert plan.optimizer.learning_rate == DEFAULT_LEARNING_RATE
    assert [plan.is_promoted(step) for step in range(5)] == [False, False, False, False, True]
    often = GrpoPlan.of(recipe(promote_every_steps=3))
    assert [often.is_promoted(step) for step in range(5)] == [False, False, False, True, True]


def test_parameters_of_the_losses() -> None:
    asymmetric = GrpoPlan.of(recipe(clip_epsilon=0.1, clip_epsilon_high=0.3, sequence_level_ratio=True))
    assert asymmetric.loss_parameters == pytest.approx({"clip_low": 0.9, "clip_high": 1.3, "sequence_level": 1.0})
    dro = GrpoPlan.of(recipe(loss=common_pb2.LOSS_FUNCTION_DRO, kl_coefficient=0.5))
    assert dro.loss_parameters == {"kl_coefficient": 0.5}


def test_the_learning_rate_warms_up_and_stays() -> None:
    optimizer = run_service_pb2.OptimizerConfig(learning_rate=1.0, num_warmup_steps=3)
    plan = GrpoPlan.of(recipe(optimizer=optimizer))
    assert [plan.learning_rate(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_steps": 0}, "grpo.num_steps is 0: expected at least 1"),
        ({"num_prompts_per_step": -1}, "grpo.num_prompts_per_step is -1"),
        ({"group_size": 1}, "grpo.group_size is 1: expected at least 2"),
        ({"max_new_tokens": 0}, "grpo.max_new_tokens is 0"),
        ({"temperature": -0.5}, "grpo.temperature is -0.5"),
        ({"temperature": float("nan")}, "grpo.temperature is nan"),
        ({"kl_coefficient": float("inf")}, "grpo.kl_coefficient is inf"),
        ({"clip_epsilon": 1.0}, "grpo.clip_epsilon is 1.0: expected less than 1"),
        ({"max_staleness": 2}, "grpo.max_staleness is 2: expected 0 or 1"),
        ({"rollout_ttl_s": -1}, "grpo.rollout_ttl_s is -1"),
        ({"loss": common_pb2.LOSS_FUNCTION_CROSS_ENTROPY}, "grpo.loss is CROSS_ENTROPY: expected one of PPO"),
        ({"loss": common_pb2.LOSS_FUNCTION_DRO, "clip_epsilon": 0.1}, "0, since DRO clips nothing"),
        ({"loss": common_pb2.LOSS_FUNCTION_DRO, "sequence_level_ratio": True}, "false, since DRO has no ratio"),
    ],
)
def test_bad_fields_are_named(values: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        GrpoPlan.of(recipe(**values))
    assert problem in caught.value.message
    assert caught.value.field.startswith("grpo.")
