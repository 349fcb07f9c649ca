"""`mint alias`: what is served under which name."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import alias_service_pb2
from mint_cli.commands import alias_canary, alias_gate
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import alias_name, short
from mint_client import MintClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Aliases: movable names that point at one revision.")

app.add_typer(alias_canary.app, name="canary")
app.add_typer(alias_gate.app, name="gate")

ReasonOption = Annotated[str, typer.Option(help="Why, kept in the alias's history.")]
EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the alias still has it.")]


@app.command()
def promote(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    revision: Annotated[int, typer.Argument(min=1, help="Number of the revision to point at.")],
    reason: ReasonOption = "",
    etag: EtagOption = "",
    wait_replicas: Annotated[int, typer.Option(min=0, help="First wait until as many engines hold it.")] = 0,
    wait_timeout: Annotated[float, typer.Option(min=1, max=3600, help="How long to wait for them, in seconds.")] = 60.0,
    ignore_gate: Annotated[
        bool, typer.Option("--ignore-gate", help="Move it although its gate is not met; needs a reason.")
    ] = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Point an alias at a revision; creates the alias if there is none."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.promote(
                name,
                revision,
                reason=reason,
                etag=etag,
                min_resident_replicas=wait_replicas,
                residency_timeout_s=wait_timeout,
                ignore_gate=ignore_gate,
            )

    _print(asyncio.run(call()), json_output)


@app.command()
def rollback(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    to: Annotated[int, typer.Option(min=0, help="Number of the revision; 0 means the previous one.")] = 0,
    reason: ReasonOption = "",
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Point an alias back at what it pointed at before."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.rollback(name, to, reason=reason, etag=etag)

    _print(asyncio.run(call()), json_output)


@app.command()
def history(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """What an alias pointed at, newest first: who moved it there, when and why."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.get(name)

    found = asyncio.run(call())
    if json_output:
        print_json({"history": [to_plain(entry) for entry in found.history]})
        return
    print_table(
        ("REVISION", "WHAT", "WHEN", "WHO", "WHY"),
        [
            (
                entry.target.revision_number,
                "canary taken back" if entry.rolled_back_canary else "moved",
                to_plain(entry.attribution).get("time"),
                entry.attribution.principal,
                entry.attribution.reason,
            )
            for entry in found.history
        ],
    )


def _print(alias: alias_service_pb2.Alias, json_output: bool) -> None:
    if json_output:
        print_json(to_plain(alias))
    else:
        print(f"{short(alias.name)} points at revision {alias.active.revision_number} ({alias.active.digest})")
