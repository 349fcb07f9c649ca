"""Runs as several commands handle them: queued with their files, watched to their end, and concluded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mint_api.v1 import common_pb2, evaluation_service_pb2, run_service_pb2
from mint_cli.failures import error_of
from mint_cli.output import print_pairs, progress_console
from mint_cli.references import short
from mint_client import MintClient
from mint_core.errors import FailedPrecondition, Unavailable
from mint_core.names import RunName

__all__ = ["conclude", "evaluation_of", "figures_text", "progress_text", "queue_run", "state_text", "watch_run"]


async def queue_run(
    client: MintClient,
    tenant: str,
    run: run_service_pb2.Run,
    *,
    files: Sequence[tuple[common_pb2.BlobRef, Path]],
    run_id: str,
    watch: bool,
) -> run_service_pb2.Run:
    """Upload ``files``, each for its part of ``run``, and queue the run; with ``watch`` wait for its end."""
    for blob, path in files:
        blob.CopyFrom(await client.blobs.upload(tenant, path))
    created = await client.runs.create(tenant, run, run_id=run_id)
    return await watch_run(client, created.name) if watch else created


async def watch_run(client: MintClient, name: str) -> run_service_pb2.Run:
    """Show the run's name, progress and events on standard error until it has ended."""
    columns = (
        TextColumn("{task.fields[state]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    run = run_service_pb2.Run(name=name)
    with Progress(*columns, console=progress_console()) as progress:
        progress.console.print(f"run {short(name)}", markup=False, soft_wrap=True)
        task = progress.add_task("", total=None, state="queued", figures="")
        async for current in client.runs.watch(name):
            for event in _new_events(current.events, run.events):
                progress.console.print(f"{event.kind}: {event.message}", markup=False, soft_wrap=True)
            progress.update(
                task,
                completed=current.progress.step,
                total=current.progress.num_steps or None,
                state=state_text(current),
                figures=figures_text(current),
            )
            run = current
    return run


def _new_events(
    events: Sequence[run_service_pb2.RunEvent], shown: Sequence[run_service_pb2.RunEvent]
) -> Sequence[run_service_pb2.RunEvent]:
    """What follows the last one shown. The record keeps the newest only: if that one has left it, all are new."""
    if shown:
        for index in range(len(events) - 1, -1, -1):
            if events[index] == shown[-1]:
                return events[index + 1 :]
    return events


def state_text(run: run_service_pb2.Run) -> str:
    return run_service_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def figures_text(run: run_service_pb2.Run) -> str:
    """The figures that say most about the last step, and how far the batch of the next one is, on a part of a line."""
    progress, metrics = run.progress, run.progress.metrics
    shown = [f"reward {metrics['reward_mean']:.3f}"] if "reward_mean" in metrics else []
    shown += [f"score {metrics['score_mean']:.3f}"] if "score_mean" in metrics else []
    shown += [f"loss {progress.loss:.4f}"] if progress.loss else []
    shown += [f"held-out {progress.eval_loss:.4f}"] if progress.eval_loss else []
    shown += [f"{progress.tokens_per_s:.0f} tokens/s"] if progress.tokens_per_s else []
    if "num_sampled" in metrics:
        num_samples = run.grpo.num_prompts_per_step * run.grpo.group_size
        shown += [f"sampled {metrics['num_sampled']:.0f} of {num_samples}"]
    return " ".join(shown)


def progress_text(run: run_service_pb2.Run) -> str:
    """Steps, or of an evaluation examples, that are done."""
    return f"{run.progress.step} of {run.progress.num_steps}" if run.progress.num_steps else ""


async def evaluation_of(client: MintClient, run: run_service_pb2.Run) -> evaluation_service_pb2.Evaluation | None:
    """What an evaluation run recorded; None for other runs, and for one that did not succeed."""
    if run.WhichOneof("recipe") != "evaluation" or run.state != run_service_pb2.RUN_STATE_SUCCEEDED:
        return None
    return await client.evaluations.get(f"{run.policy}/evaluations/{RunName.parse(run.name).run}")


def conclude(
    run: run_service_pb2.Run, evaluation: evaluation_service_pb2.Evaluation | None, *, json_output: bool
) -> None:
    """Say how a watched run ended; with ``json_output`` nothing, a document has said it.

    Anything but success is an error of the command: the run's own, :class:`FailedPrecondition` for a cancelled one,
    :class:`Unavailable` where the end was not seen.
    """
    if run.state == run_service_pb2.RUN_STATE_CANCELLED:
        raise FailedPrecondition(f"{run.name} was cancelled after step {run.progress.step}")
    if run.state == run_service_pb2.RUN_STATE_FAILED:
        raise error_of(run.error)
    if run.state != run_service_pb2.RUN_STATE_SUCCEEDED:
        raise Unavailable(f"the watch of {run.name} ended before the run did")
    if json_output:
        return
    if evaluation is not None:
        _print_evaluation(evaluation)
        return
    published = f", published {short(run.published_revision)}" if run.published_revision else ""
    promoted = f", promoted {run.promote_alias}" if run.promote_alias and run.published_revision else ""
    print(f"succeeded after {run.progress.step} steps{published}{promoted}")


def _print_evaluation(evaluation: evaluation_service_pb2.Evaluation) -> None:
    revision = f"{short(evaluation.revision)} ({evaluation.revision_digest})" if evaluation.revision else "the base"
    print_pairs(
        [
            ("evaluation", evaluation.name),
            ("revision", revision),
            ("scorer", evaluation.scorer),
            ("data", evaluation.data_digest),
            ("examples", evaluation.num_examples),
            *sorted(evaluation.metrics.items()),
        ]
    )
