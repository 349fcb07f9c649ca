"""Runs an installation's processes, restarts what dies, stops everything in order.

One supervisor per state directory, which it locks. Each child leads a process group of its own, so that what it
started goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import psutil

from mint_api.v1 import base_model_service_pb2
from mint_cli.health import is_healthy
from mint_cli.installation import Installation, ProcessSpec
from mint_cli.state import RunningService, Snapshot, StateDir
from mint_client import Endpoints, MintClient
from mint_core import log
from mint_core.clock import Deadline
from mint_core.errors import DeadlineExceeded, FailedPrecondition, MintError

__all__ = ["Supervisor", "stop_group", "stop_leftovers"]

_log = log.get_logger(__name__)

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_STEADY_S = 60.0
"""A process that lived this long before it died is restarted at once."""
_POLL_S = 0.1
_MAX_DEATHS_AT_START = 4
"""Deaths before a service was healthy once: a wrong setting does not heal, a port that was just taken may."""


class _Child:
    """One process and its next incarnations."""

    def __init__(self, spec: ProcessSpec, state: StateDir) -> None:
        self.spec = spec
        self.num_restarts = 0
        self.pid: int | None = None
        self.pid_started = 0.0
        self._state = state
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None

    async def keep_running(self, changed: asyncio.Event) -> None:
        """Start, and start again after every death, until :meth:`stop`."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._is_stopping():
            started_s = time.monotonic()
            status = await self._run_once(changed)
            if self._is_stopping():
                return
            lived_s = time.monotonic() - started_s
            if lived_s >= _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            self.num_restarts += 1
            fields = {"service": self.spec.name, "status": status, "lived_s": round(lived_s, 1), "pause_s": backoff_s}
            _log.warning("died, will be restarted", extra={"fields": fields})
            changed.set()
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)

    def _is_stopping(self) -> bool:
        return self._stopping

    async def _run_once(self, changed: asyncio.Event) -> int:
        with (self._state.logs / f"{self.spec.name}.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._state.path,
                env={**os.environ, **self.spec.environ},
                start_new_session=True,
            )
        pid = self._process.pid
        with contextlib.suppress(psutil.Error):
            self.pid, self.pid_started = pid, psutil.Process(pid).create_time()
        changed.set()
        try:
            return await self._process.wait()
        finally:
            # What it started must not outlive it: the next incarnation wants its ports, files and memory.
            _signal_group(pid, signal.SIGKILL)
            self.pid, self.pid_started = None, 0.0
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for pattern in self.spec.leftovers:
            for path in Path("/").glob(pattern.lstrip("/")):
                path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the process's own time limit."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self.spec.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            _log.warning("killed, it did not stop", extra={"fields": {"service": self.spec.name}})
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()

    def described(self) -> RunningService:
        spec = self.spec
        return RunningService(
            name=spec.name,
            address=spec.address,
            runtime_address=spec.runtime_address,
            metrics_address=spec.metrics_address,
            health=spec.health,
            pid=self.pid,
            pid_started=self.pid_started,
            num_restarts=self.num_restarts,
        )


class Supervisor:
    """Runs one installation until :meth:`stop` is called."""

    def __init__(self, state: StateDir, installation: Installation, *, start_timeout_s: float) -> None:
        self._state = state
        self._installation = installation
        self._start_timeout_s = start_timeout_s
        self._stages = [[_Child(spec, state) for spec in stage] for stage in installation.stages]
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._phase = "starting"
        self._error = ""

    def stop(self) -> None:
        """Ask :meth:`run` to end."""
        self._stop.set()

    async def run(self) -> None:
        """Start all stages, keep them running until :meth:`stop`, stop them in reverse order.

        Raises :class:`DeadlineExceeded` when something did not become healthy in time, :class:`FailedPrecondition` when
        it kept ending; all is stopped then.
        """
        keepers: list[asyncio.Task[None]] = []
        writer = asyncio.create_task(self._write_snapshots())
        stopped = asyncio.create_task(self._stop.wait())
        starting = asyncio.create_task(self._start(keepers))
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._set_phase("ready")
                await stopped
        except MintError as error:
            self._error = f"{error.reason}: {error.message}"
            raise
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            self._set_phase("stopping")
            for stage in reversed(self._stages):
                await asyncio.gather(*(child.stop() for child in stage))
            for task in (*keepers, stopped, writer):
                task.cancel()
            await asyncio.gather(*keepers, stopped, writer, return_exceptions=True)
            self._leave()

    async def _start(self, keepers: list[asyncio.Task[None]]) -> None:
        deadline = Deadline.after(self._start_timeout_s)
        for stage in self._stages:
            keepers.extend(asyncio.create_task(child.keep_running(self._changed)) for child in stage)
            await asyncio.gather(*(self._until_healthy(child, deadline) for child in stage))
            for child in stage:
                if child.spec.name == "catalog":
                    await self._register_base_model(child.spec.address)

    async def _until_healthy(self, child: _Child, deadline: Deadline) -> None:
        path = self._state.logs / f"{child.spec.name}.log"
        while not await is_healthy(child.spec.health):
            if child.num_restarts >= _MAX_DEATHS_AT_START:
                raise FailedPrecondition(
                    f"{child.spec.name} ended {child.num_restarts} times before it was healthy; mend what its log "
                    f"{path} ends with: {last_line(path)}"
                )
            if deadline.remaining_s <= 0:
                raise DeadlineExceeded(
                    f"{child.spec.name} did not become healthy within {self._start_timeout_s:g} s; its log {path} ends "
                    f"with: {last_line(path)}"
                )
            await asyncio.sleep(_POLL_S)
        _log.info("healthy", extra={"fields": {"service": child.spec.name, "address": child.spec.address}})

    async def _register_base_model(self, catalog_address: str) -> None:
        """Trainer, engine and runs refuse a base that the catalog does not know by name and digest."""
        base = self._installation.base
        async with MintClient(Endpoints(catalog=catalog_address)) as client:
            await client.base_models.register(
                base_model_service_pb2.BaseModel(
                    name=str(base.name),
                    digest=base.digest.digest,
                    size_bytes=base.digest.size_bytes,
                    architecture=base.architecture,
                )
            )

    # What others are told

    async def _write_snapshots(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._write_snapshot()

    def _set_phase(self, phase: str) -> None:
        self._phase = phase
        self._write_snapshot()

    def _write_snapshot(self) -> None:
        self._state.write_snapshot(
            Snapshot(
                state=self._phase,
                error=self._error,
                supervisor_pid=os.getpid(),
                base_model=str(self._installation.base.name),
                services=tuple(child.described() for stage in self._stages for child in stage),
            )
        )

    def _leave(self) -> None:
        """Leave nothing, or the reason why it failed for whoever waits for the start."""
        if self._error:
            self._state.write_snapshot(
                Snapshot("failed", self._error, os.getpid(), str(self._installation.base.name), ())
            )
        else:
            self._state.remove_snapshot()


def last_line(path: Path) -> str:
    """The last line of a log, shortened; for error messages."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "(no log)"
    return lines[-1][-500:] if lines else "(empty)"


def stop_leftovers(snapshot: Snapshot) -> int:
    """Kill the processes of a supervisor that was killed itself; answers how many there were."""
    return sum(stop_group(service.pid, service.pid_started) for service in reversed(snapshot.services))


def stop_group(pid: int | None, started: float, *, timeout_s: float = 20.0) -> bool:
    """Stop a process and all of its group, if the process with this id still is the one that started then."""
    if not pid:
        return False
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1.0:
            return False
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout_s)
    except psutil.Error:
        return False
    _signal_group(pid, signal.SIGKILL)
    return True


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
