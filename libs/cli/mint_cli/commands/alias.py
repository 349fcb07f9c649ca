"""`mint alias`: what is served under which name."""

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

app = typer.Typer(no_args_is_help=True, help="Aliases: movable names that point at one revision.")

ReasonOption = Annotated[str, typer.Option(help="Why, kept in the alias's history.")]
EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the alias still has it.")]


@app.command()
def promote(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    revision: Annotated[int, typer.Argument(min=1, help="Number of the revision to point at.")],
    reason: ReasonOption = "",
    etag: EtagOption = "",
    min_resident_replicas: Annotated[int, typer.Option(min=0, help="First wait until as many engines hold it.")] = 0,
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
                name, revision, reason=reason, etag=etag, min_resident_replicas=min_resident_replicas
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


def _print(alias: alias_service_pb2.Alias, json_output: bool) -> None:
    if json_output:
        print_json(to_plain(alias))
    else:
        print(f"{short(alias.name)} points at revision {alias.active.revision_number} ({alias.active.digest})")
