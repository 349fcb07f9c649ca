"""`mint run`: queued, running and ended runs of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mint_api.v1 import evaluation_service_pb2, run_service_pb2
from mint_cli.curves import Curve, curves_of
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import console, flatten, print_json, print_pairs, print_table, to_plain
from mint_cli.references import policy_name, run_name, short, tenant_id
from mint_cli.runs import conclude, evaluation_of, figures_text, progress_text, state_text, watch_run
from mint_client import MintClient
from mint_core.errors import InvalidArgument

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Runs: training and evaluation, queued, running and ended.")


class State(StrEnum):
    """Choices of ``RunState``."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


RunArgument = Annotated[str, typer.Argument(help="tenant/run")]

_MAX_COLUMNS = 100
"""A curve gets no clearer by being wider."""


@app.command(name="list")
def list_(
    tenant: Annotated[str, typer.Argument(help="The tenant; not needed with --policy.")] = "",
    policy: Annotated[str, typer.Option(help="Only runs of this policy, tenant/policy.")] = "",
    state: Annotated[State | None, typer.Option(help="Only runs in this state.", show_default="any")] = None,
    dead_letter: Annotated[bool, typer.Option("--dead-letter", help="Only runs that have failed for good.")] = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a tenant's or a policy's runs."""
    wanted = run_service_pb2.RunState.Value(f"RUN_STATE_{state.name if state else 'UNSPECIFIED'}")
    of_policy = policy_name(policy) if policy else None
    if of_policy is None and not tenant:
        raise InvalidArgument("whose runs? name a tenant, or a policy with --policy tenant/policy", field="tenant")
    if of_policy is not None and tenant not in ("", of_policy.tenant):
        raise InvalidArgument(
            f"tenant is {tenant!r}, but --policy is {policy!r}: leave one of them out", field="tenant"
        )
    parent = tenant_id(tenant) if of_policy is None else of_policy.tenant
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> list[run_service_pb2.Run]:
        async with MintClient(endpoints) as client:
            found = client.runs.list(parent, policy=str(of_policy or ""), state=wanted, dead_letter=dead_letter)
            return [run async for run in found]

    runs = asyncio.run(call())
    if json_output:
        print_json({"runs": [to_plain(run) for run in runs]})
        return
    rows = [
        [
            short(run.name),
            short(run.policy),
            run.WhichOneof("recipe"),
            state_text(run),
            progress_text(run),
            figures_text(run),
            short(run.published_revision),
            to_plain(run).get("create_time"),
        ]
        for run in runs
    ]
    print_table(["RUN", "POLICY", "RECIPE", "STATE", "PROGRESS", "FIGURES", "PUBLISHED", "CREATED"], rows)


@app.command()
def watch(
    run: RunArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show a run's progress until it has ended; fails if it does."""
    name = str(run_name(run))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> tuple[run_service_pb2.Run, evaluation_service_pb2.Evaluation | None]:
        async with MintClient(endpoints) as client:
            watched = await watch_run(client, name)
            return watched, await evaluation_of(client, watched)

    watched, evaluation = asyncio.run(call())
    if json_output:
        print_json(to_plain(watched))
    conclude(watched, evaluation, json_output=json_output)


@app.command()
def cancel(
    run: RunArgument,
    reason: Annotated[str, typer.Option(help="Why, kept among the run's events.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Ask a run to stop; a queued one ends at once, a running one at its next step."""
    name = str(run_name(run))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> run_service_pb2.Run:
        async with MintClient(endpoints) as client:
            return await client.runs.cancel(name, reason=reason)

    cancelled = asyncio.run(call())
    if json_output:
        print_json(to_plain(cancelled))
    else:
        print(f"{short(cancelled.name)} is {state_text(cancelled)}")


@app.command()
def retry(
    run: RunArgument,
    reason: Annotated[str, typer.Option(help="Why, kept among the run's events.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Queue a run that has failed again; it goes on from the newest state it saved."""
    name = str(run_name(run))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> run_service_pb2.Run:
        async with MintClient(endpoints) as client:
            return await client.runs.retry(name, reason=reason)

    retried = asyncio.run(call())
    if json_output:
        print_json(to_plain(retried))
    else:
        print(f"{short(retried.name)} is {state_text(retried)}")


@app.command()
def describe(
    run: RunArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show a run: what was asked for, how far it is, what happened."""
    name = str(run_name(run))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> run_service_pb2.Run:
        async with MintClient(endpoints) as client:
            return await client.runs.get(name)

    found = asyncio.run(call())
    plain = to_plain(found)
    if json_output:
        print_json(plain)
        return
    recipe = found.WhichOneof("recipe") or ""
    print_pairs(
        [
            ("run", short(found.name)),
            ("policy", short(found.policy)),
            ("state", state_text(found)),
            *_said(("error", found.error)),
            ("progress", progress_text(found)),
            ("figures", figures_text(found)),
            *_said(("published", short(found.published_revision)), ("promote", found.promote_alias)),
            ("attempts", found.num_attempts),
            *_said(
                ("priority", found.priority),
                ("failures", found.num_failures),
                ("dead letter", "yes" if found.dead_letter else ""),
                ("waits until", plain.get("not_before_time")),
            ),
            *_said(("worker", found.worker), ("created", plain.get("create_time")), ("ended", plain.get("end_time"))),
            *_said(*flatten({recipe: plain.get(recipe, {})})),
            *flatten({"metrics": plain.get("progress", {}).get("metrics", {})}),
        ]
    )
    if found.events:
        print()
        print_table(["TIME", "EVENT", "MESSAGE"], [[e.get("time"), e["kind"], e["message"]] for e in plain["events"]])


@app.command()
def plot(
    run: RunArgument,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Figure to draw; repeat it.", show_default="loss and reward_mean"),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture instead.", dir_okay=False)] = None,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw a run's figures over its steps, in the terminal or as a PNG."""
    name = str(run_name(run))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> tuple[run_service_pb2.Run, list[run_service_pb2.RunStep]]:
        async with MintClient(endpoints) as client:
            return await client.runs.get(name), [step async for step in client.runs.steps(name)]

    found, steps = asyncio.run(call())
    curves = curves_of(short(name), steps, metric)
    if png is not None:
        from mint_cli.plot_png import write_png  # loads matplotlib

        write_png(curves, png, title=f"{short(found.policy)}, {found.WhichOneof('recipe')} run {short(name)}")
    if json_output:
        print_json({"run": found.name, "png": png and str(png), "steps": [to_plain(step) for step in steps]})
    elif png is not None:
        print(f"wrote {png}")
    else:
        _draw(curves)


def _draw(curves: Sequence[Curve]) -> None:
    from mint_cli.plot_terminal import drawing  # loads plotille

    out = console()
    num_columns = min(out.width, _MAX_COLUMNS)
    print("\n\n".join(drawing(curve, num_columns=num_columns, colors=out.is_terminal) for curve in curves))


def _said(*pairs: tuple[str, object]) -> list[tuple[str, object]]:
    """The pairs that say something: a field that was not set does not."""
    return [(name, value) for name, value in pairs if value and value != "UNSPECIFIED"]
