"""Short GRPO runs for tests, and what must be true of one that has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mint_api.v1 import run_service_pb2
from mint_client import MintClient
from support.fault_scorers import SCORER
from support.invariants import Invariants
from support.publishing import create_policy
from support.stack import Stack, fresh_id

__all__ = ["ALIAS", "TENANT", "check_ended", "grpo_recipe", "history", "start_grpo"]

TENANT = "acme"
ALIAS = "live"

_EIGHT_PROMPTS: Sequence[Mapping[str, Any]] = [{"prompt": f"Count from {number} on:"} for number in range(8)]


def grpo_recipe(num_steps: int, **fields: Any) -> run_service_pb2.GrpoRecipe:
    """As little work as a step can be: 2 prompts, 2 samples of each, 4 tokens; the alias moves after every step."""
    smallest: dict[str, Any] = {
        "scorer": SCORER,
        "num_prompts_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 4,
        "promote_every_steps": 1,
        "seed": 5,
        # Large, so that every step makes other weights.
        "optimizer": run_service_pb2.OptimizerConfig(learning_rate=1e-2),
    }
    return run_service_pb2.GrpoRecipe(num_steps=num_steps, **(smallest | fields))


async def start_grpo(
    stack: Stack,
    client: MintClient,
    work: Path,
    recipe: run_service_pb2.GrpoRecipe,
    *,
    prompts: Sequence[Mapping[str, Any]] = _EIGHT_PROMPTS,
) -> run_service_pb2.Run:
    """Queue a run of a fresh policy that publishes every step and promotes ``live``."""
    policy = await create_policy(stack, client, tenant=TENANT)
    path = work / f"{fresh_id('prompts')}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in prompts))
    recipe.prompts.CopyFrom(await client.blobs.upload(TENANT, path))
    run = run_service_pb2.Run(policy=policy, grpo=recipe, publish=True, promote_alias=ALIAS)
    return await client.runs.create(TENANT, run)


async def check_ended(stack: Stack, client: MintClient, run: run_service_pb2.Run) -> None:
    """Raise AssertionError unless the run did what was planned, each step once, and the invariants hold."""
    num_steps = run.grpo.num_steps
    assert run.state == run_service_pb2.RUN_STATE_SUCCEEDED, f"{run.error}\n{history(run)}"
    assert run.progress.step == num_steps
    assert [step.step async for step in client.runs.steps(run.name)] == list(range(1, num_steps + 1))
    revisions = [revision async for revision in client.revisions.list(run.policy)]
    # Step 0 are the fresh weights that the first batch was sampled from.
    published = [(revision.lineage.run, revision.lineage.step) for revision in revisions]
    assert published == [(run.name, step) for step in range(num_steps + 1)], "each step is published once, in order"
    assert run.published_revision == revisions[-1].name
    alias = (await client.aliases.list(run.policy))[0]
    assert alias.active.digest == revisions[-1].blob.digest
    rollouts = [rollout async for rollout in client.rollouts.list(run.policy, run=run.name)]
    assert sorted(rollout.step for rollout in rollouts) == list(range(1, num_steps + 1)), "each batch is stored once"
    by_step = {rollout.step: rollout for rollout in rollouts}
    for revision, step in zip(revisions, range(1, num_steps + 1), strict=False):
        assert by_step[step].revision == revision.name, f"step {step} was sampled from {by_step[step].revision}"
    await Invariants(stack).check(client, [run.policy])


def history(run: run_service_pb2.Run) -> str:
    """A run's events, for the message of a failed test."""
    return "\n".join(f"{event.time.ToJsonString()} {event.kind}: {event.message}" for event in run.events)
