"""`mint up`, `mint down`, `mint status`: MinT on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from enum import StrEnum
from typing import Annotated, Any

import psutil
import typer

from mint_cli.endpoints import state_dir
from mint_cli.failures import error_of
from mint_cli.health import is_healthy
from mint_cli.installation import UpOptions, plan_installation
from mint_cli.model import DEFAULT_MODEL, LocalModel, fetch_model
from mint_cli.options import JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, progress_console
from mint_cli.state import Snapshot, StateDir
from mint_cli.supervisor import Supervisor, last_line, stop_group, stop_leftovers
from mint_core import log
from mint_core.errors import DeadlineExceeded, FailedPrecondition

__all__ = ["down", "status", "up"]

_POLL_S = 0.1
_STOP_TIMEOUT_S = 180.0


class Dtype(StrEnum):
    """Compute types that trainer and engine both have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def up(
    base: Annotated[str, typer.Option(help="Base model: a name, a local folder or a hub id.")] = DEFAULT_MODEL,
    dtype: Annotated[Dtype, typer.Option(help="Compute type of the base.")] = Dtype.FLOAT32,
    max_lora_rank: Annotated[int, typer.Option(min=1, max=512, help="Highest rank that the engine serves.")] = 16,
    replicas: Annotated[int, typer.Option(min=1, max=8, help="Engines, each with its own loader.")] = 1,
    metrics: Annotated[bool, typer.Option("--metrics", help="An endpoint for Prometheus in each service.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, until Ctrl-C stops everything.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long the start may take, in seconds.")] = 600.0,
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Start etcd, the object store and MinT's services on free loopback ports."""
    state = state_dir(state_path)
    state.create()
    if state.is_supervised():
        if foreground:
            raise FailedPrecondition(f"MinT is already up in {state.path}: `mint down` stops it")
        _report(_wait_ready(state, None, timeout_s), state, json_output)
        return
    progress = progress_console()
    model = fetch_model(base, notify=lambda text: progress.print(text))
    options = UpOptions(dtype.value, max_lora_rank, replicas, metrics)
    if foreground:
        _supervise(state, model, options, timeout_s)
        return
    process = _detach(state, model, options, timeout_s)
    _report(_wait_ready(state, process, timeout_s), state, json_output)


def down(state_path: StateDirOption = None, json_output: JsonOption = False) -> None:
    """Stop everything that `mint up` started; data stay for the next `mint up`."""
    state = state_dir(state_path)
    snapshot = state.snapshot()
    num_stopped = 0
    if snapshot is not None:
        num_stopped = sum(service.pid != 0 for service in snapshot.services)
        if state.is_supervised():
            _stop_supervisor(state, snapshot)
        stop_leftovers(state.snapshot() or snapshot)
        state.remove_snapshot()
    if json_output:
        print_json({"num_stopped": num_stopped})
    elif num_stopped:
        print(f"stopped {num_stopped} processes; the data stay in {state.path}")
    else:
        print(f"MinT is not up in {state.path}")


def status(state_path: StateDirOption = None, json_output: JsonOption = False) -> None:
    """Show the processes, where they listen and whether they are healthy."""
    state = state_dir(state_path)
    snapshot = state.snapshot()
    services = [] if snapshot is None else asyncio.run(_described(snapshot))
    if json_output:
        print_json({"services": services})
    elif services:
        for service in services:
            service["healthy"] = "yes" if service["healthy"] else "no"
        columns = {"name": "NAME", "address": "ADDRESS", "healthy": "HEALTHY", "pid": "PID", "num_restarts": "RESTARTS"}
        if any(service["metrics_address"] for service in services):
            columns["metrics_address"] = "METRICS"
        print_table(list(columns.values()), [[service[key] for key in columns] for service in services])
    else:
        print(f"MinT is not up in {state.path}")


async def _described(snapshot: Snapshot) -> list[dict[str, Any]]:
    healthy = await asyncio.gather(*(is_healthy(service.health) for service in snapshot.services))
    return [
        {
            "name": service.name,
            "address": service.address,
            "healthy": well,
            "pid": service.pid,
            "num_restarts": service.num_restarts,
            "metrics_address": service.metrics_address,
        }
        for service, well in zip(snapshot.services, healthy, strict=True)
    ]


def _report(snapshot: Snapshot, state: StateDir, json_output: bool) -> None:
    if json_output:
        print_json({"services": asyncio.run(_described(snapshot))})
    else:
        print_table(["NAME", "ADDRESS"], [[service.name, service.address] for service in snapshot.services])
        print(f"MinT is up; settings, logs and data are in {state.path}; `mint down` stops it")


def _supervise(state: StateDir, model: LocalModel, options: UpOptions, timeout_s: float) -> None:
    """Be the supervisor until SIGTERM or SIGINT."""
    with state.locked():
        leftover = state.snapshot()
        if leftover is not None:
            stop_leftovers(leftover)
            state.remove_snapshot()
        installation = plan_installation(state, model, options)
        state.write_settings(installation.settings_text)
        for warning in installation.warnings:
            progress_console().print(f"warning: {warning}")
        log.configure("cli")
        supervisor = Supervisor(state, installation, start_timeout_s=timeout_s)

        async def run() -> None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, supervisor.stop)
            await supervisor.run()

        asyncio.run(run())


def _detach(state: StateDir, model: LocalModel, options: UpOptions, timeout_s: float) -> subprocess.Popen[bytes]:
    """Start a supervisor that outlives this process and its terminal."""
    leftover = state.snapshot()
    if leftover is not None:
        stop_leftovers(leftover)
        state.remove_snapshot()
    with (state.logs / "supervisor.log").open("ab") as output:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "mint_cli", "up", "--foreground"),
                *("--state-dir", str(state.path)),
                # Of a cached model its name, so that the supervisor checks it against its record again.
                *("--base", str(model.folder)),
                *("--dtype", options.dtype),
                *("--max-lora-rank", str(options.max_lora_rank)),
                *("--replicas", str(options.replicas)),
                *(("--metrics",) if options.metrics else ()),
                *("--timeout-s", str(timeout_s)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=state.path,
            start_new_session=True,
        )


def _wait_ready(state: StateDir, supervisor: subprocess.Popen[bytes] | None, timeout_s: float) -> Snapshot:
    """Wait until the start has succeeded or failed; says on standard error what is being waited for."""
    give_up_s = time.monotonic() + timeout_s + 30.0
    with progress_console().status("starting") as shown:
        while time.monotonic() < give_up_s:
            snapshot = state.snapshot()
            if snapshot is not None and snapshot.state == "ready":
                return snapshot
            if snapshot is not None and snapshot.state == "failed":
                state.remove_snapshot()
                raise error_of(snapshot.error)
            gone = not state.is_supervised() if supervisor is None else supervisor.poll() is not None
            if gone:
                raise error_of(last_line(state.logs / "supervisor.log").removeprefix("error: "))
            if snapshot is not None:
                waiting = [service.name for service in snapshot.services if service.pid]
                shown.update(f"starting: {', '.join(waiting)}")
            time.sleep(_POLL_S)
    raise DeadlineExceeded(f"MinT did not start within {timeout_s:g} s; its logs are in {state.logs}")


def _stop_supervisor(state: StateDir, snapshot: Snapshot) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(snapshot.supervisor_pid, signal.SIGTERM)
    give_up_s = time.monotonic() + _STOP_TIMEOUT_S
    while state.is_supervised():
        if time.monotonic() > give_up_s:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(snapshot.supervisor_pid)
                stop_group(process.pid, process.create_time(), timeout_s=0)
            break
        time.sleep(_POLL_S)
