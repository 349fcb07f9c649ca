"""Holds an installation's processes at their failpoints.

Points armed with ``stop`` (:func:`armed`) write a line to their process's log and stop the process. The conductor
reads the logs and lets everybody go on at once, but the one that a test asked for with :meth:`Conductor.hold`: an
installation under a conductor behaves as any other, only a little slower, until the test strikes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mint_core.failpoints import STOPPING
from support.log_reader import LogReader, fields_of

__all__ = ["Conductor", "Held", "armed", "conducting"]

_POLL_S = 0.005
_ANNOUNCED_S = 5.0
"""A process that is not stopped so long after it said so never will be: another thread's stop has swallowed its."""


def armed(points: Iterable[str]) -> dict[str, str]:
    """Environment for processes that are to stop at ``points``."""
    return {"MINT_FAILPOINTS": ",".join(f"{point}=stop" for point in sorted(points))}


@dataclass(frozen=True)
class Held:
    """A process that stands still at a failpoint."""

    service: str
    point: str
    pid: int

    def go_on(self) -> None:
        _signal(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        _signal(self.pid, signal.SIGKILL)


@dataclass
class _Announced:
    """A process that said it is about to stop."""

    stop: Held
    since_s: float = field(default_factory=time.monotonic)


class Conductor:
    """See the module; made by :func:`conducting`."""

    def __init__(self, logs: Path) -> None:
        self._logs_folder = logs
        self._logs: dict[str, LogReader] = {}
        self._announced: list[_Announced] = []
        self._wanted: dict[str, asyncio.Future[Held]] = {}
        self._held: list[Held] = []
        self._lock = threading.Lock()

    async def hold(self, point: str, *, timeout_s: float) -> Held:
        """The next process that stops at ``point``; it stands still until the caller says otherwise."""
        held: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        with self._lock:
            assert point not in self._wanted, f"{point} is waited for already"
            self._wanted[point] = held
        try:
            async with asyncio.timeout(timeout_s):
                self._held.append(await held)
                return self._held[-1]
        except BaseException as error:
            if held.done() and not held.cancelled():
                held.result().go_on()  # delivered while the caller gave up
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"nobody stopped at {point} within {timeout_s:g} s") from None
            raise
        finally:
            with self._lock:
                self._wanted.pop(point, None)

    def release(self) -> None:
        """Let everybody go on whom a test has left standing."""
        for held in self._held:
            if _process_state(held.pid) == "T":
                held.go_on()
        self._held.clear()

    def conduct(self, until: threading.Event) -> None:
        """Let everybody go on who is not waited for, until the event is set."""
        while not until.wait(_POLL_S):
            self._read_logs()
            self._announced = [announced for announced in self._announced if not self._settled(announced)]

    def _read_logs(self) -> None:
        for path in self._logs_folder.glob("*.log"):
            log = self._logs.setdefault(path.stem, LogReader(path))
            # Parsing every line would cost as much as all the rest.
            for fields in (fields_of(line) for line in log.new_lines() if STOPPING.encode() in line):
                if fields.get("message") == STOPPING:
                    self._announced.append(_Announced(Held(path.stem, fields["failpoint"], fields["pid"])))

    def _settled(self, announced: _Announced) -> bool:
        """Whether nothing is left to do about it."""
        state = _process_state(announced.stop.pid)
        if state != "T":
            return state in ("", "Z") or time.monotonic() - announced.since_s > _ANNOUNCED_S
        with self._lock:
            wanted = self._wanted.pop(announced.stop.point, None)
            if wanted is None:
                announced.stop.go_on()
            else:
                wanted.get_loop().call_soon_threadsafe(_deliver, wanted, announced.stop)
        return True


def _deliver(wanted: asyncio.Future[Held], stop: Held) -> None:
    if wanted.done():
        stop.go_on()
    else:
        wanted.set_result(stop)


@contextlib.contextmanager
def conducting(logs: Path) -> Iterator[Conductor]:
    """A conductor of the processes that log to ``logs``, in a thread: it goes on between tests."""
    conductor = Conductor(logs)
    done = threading.Event()
    thread = threading.Thread(target=conductor.conduct, args=(done,), name="conductor", daemon=True)
    thread.start()
    try:
        yield conductor
    finally:
        done.set()
        thread.join()


def _process_state(pid: int) -> str:
    """The letter in ``/proc/PID/stat``, or empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
