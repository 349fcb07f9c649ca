"""`mint rollout`: the batches that a policy's GRPO runs have learned from."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import rollout_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import policy_name, run_name, short
from mint_client import MintClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Rollout batches: samples and rewards of one step.")


@app.callback()
def _group() -> None:
    """Rollout batches: samples and rewards of one step."""


@app.command(name="list")
def list_(
    policy: Annotated[str, typer.Argument(help="tenant/policy")],
    run: Annotated[str, typer.Option(help="Only those of this run, tenant/run.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a policy's rollout batches, or those of one run."""
    name = str(policy_name(policy))
    of_run = str(run_name(run)) if run else ""
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> list[rollout_service_pb2.Rollout]:
        async with MintClient(endpoints) as client:
            return [rollout async for rollout in client.rollouts.list(name, run=of_run)]

    rollouts = [to_plain(rollout) for rollout in asyncio.run(call())]
    if json_output:
        print_json({"rollouts": rollouts})
        return
    rows = [
        [
            short(rollout["run"]),
            rollout["step"],
            short(rollout["revision"]),
            rollout["reward_mean"],
            rollout["num_samples"],
            rollout["num_unscored"],
            rollout["num_tokens"],
            rollout.get("blob", {}).get("size_bytes"),
            rollout.get("expire_time"),
        ]
        for rollout in rollouts
    ]
    print_table(["RUN", "STEP", "REVISION", "REWARD", "SAMPLES", "UNSCORED", "TOKENS", "BYTES", "EXPIRES"], rows)
