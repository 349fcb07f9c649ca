"""`mint loader`: what a node holds, what it is about to hold, and what it should keep."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeVar

import typer
from google.protobuf import timestamp_pb2

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_cli.endpoints import find_endpoints, find_runtime_address, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_pairs, print_table, to_plain
from mint_cli.references import alias_name, model_name, short, tenant_id
from mint_cli.state import StateDir
from mint_cli.times import parse_time
from mint_client import MintClient
from mint_client.loaders import LoaderClient, adapter_of
from mint_core.errors import InvalidArgument

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Loaders: the tiers, queues, tickets and pins of a node.")

_TIERS = {"disk": pb.TIER_DISK, "host": pb.TIER_HOST, "slot": pb.TIER_SLOT}
_IN = re.compile(r"\+(\d{1,9})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
T = TypeVar("T")

NodeOption = Annotated[str, typer.Option("--node", help="The loader's name in `mint status`.")]
LoaderRuntimeOption = Annotated[
    str,
    typer.Option(
        "--loader-runtime",
        envvar="MINT_ENDPOINTS_LOADER_RUNTIME",
        help="host:port of the loader's runtime services.",
        show_default="of `mint up`",
    ),
]
TierOption = Annotated[str, typer.Option("--tier", help="disk, host or slot.")]
AliasArgument = Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")]
_TIME_HELP = "2026-03-01T12:00Z, or +90m, +36h, +7d from now."


@app.callback()
def _group() -> None:
    """Loaders: the tiers, queues, tickets and pins of a node."""


@app.command()
def status(
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show tiers, queues and waits."""
    seen = _ask(state_dir(state_path), node, loader_runtime, lambda loader: loader.status())
    if json_output:
        print_json(to_plain(seen))
        return
    print_table(
        ["TIER", "ADAPTERS", "BYTES", "OF", "PINNED", "HITS", "MISSES", "RUNNING", "QUEUED", "MEAN MS"],
        [
            [
                _tier_name(tier.tier),
                tier.num_adapters,
                tier.size_bytes,
                tier.max_bytes,
                tier.num_pinned,
                tier.num_hits,
                tier.num_misses,
                f"{tier.num_running}/{tier.num_places}",
                tier.num_queued,
                tier.mean_ms,
            ]
            for tier in seen.tiers
        ],
    )
    print_pairs([("evictions", seen.num_evictions), ("pins", seen.num_pins), ("prefetched", seen.num_prefetched)])
    print_table(
        ["TENANT", "QUEUED", "RUNNING", "TICKETS", "DONE", "FAILED", "REFUSED", "P50 MS", "P99 MS"],
        [
            [
                each.tenant.removeprefix("tenants/"),
                each.num_queued,
                each.num_running,
                each.num_open_tickets,
                each.num_done,
                each.num_failed,
                each.num_refused,
                each.wait_p50_ms,
                each.wait_p99_ms,
            ]
            for each in seen.tenants
        ],
    )


@app.command()
def tickets(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    open_only: Annotated[bool, typer.Option("--open", help="Only unfinished ones.")] = False,
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List load tickets: unfinished ones, oldest first, then finished ones, latest first."""
    wanted = tenant_id(tenant) if tenant else ""
    found = _ask(
        state_dir(state_path), node, loader_runtime, lambda loader: loader.tickets(tenant=wanted, open_only=open_only)
    )
    _print_tickets(found, json_output)


@app.command()
def cancel(
    ticket: Annotated[str, typer.Argument(help="As `mint loader tickets` shows it.")],
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a load ticket up; a load that others wait for goes on."""
    name = ticket if ticket.startswith("loadTickets/") else f"loadTickets/{ticket}"
    _print_tickets([_ask(state_dir(state_path), node, loader_runtime, lambda loader: loader.cancel(name))], json_output)


@app.command()
def prefetch(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="tenant/policy@alias or tenant/policy@3.")],
    tier: TierOption = "disk",
    priority: Annotated[int, typer.Option(help="Those with a larger one come first.")] = 0,
    deadline: Annotated[str, typer.Option(help=f"Give it up after this: {_TIME_HELP}")] = "",
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring adapters to the node without waiting for them."""
    state, how_far, until = state_dir(state_path), _tier(tier), _time(deadline, field="deadline")
    names = [model_name(model) for model in models]
    endpoints = find_endpoints(state, catalog=catalog, needed=("catalog",))

    async def submit(loader: LoaderClient) -> list[pb.LoadTicket]:
        async with MintClient(endpoints) as client:
            found = [await client.aliases.resolve(name) for name in names]
        return await loader.prefetch(map(adapter_of, found), tier=how_far, priority=priority, deadline=until)

    _print_tickets(_ask(state, node, loader_runtime, submit), json_output)


@app.command()
def pin(
    alias: AliasArgument,
    tier: TierOption = "host",
    start: Annotated[str, typer.Option(help=f"From then on: {_TIME_HELP}", show_default="now")] = "",
    end: Annotated[str, typer.Option(help=f"Until then: {_TIME_HELP}", show_default="until it is unpinned")] = "",
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Keep what an alias points at on the node, wherever it moves: never evicted from the tier."""
    name, how_far = str(alias_name(alias)), _tier(tier)
    begin, finish = _time(start, field="start"), _time(end, field="end")
    made = _ask(
        state_dir(state_path),
        node,
        loader_runtime,
        lambda loader: loader.pin(name, tier=how_far, start=begin, end=finish),
    )
    _print_pins([made], json_output)


