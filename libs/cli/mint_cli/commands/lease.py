"""`mint lease`: who may write to what now."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.runtime.v1 import work_service_pb2
from mint_cli.endpoints import find_runtime_address, state_dir
from mint_cli.options import CatalogRuntimeOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import short, tenant_id
from mint_client.runtime import WorkClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Leases: who may write to a policy or run now.")


@app.callback()
def _group() -> None:
    """Leases: who may write to a policy or run now."""


@app.command(name="list")
def list_(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    catalog_runtime: CatalogRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a tenant's leases: the resource, its holder, the fence, and the time to live of each renewal."""
    parent = tenant_id(tenant)
    address = find_runtime_address(state_dir(state_path), "catalog", given=catalog_runtime)

    async def call() -> list[work_service_pb2.Lease]:
        async with WorkClient(address) as work:
            return await work.list_leases(parent)

    leases = asyncio.run(call())
    if json_output:
        print_json({"leases": [to_plain(lease) for lease in leases]})
        return
    rows = [[short(each.resource), each.holder, each.fence.token, f"{each.ttl.seconds} s"] for each in leases]
    print_table(["RESOURCE", "HOLDER", "FENCE", "TTL"], rows)
