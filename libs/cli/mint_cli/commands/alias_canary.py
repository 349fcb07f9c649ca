"""`mint alias canary`: a second revision on trial behind an alias."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import alias_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, to_plain
from mint_cli.references import alias_name, short
from mint_client import MintClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Canaries: a second revision for a share of the sticky keys.")

ReasonOption = Annotated[str, typer.Option(help="Why, kept in the audit trail.")]
EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the alias still has it.")]


@app.command("set")
def set_canary(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    revision: Annotated[int, typer.Argument(min=1, help="Number of the revision to try.")],
    weight: Annotated[float, typer.Option(help="Share of the sticky keys that get it, above 0 and at most 1.")],
    salt: Annotated[
        str, typer.Option(help="Goes into the hash of the keys; another one chooses others.", show_default="its name")
    ] = "",
    reason: ReasonOption = "",
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Try a revision, or change the weight of the trial: who got it keeps it while the weight grows."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.set_canary(name, revision, weight, salt=salt, reason=reason, etag=etag)

    _print(asyncio.run(call()), json_output)


@app.command()
def clear(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    reason: ReasonOption = "",
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """End the trial; every request gets the active revision again."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.clear_canary(name, reason=reason, etag=etag)

    _print(asyncio.run(call()), json_output)


def _print(alias: alias_service_pb2.Alias, json_output: bool) -> None:
    if json_output:
        print_json(to_plain(alias))
    elif alias.HasField("canary"):
        share, number = f"{alias.canary.weight:.4g}", alias.canary.target.revision_number
        print(f"{short(alias.name)} answers {share} of the sticky keys with revision {number}")
    else:
        print(f"{short(alias.name)} has no canary")
