"""`mint audit`: who changed what, when and why."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import typer

from mint_api.v1 import audit_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import resource_name, short, tenant_id
from mint_cli.times import SinceOption, UntilOption, parse_time
from mint_client import MintClient
from mint_client.accounting import unpack

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The audit trail: every change of a tenant's records.")

_MAX_PAGE = 1000
_MAX_SHOWN = 4


@app.callback()
def _group() -> None:
    """Keeps `list` a command of its own."""


@app.command("list")
def list_(
    tenant: Annotated[str, typer.Argument(help="Id of the tenant.")],
    resource: Annotated[
        str, typer.Option(help="Only changes of it or of what lies below: tenant/policy, or a resource name.")
    ] = "",
    since: SinceOption = "",
    until: UntilOption = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many entries; 0 means all.")] = 100,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a tenant's audit entries, newest first."""
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))
    start, end = parse_time(since, field="since"), parse_time(until, field="until")
    name = resource_name(resource) if resource else ""

    async def call() -> list[audit_service_pb2.AuditEntry]:
        entries: list[audit_service_pb2.AuditEntry] = []
        async with MintClient(endpoints) as client:
            size = min(limit or _MAX_PAGE, _MAX_PAGE)
            found = client.audit.list(tenant_id(tenant), resource=name, since=start, until=end, page_size=size)
            async with contextlib.aclosing(found) as each:  # type: ignore[type-var]
                async for entry in each:
                    entries.append(entry)
                    if len(entries) == limit:
                        break
        return entries

    entries = asyncio.run(call())
    if json_output:
        print_json([_plain(entry) for entry in entries])
    else:
        print_table(("time", "revision", "principal", "method", "changes", "reason"), map(_row, entries))


def _plain(entry: audit_service_pb2.AuditEntry) -> dict[str, Any]:
    plain = to_plain(entry)
    for shown, change in zip(plain["changes"], entry.changes, strict=True):
        for side in ("before", "after"):
            if change.HasField(side):
                packed = getattr(change, side)
                record = unpack(packed)
                shown[side] = {"type": packed.TypeName()} | (to_plain(record) if record is not None else {})
    return plain


def _row(entry: audit_service_pb2.AuditEntry) -> tuple[object, ...]:
    shown = [
        f"{audit_service_pb2.AuditChangeType.Name(change.type).removeprefix('AUDIT_CHANGE_TYPE_').lower()} "
        f"{short(change.resource)}"
        for change in entry.changes[:_MAX_SHOWN]
    ]
    if len(entry.changes) > _MAX_SHOWN:
        shown.append(f"and {len(entry.changes) - _MAX_SHOWN} more")
    time = entry.time.ToDatetime().isoformat(sep=" ", timespec="milliseconds")
    method = entry.method.rpartition(".")[2]
    return time, entry.catalog_revision, entry.principal, method, ", ".join(shown), entry.reason
