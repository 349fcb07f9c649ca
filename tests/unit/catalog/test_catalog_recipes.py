from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, Lab, digest_of

from mint_api.v1 import run_service_pb2
from mint_catalog.model.codec import check_enums
from mint_catalog.model.records import BlobRef
from mint_catalog.model.run_records import (
    DpoRecipe,
    EvaluationRecipe,
    GroupAdvantage,
    GrpoRecipe,
    LossFunction,
    OptimizerConfig,
    SftRecipe,
    TokenWeighting,
)
from mint_core.errors import InvalidArgument, NotFound
from mint_core.names import RunName

DATA = BlobRef(digest_of("{}"))
SFT = SftRecipe(DATA, num_steps=1)
GRPO = GrpoRecipe(DATA, "exact_match", num_steps=5, num_prompts_per_step=4, group_size=8, max_new_tokens=64)
EVALUATION = EvaluationRecipe(f"{POLICY}/revisions/1", DATA, "exact_match")
NAN, INFINITY = float("nan"), float("inf")


async def _lab() -> Lab:
    """A policy with one revision."""
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    return lab


async def _refused(field: str, **changes: Any) -> None:
    lab = await _lab()
    with pytest.raises(InvalidArgument) as caught:
        await lab.run(**changes)
    assert caught.value.field == field
    with pytest.raises(NotFound):
        await lab.runs.get(RunName("acme", "r1"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sft": None}, "run.recipe"),
        ({"dpo": DpoRecipe(DATA, 1)}, "run.recipe"),
        ({"dpo": DpoRecipe(DATA, 5, beta=-1), "sft": None}, "run.dpo.beta"),
        ({"promote_alias": "live"}, "run.promote_alias"),
        ({"promote_alias": "Not An Id", "publish": True}, "run.promote_alias"),
        ({"priority": 2**31 - 1}, "run.priority"),
        ({"policy": "tenants/other/policies/tone"}, "run.policy"),
        ({"policy": "tone"}, "run.policy"),
        ({"sft": None, "grpo": GRPO}, "run.publish"),
        ({"sft": None, "evaluation": EVALUATION, "publish": True}, "run.publish"),
    ],
)
async def test_a_bad_run_is_refused(changes: dict[str, Any], field: str) -> None:
    await _refused(field, **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": -1}, "num_steps"),
        ({"batch_size": -1}, "batch_size"),
        ({"train_data": None}, "train_data"),
        ({"train_data": BlobRef("x")}, "train_data.digest"),
        ({"optimizer": OptimizerConfig(learning_rate=-1.0)}, "optimizer.learning_rate"),
        ({"optimizer": OptimizerConfig(learning_rate=INFINITY)}, "optimizer.learning_rate"),
        ({"optimizer": OptimizerConfig(beta1=1.0)}, "optimizer.beta1"),
    ],
)
async def test_a_bad_sft_recipe_is_refused(changes: dict[str, Any], field: str) -> None:
    await _refused(f"run.sft.{field}", sft=replace(SFT, **changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_prompts_per_step": 0}, "num_prompts_per_step"),
        ({"group_size": 1}, "group_size"),
        ({"num_prompts_per_step": 4096, "group_size": 17}, "group_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"clip_epsilon": 1.0}, "clip_epsilon"),
        ({"clip_epsilon": -0.1}, "clip_epsilon"),
        ({"clip_epsilon": NAN}, "clip_epsilon"),
        ({"clip_epsilon_high": -0.1}, "clip_epsilon_high"),
        ({"clip_epsilon_high": INFINITY}, "clip_epsilon_high"),
        ({"kl_coefficient": -1.0}, "kl_coefficient"),
        ({"loss": LossFunction.CROSS_ENTROPY}, "loss"),
        ({"max_staleness": 2}, "max_staleness"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"promote_every_steps": -1}, "promote_every_steps"),
        ({"promote_every_steps": 2}, "promote_every_steps"),
        ({"rollout_ttl_s": -1}, "rollout_ttl_s"),
        ({"rollout_ttl_s": 10**12}, "rollout_ttl_s"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("a", "b" * 257)}, "stop[1]"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"scorer": ""}, "scorer"),
        ({"scorer": "a\nb"}, "scorer"),
        ({"scorer_options": {"schema": "x" * 65_536}}, "scorer_options"),
        ({"scorer_options": {f"o{number}": "" for number in range(65)}}, "scorer_options"),
        ({"scorer_timeout_s": -1.0}, "scorer_timeout_s"),
        ({"scorer_timeout_s": NAN}, "scorer_timeout_s"),
        ({"scorer_timeout_s": 1e6}, "scorer_timeout_s"),
        ({"prompts": None}, "prompts"),
        ({"optimizer": OptimizerConfig(eps=-1.0)}, "optimizer.eps"),
    ],
)
async def test_a_bad_grpo_recipe_is_refused(changes: dict[str, Any], field: str) -> None:
    await _refused(f"run.grpo.{field}", sft=None, grpo=replace(GRPO, **changes), publish=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"revision": ""}, "revision"),
        ({"revision": "x"}, "revision"),
        ({"revision": "tenants/acme/policies/other/revisions/1"}, "revision"),
        ({"revision": "baseModels/other"}, "revision"),
        ({"revision": "baseModels/../x"}, "revision"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop": ("",)}, "stop[0]"),
        ({"scorer": ""}, "scorer"),
        ({"scorer_options": {"o": "x" * 65_536}}, "scorer_options"),
        ({"scorer_timeout_s": INFINITY}, "scorer_timeout_s"),
        ({"data": None}, "data"),
    ],
)
async def test_a_bad_evaluation_recipe_is_refused(changes: dict[str, Any], field: str) -> None:
    await _refused(f"run.evaluation.{field}", sft=None, evaluation=replace(EVALUATION, **changes))


