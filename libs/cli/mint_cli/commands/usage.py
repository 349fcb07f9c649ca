"""`mint usage`: what was used of a tenant or a policy."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import usage_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_pairs, to_plain
from mint_cli.references import policy_name, tenant_id
from mint_cli.times import SinceOption, UntilOption, parse_time
from mint_client import MintClient

__all__ = ["usage"]


def usage(
    resource: Annotated[str, typer.Argument(help="tenant or tenant/policy.")],
    since: SinceOption = "",
    until: UntilOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show requests, tokens and records of a tenant or a policy, by whole days (UTC)."""
    name = str(policy_name(resource)) if "/" in resource else f"tenants/{tenant_id(resource)}"
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))
    start, end = parse_time(since, field="since"), parse_time(until, field="until")

    async def call() -> usage_service_pb2.Usage:
        async with MintClient(endpoints) as client:
            return await client.usage.get(name, since=start, until=end)

    plain = to_plain(asyncio.run(call()))
    if json_output:
        print_json(plain)
    else:
        print_pairs(plain.items())
