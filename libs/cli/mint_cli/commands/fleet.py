"""`mint fleet`: one verb over many policies."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mint_api.v1 import fleet_service_pb2 as pb
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_pairs, print_table, to_plain
from mint_cli.references import short, tenant_id
from mint_client import Endpoints, MintClient
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_core.names import FleetOperationName, check_id
from mint_core.status import error_from_status

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Fleet operations: one verb over all policies of a filter.")

TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]
OperationArgument = Annotated[str, typer.Argument(help="tenant/operation, as the verbs print it.")]
FilterOption = Annotated[
    str, typer.Option("--filter", help="Which policies, e.g. 'labels.team = \"search\"'; nothing means all.")
]
AliasOption = Annotated[str, typer.Option(help="The alias's id on every policy.")]
ReasonOption = Annotated[str, typer.Option(help="Why, kept in each alias's history and in the audit trail.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for the end; fail if an item failed.")]
IdOption = Annotated[str, typer.Option("--id", help="Id of the operation.", show_default="chosen")]


@app.command()
def promote(
    tenant: TenantArgument,
    filter_: FilterOption = "",
    alias: AliasOption = "live",
    reason: ReasonOption = "",
    operation_id: IdOption = "",
    wait: WaitOption = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Point an alias of each policy at its newest READY revision."""
    operation = pb.FleetOperation(filter=filter_, reason=reason, promote=pb.FleetPromote(alias=alias))
    _begin(tenant, operation, operation_id, wait, _endpoints(catalog, state_path), json_output)


