"""Scorers that raise, hang, die or answer nonsense, and rewards that teach nothing: the run lives and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mint_api.v1 import run_service_pb2
from mint_client import MintClient
from mint_runs.order import step_indices
from support.grpo_runs import check_ended, grpo_recipe, start_grpo
from support.stack import Stack

GROUP_SIZE = 2


def prompts(*behaviours: str) -> list[Mapping[str, str]]:
    """A prompt for each behaviour of the scorer."""
    return [{"prompt": f"Number {number}:", "behaviour": each} for number, each in enumerate(behaviours)]


async def train(
    stack: Stack,
    client: MintClient,
    work: Path,
    lines: Sequence[Mapping[str, str]],
    num_steps: int,
    *,
    num_prompts_per_step: int,
    seed: int = 5,
) -> tuple[list[run_service_pb2.RunStep], list[str]]:
    """The figures of a run's steps and the digests of its revisions, that of the fresh weights first."""
    recipe = grpo_recipe(
        num_steps,
        num_prompts_per_step=num_prompts_per_step,
        group_size=GROUP_SIZE,
        scorer_timeout_s=0.5,
        seed=seed,
    )
    queued = await start_grpo(stack, client, work, recipe, prompts=lines)
    run = await client.runs.wait(queued.name)
    await check_ended(stack, client, run)
    steps = [step async for step in client.runs.steps(run.name)]
    return steps, [revision.blob.digest async for revision in client.revisions.list(run.policy)]


async def test_what_a_scorer_does_wrong_costs_one_sample_its_reward(armed_stack: Stack, work: Path) -> None:
    lines = prompts("raise", "hang", "nan", "exit", "spread")
    async with armed_stack.client() as client:
        steps, digests = await train(armed_stack, client, work, lines, 2, num_prompts_per_step=len(lines))
    for step in steps:
        assert step.metrics["num_samples"] == len(lines) * GROUP_SIZE
        assert step.metrics["num_unscored"] == (len(lines) - 1) * GROUP_SIZE
        # Groups without any score are empty; what is left of the batch is the one group that has rewards.
        assert step.metrics["num_uninformative_groups"] == len(lines) - 1
    assert len(set(digests)) == len(digests), "the one good group teaches"


@pytest.mark.parametrize("behaviour", ["equal", "raise"])
async def test_a_step_with_nothing_to_learn_from_changes_nothing(
    armed_stack: Stack, work: Path, behaviour: str
) -> None:
    """After a step that taught something, so that the optimizer's moments would move the weights by themselves."""
    lines = prompts("spread", "spread", behaviour, behaviour)
    seed = next(seed for seed in range(100) if sorted(step_indices(seed, 0, 2, len(lines))) == [0, 1])
    async with armed_stack.client() as client:
        (first, second), digests = await train(armed_stack, client, work, lines, 2, num_prompts_per_step=2, seed=seed)
    fresh, after_first, after_second = digests
    assert (first.metrics["num_unscored"], first.metrics["num_uninformative_groups"]) == (0, 0)
    assert after_first != fresh
    assert second.metrics["num_uninformative_groups"] == 2
    assert second.metrics["num_unscored"] == (0 if behaviour == "equal" else 2 * GROUP_SIZE)
    assert after_second == after_first