@app.command()
def unpin(
    alias: AliasArgument,
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
) -> None:
    """Forget a pin; the adapters stay until they are evicted."""
    name = str(alias_name(alias))
    _ask(state_dir(state_path), node, loader_runtime, lambda loader: loader.unpin(name))


@app.command()
def pins(
    node: NodeOption = "loader",
    loader_runtime: LoaderRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List the node's pins."""
    _print_pins(_ask(state_dir(state_path), node, loader_runtime, lambda loader: loader.pins()), json_output)


def _ask(state: StateDir, node: str, given: str, question: Callable[[LoaderClient], Awaitable[T]]) -> T:
    address = find_runtime_address(state, node, given=given)

    async def call() -> T:
        async with LoaderClient(address) as loader:
            return await question(loader)

    return asyncio.run(call())


def _tier(name: str) -> pb.Tier.ValueType:
    if name not in _TIERS:
        raise InvalidArgument(f"tier is {name!r}: expected {', '.join(_TIERS)}", field="tier")
    return _TIERS[name]


def _tier_name(tier: int) -> str:
    return pb.Tier.Name(pb.Tier.ValueType(tier)).removeprefix("TIER_").lower()


def _time(text: str, *, field: str) -> datetime | None:
    later = _IN.fullmatch(text)
    if later:
        return datetime.now(UTC) + timedelta(**{_UNITS[later[2]]: int(later[1])})
    return parse_time(text, field=field)


def _print_tickets(found: Iterable[pb.LoadTicket], json_output: bool) -> None:
    if json_output:
        print_json({"load_tickets": [to_plain(ticket) for ticket in found]})
        return
    rows = [
        [
            ticket.name.removeprefix("loadTickets/"),
            ticket.adapter.tenant.removeprefix("tenants/"),
            ticket.adapter.blob.digest.removeprefix("sha256:")[:12],
            _tier_name(ticket.tier),
            ticket.priority,
            pb.LoadTicketState.Name(ticket.state).removeprefix("LOAD_TICKET_STATE_"),
            ticket.error,
        ]
        for ticket in found
    ]
    print_table(["TICKET", "TENANT", "DIGEST", "TIER", "PRIORITY", "STATE", "ERROR"], rows)


def _print_pins(found: Iterable[pb.Pin], json_output: bool) -> None:
    if json_output:
        print_json({"pins": [to_plain(pin) for pin in found]})
        return
    rows = [
        [
            short(each.alias),
            _tier_name(each.tier),
            pb.PinState.Name(each.state).removeprefix("PIN_STATE_"),
            _shown_time(each.start_time) if each.HasField("start_time") else "",
            _shown_time(each.end_time) if each.HasField("end_time") else "",
            " ".join(ref.blob.digest.removeprefix("sha256:")[:12] for ref in each.adapters),
            each.error,
        ]
        for each in found
    ]
    print_table(["ALIAS", "TIER", "STATE", "FROM", "UNTIL", "DIGESTS", "ERROR"], rows)


def _shown_time(time: timestamp_pb2.Timestamp) -> str:
    return time.ToDatetime(UTC).isoformat(timespec="seconds")
