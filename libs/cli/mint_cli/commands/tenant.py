"""`mint tenant`: a tenant's end."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import tenant_service_pb2 as pb
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import flatten, print_json, print_pairs, to_plain
from mint_cli.references import tenant_id
from mint_client import MintClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Tenants: erase one with everything that is its.")

TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]


@app.command()
def delete(
    tenant: TenantArgument,
    confirm: Annotated[str, typer.Option(help="The tenant again: it cannot be undone.")],
    reason: Annotated[str, typer.Option(help="Why, kept in the proof.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Begin to erase a tenant: records, audit trail, usage and blobs. It takes no writes from now on."""
    tenant = tenant_id(tenant)
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> pb.TenantErasure:
        async with MintClient(endpoints) as client:
            return await client.tenants.delete(tenant, confirm=confirm, reason=reason)

    _print(asyncio.run(call()), json_output)


@app.command()
def erasure(
    tenant: TenantArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show how far a tenant's erasure is, or the proof of the last one."""
    tenant = tenant_id(tenant)
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> pb.TenantErasure:
        async with MintClient(endpoints) as client:
            return await client.tenants.erasure(tenant)

    _print(asyncio.run(call()), json_output)


def _print(found: pb.TenantErasure, json_output: bool) -> None:
    plain = to_plain(found)
    if json_output:
        print_json(plain)
    else:
        print_pairs([(name.replace("_", " "), value) for name, value in flatten(plain)])
