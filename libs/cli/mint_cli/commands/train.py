"""`mint train`: queue training runs and watch them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mint_api.v1 import run_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.failures import error_of
from mint_cli.options import CatalogOption, ExporterOption, JsonOption, StateDirOption
from mint_cli.output import print_json, progress_console, to_plain
from mint_cli.references import policy_name, short
from mint_client import MintClient, run_has_ended
from mint_core.errors import FailedPrecondition, Unavailable

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Training runs.")


@app.callback()
def _group() -> None:
    """Training runs."""


@app.command()
def sft(
    policy: Annotated[str, typer.Argument(help="tenant/policy")],
    data: Annotated[
        Path, typer.Option(help="JSONL of {prompt, completion} or {messages: [{role, content}, …]}.", dir_okay=False)
    ],
    eval_data: Annotated[Path | None, typer.Option(help="Held-out JSONL.", dir_okay=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one step.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest example in tokens.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak; 0 means the recipe's default.")] = 0.0,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 0,
    weight_decay: Annotated[float, typer.Option(min=0, help="Decoupled weight decay.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Gradient clipping; 0 means none.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of examples.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 20,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end only.")] = 0,
    continue_: Annotated[
        bool, typer.Option("--continue", help="Start from the policy's latest training state.")
    ] = False,
    publish: Annotated[bool, typer.Option(help="Publish the final state as a revision.")] = True,
    promote: Annotated[str, typer.Option(help="Alias to point at the published revision.")] = "",
    run_id: Annotated[str, typer.Option(help="Id of the run.", show_default="chosen")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end and show progress.")] = False,
    catalog: CatalogOption = "",
    exporter: ExporterOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Fine-tune a policy on examples; the loss is on completions only."""
    name = policy_name(policy)
    endpoints = find_endpoints(
        state_dir(state_path), catalog=catalog, exporter=exporter, needed=("catalog", "exporter")
    )
    recipe = run_service_pb2.SftRecipe(
        num_steps=steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        optimizer=run_service_pb2.OptimizerConfig(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            num_warmup_steps=warmup_steps,
        ),
        seed=seed,
        save_every_steps=save_every,
        eval_every_steps=eval_every,
    )

    async def call() -> run_service_pb2.Run:
        async with MintClient(endpoints) as client:
            recipe.train_data.CopyFrom(await client.blobs.upload(name.tenant, data))
            if eval_data is not None:
                recipe.eval_data.CopyFrom(await client.blobs.upload(name.tenant, eval_data))
            run = run_service_pb2.Run(
                policy=str(name), sft=recipe, continue_from_latest=continue_, publish=publish, promote_alias=promote
            )
            created = await client.runs.create(name.tenant, run, run_id=run_id)
            return await _watch(client, created) if watch else created

    run = asyncio.run(call())
    if json_output:
        print_json(to_plain(run))
    elif not run_has_ended(run):
        print(f"queued {run.name}")
    if watch:
        _conclude(run, json_output)


async def _watch(client: MintClient, run: run_service_pb2.Run) -> run_service_pb2.Run:
    columns = (
        TextColumn("{task.fields[state]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    num_events = 0
    with Progress(*columns, console=progress_console()) as progress:
        task = progress.add_task("", total=run.sft.num_steps, state="queued", figures="")
        async for current in client.runs.watch(run.name):
            figures = current.progress
            shown = f"loss {figures.loss:.4f}" if figures.step else ""
            shown += f" held-out {figures.eval_loss:.4f}" if figures.eval_loss else ""
            shown += f" {figures.tokens_per_s:.0f} tokens/s" if figures.tokens_per_s else ""
            state = run_service_pb2.RunState.Name(current.state).removeprefix("RUN_STATE_").lower()
            progress.update(task, completed=figures.step, state=state, figures=shown)
            # The record keeps the newest events only, so what is new is counted from its end.
            for event in list(current.events)[min(num_events, len(current.events)) :]:
                progress.console.print(f"{event.kind}: {event.message}", markup=False)
            num_events = len(current.events)
            run = current
    return run


def _conclude(run: run_service_pb2.Run, json_output: bool) -> None:
    """Say how it ended; anything but success is an error of the command."""
    if run.state == run_service_pb2.RUN_STATE_SUCCEEDED:
        if not json_output:
            published = f", published {short(run.published_revision)}" if run.published_revision else ""
            promoted = f", promoted {run.promote_alias}" if run.promote_alias and run.published_revision else ""
            print(f"succeeded after {run.progress.step} steps{published}{promoted}")
        return
    if run.state == run_service_pb2.RUN_STATE_CANCELLED:
        raise FailedPrecondition(f"{run.name} was cancelled after step {run.progress.step}")
    if run.state != run_service_pb2.RUN_STATE_FAILED:
        raise Unavailable(f"the watch of {run.name} ended before the run did")
    raise error_of(run.error)