@app.command()
def rollback(
    tenant: TenantArgument,
    filter_: FilterOption = "",
    alias: AliasOption = "live",
    reason: ReasonOption = "",
    operation_id: IdOption = "",
    wait: WaitOption = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Point an alias of each policy back at its previous READY revision."""
    operation = pb.FleetOperation(filter=filter_, reason=reason, rollback=pb.FleetRollback(alias=alias))
    _begin(tenant, operation, operation_id, wait, _endpoints(catalog, state_path), json_output)


@app.command()
def pause(
    tenant: TenantArgument,
    filter_: FilterOption = "",
    reason: ReasonOption = "",
    operation_id: IdOption = "",
    wait: WaitOption = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Pause each policy: no new runs or promotions."""
    operation = pb.FleetOperation(filter=filter_, reason=reason, pause=pb.FleetPause())
    _begin(tenant, operation, operation_id, wait, _endpoints(catalog, state_path), json_output)


@app.command()
def resume(
    tenant: TenantArgument,
    filter_: FilterOption = "",
    reason: ReasonOption = "",
    operation_id: IdOption = "",
    wait: WaitOption = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make each paused policy ACTIVE again."""
    operation = pb.FleetOperation(filter=filter_, reason=reason, resume=pb.FleetResume())
    _begin(tenant, operation, operation_id, wait, _endpoints(catalog, state_path), json_output)


@app.command()
def show(
    operation: OperationArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show an operation."""
    name, endpoints = str(_operation_name(operation)), _endpoints(catalog, state_path)

    async def call() -> pb.FleetOperation:
        async with MintClient(endpoints) as client:
            return await client.fleet_operations.get(name)

    _print(asyncio.run(call()), json_output)


@app.command(name="list")
def list_(
    tenant: TenantArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a tenant's operations."""
    tenant, endpoints = tenant_id(tenant), _endpoints(catalog, state_path)

    async def call() -> list[pb.FleetOperation]:
        async with MintClient(endpoints) as client:
            return [operation async for operation in client.fleet_operations.list(tenant)]

    operations = asyncio.run(call())
    if json_output:
        print_json({"fleet_operations": [to_plain(operation) for operation in operations]})
        return
    rows = [
        [
            _short(each.name),
            each.WhichOneof("verb"),
            to_plain(each)["state"],
            each.num_done,
            each.num_failed,
            each.reason,
        ]
        for each in operations
    ]
    print_table(["OPERATION", "VERB", "STATE", "DONE", "FAILED", "REASON"], rows)


@app.command()
def results(
    operation: OperationArgument,
    failed: Annotated[bool, typer.Option("--failed", help="Only items that failed.")] = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List what came of each policy so far."""
    name, endpoints = str(_operation_name(operation)), _endpoints(catalog, state_path)

    async def call() -> list[pb.FleetResult]:
        async with MintClient(endpoints) as client:
            found = client.fleet_operations.results(name, failed_only=failed, page_size=1000)
            return [result async for result in found]

    found = asyncio.run(call())
    if json_output:
        print_json({"fleet_results": [_plain_result(result) for result in found]})
        return
    rows = [[short(each.policy), _outcome(each), each.revision_number or "", each.status.message] for each in found]
    print_table(["POLICY", "OUTCOME", "REVISION", "MESSAGE"], rows)


@app.command()
def cancel(
    operation: OperationArgument,
    reason: Annotated[str, typer.Option(help="Why, kept in the audit trail.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Stop an operation after the items under way."""
    name, endpoints = str(_operation_name(operation)), _endpoints(catalog, state_path)

    async def call() -> pb.FleetOperation:
        async with MintClient(endpoints) as client:
            return await client.fleet_operations.cancel(name, reason=reason)

    _print(asyncio.run(call()), json_output)


def _endpoints(catalog: str, state_path: Path | None) -> Endpoints:
    return find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))


def _operation_name(text: str) -> FleetOperationName:
    if text.startswith("tenants/"):
        return FleetOperationName.parse(text, field="operation")
    tenant, slash, operation = text.partition("/")
    if not slash:
        raise InvalidArgument(
            f"operation is {text!r}: expected tenant/operation, as `mint fleet list` shows it", field="operation"
        )
    return FleetOperationName(tenant_id(tenant), check_id(operation, field="operation"))


def _short(name: str) -> str:
    parsed = FleetOperationName.parse(name)
    return f"{parsed.tenant}/{parsed.fleet_operation}"


def _outcome(result: pb.FleetResult) -> str:
    return error_from_status(result.status).reason if result.status.code else "OK"


def _plain_result(result: pb.FleetResult) -> dict[str, Any]:
    plain = to_plain(result)
    plain["status"] = {"reason": _outcome(result), "message": result.status.message}
    return plain


def _begin(
    tenant: str,
    operation: pb.FleetOperation,
    operation_id: str,
    wait: bool,
    endpoints: Endpoints,
    json_output: bool,
) -> None:
    parent = tenant_id(tenant)

    async def call() -> pb.FleetOperation:
        async with MintClient(endpoints) as client:
            begun = await client.fleet_operations.create(parent, operation, operation_id=operation_id)
            if not wait:
                return begun
            print(f"waiting for {_short(begun.name)}", file=sys.stderr)
            return await client.fleet_operations.wait(begun.name)

    ended = asyncio.run(call())
    _print(ended, json_output)
    if wait and ended.num_failed:
        raise FailedPrecondition(
            f"{ended.num_failed} of {ended.num_done} policies failed; `mint fleet results --failed "
            f"{_short(ended.name)}` tells why"
        )


def _print(operation: pb.FleetOperation, json_output: bool) -> None:
    plain = to_plain(operation)
    if json_output:
        print_json(plain)
        return
    verb = operation.WhichOneof("verb") or ""
    print_pairs(
        [
            ("operation", _short(operation.name)),
            ("verb", f"{verb} {alias}" if (alias := plain.get(verb, {}).get("alias")) else verb),
            ("filter", operation.filter or "all"),
            ("state", plain["state"]),
            ("done", operation.num_done),
            ("failed", operation.num_failed),
            ("reason", operation.reason),
            ("asked by", operation.principal),
            ("catalog revision", operation.catalog_revision),
        ]
    )
