"""Named places where a test can make the process die, fail or wait.

A module declares a point once, at import, and passes it at one place::

    UPLOADED = failpoints.declare("exporter.uploaded", "the blob's bytes are stored, not yet verified")
    ...
    await UPLOADED.reached()

Armed by the environment before the process starts, e.g.
``MINT_FAILPOINTS="exporter.uploaded=kill,runs.saved=sleep:2000@3"``: actions are ``kill`` (SIGKILL to
itself), ``stop`` (SIGSTOP to itself, after a line in the log that names the point and the process; SIGCONT lets it go
on), ``error`` (raises :class:`mint_core.errors.Unavailable`) and ``sleep:MILLISECONDS``; ``@N`` acts at the N-th
passing only. Unarmed points cost one attribute test.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mint_core import log
from mint_core.errors import Unavailable

__all__ = ["STOPPING", "Failpoint", "arm_from_environment", "declare", "declared"]

STOPPING = "stopping at a failpoint"
"""Message of the log line that a ``stop`` writes; its fields are ``failpoint`` and ``pid``."""

_log = log.get_logger(__name__)

_ARMED = re.compile(r"(?P<name>[\w.]+)=(?P<action>kill|stop|error|sleep:(?P<millis>\d+))(@(?P<nth>\d+))?")


@dataclass(slots=True)
class Failpoint:
    """One place in the life of a revision."""

    name: str
    meaning: str
    _action: str | None = field(default=None, init=False)
    _sleep_s: float = field(default=0.0, init=False)
    _nth: int = field(default=0, init=False)
    _num_passed: int = field(default=0, init=False)

    def __call__(self) -> None:
        """Pass the point from synchronous code."""
        if self._action is not None:
            time.sleep(self._act())

    async def reached(self) -> None:
        """Pass the point from a coroutine; a sleep lets the loop go on."""
        if self._action is not None:
            await asyncio.sleep(self._act())

    def arm(self, action: str, *, sleep_s: float = 0.0, nth: int = 0) -> None:
        self._action, self._sleep_s, self._nth, self._num_passed = action, sleep_s, nth, 0

    def disarm(self) -> None:
        self._action = None

    def _act(self) -> float:
        self._num_passed += 1
        if self._nth and self._num_passed != self._nth:
            return 0.0
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._action == "stop":
            _log.warning(STOPPING, extra={"fields": {"failpoint": self.name, "pid": os.getpid()}})
            # To this thread, not to the process: then no other thread takes the signal while this one runs on.
            signal.raise_signal(signal.SIGSTOP)
        if self._action == "error":
            raise Unavailable(f"failpoint {self.name} is armed with 'error'; disarm it to go on")
        return self._sleep_s


_registry: dict[str, Failpoint] = {}


def declare(name: str, meaning: str) -> Failpoint:
    """Register a point; a name is declared once in the whole program."""
    if name in _registry:
        raise ValueError(f"failpoint {name!r} is declared twice: choose another name")
    point = _registry[name] = Failpoint(name, meaning)
    _arm(point, os.environ)
    return point


def declared() -> list[Failpoint]:
    """Every point of the modules imported so far, by name."""
    return [_registry[name] for name in sorted(_registry)]


def arm_from_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Arm the declared points anew, for tests in one process."""
    for point in _registry.values():
        point.disarm()
        _arm(point, environ)


def _arm(point: Failpoint, environ: Mapping[str, str]) -> None:
    for text in filter(None, environ.get("MINT_FAILPOINTS", "").split(",")):
        match = _ARMED.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"MINT_FAILPOINTS has {text!r}: expected NAME=kill|stop|error|sleep:MILLISECONDS[@N]")
        if match["name"] == point.name:
            action = match["action"].partition(":")[0]
            point.arm(action, sleep_s=int(match["millis"] or 0) / 1000, nth=int(match["nth"] or 0))