FULL_GRPO = replace(
    GRPO,
    optimizer=OptimizerConfig(learning_rate=1e-4),
    temperature=0.7,
    clip_epsilon=0.1,
    clip_epsilon_high=0.3,
    kl_coefficient=0.01,
    seed=2**64 - 1,
    scorer_options={"field": "answer", "schema": '{\n  "type": "object"\n}'},
    scorer_timeout_s=2.5,
    advantage=GroupAdvantage.CENTERED,
    weighting=TokenWeighting.FIXED_LENGTH,
    loss=LossFunction.CISPO,
    sequence_level_ratio=True,
    max_staleness=1,
    promote_every_steps=5,
    stop=("\n", "END"),
    rollout_ttl_s=3600,
)
FULL_EVALUATION = replace(
    EVALUATION,
    max_new_tokens=32,
    scorer_options={"field": "answer"},
    scorer_timeout_s=1.0,
    temperature=1.0,
    seed=7,
    stop=("\n",),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo": GRPO, "publish": True},
        {"grpo": FULL_GRPO, "publish": True, "promote_alias": "live", "continue_from_latest": True},
        {"dpo": DpoRecipe(DATA, 1)},
        {"evaluation": EVALUATION},
        {"evaluation": FULL_EVALUATION},
        {"evaluation": replace(EVALUATION, revision=str(BASE))},
    ],
)
async def test_good_recipes_are_stored_as_they_are(changes: dict[str, Any]) -> None:
    lab = await _lab()
    await lab.blob("{}")
    run = (await lab.run(sft=None, **changes)).record
    assert await lab.runs.get(run.name) == run
    (kind,) = {"grpo", "dpo", "evaluation"} & set(changes)
    known = BlobRef(DATA.digest, 2)
    field = {"grpo": "prompts", "dpo": "train_data", "evaluation": "data"}[kind]
    assert run.recipe == replace(changes[kind], **{field: known}), "only the true size of the data is filled in"


async def test_an_evaluation_needs_its_revision() -> None:
    lab = await _lab()
    await lab.blob("{}")
    with pytest.raises(NotFound):
        await lab.run(sft=None, evaluation=replace(EVALUATION, revision=f"{POLICY}/revisions/2"))


async def test_a_refusal_names_the_whole_value() -> None:
    lab = await _lab()
    with pytest.raises(InvalidArgument, match="is 123456789: it must be from 1 to 10000000"):
        await lab.run(sft=replace(SFT, num_steps=123456789))


def test_an_enum_of_a_newer_program_is_not_taken_for_the_default() -> None:
    recipe = run_service_pb2.GrpoRecipe(loss=3, advantage=2)  # type: ignore[arg-type]
    check_enums(recipe, field="run.grpo")
    recipe.MergeFromString(b"\x70\x63")  # advantage = 99
    with pytest.raises(InvalidArgument, match="99: this catalog knows GROUP_ADVANTAGE_UNSPECIFIED, ") as caught:
        check_enums(recipe, field="run.grpo")
    assert caught.value.field == "run.grpo.advantage"
