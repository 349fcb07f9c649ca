"""Progress, events and figures of steps on their way to the catalog, without training waiting for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from google.protobuf import timestamp_pb2

from mint_api.v1 import run_service_pb2
from mint_core import clock, log
from mint_core.errors import LeaseLost, MintError

__all__ = ["Reporter"]

_log = log.get_logger(__name__)

_MAX_STEPS = 100

Send = Callable[
    [run_service_pb2.RunProgress | None, Sequence[run_service_pb2.RunEvent], Sequence[run_service_pb2.RunStep]],
    Awaitable[bool],
]
"""Writes progress, events and at most 100 steps; answers whether a cancel was asked for."""


class Reporter:
    """Sends the newest progress, at most every ``interval_s``; what is overtaken is never sent. Events and the figures
    of steps all are."""

    def __init__(self, send: Send, *, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._progress: run_service_pb2.RunProgress | None = None
        self._events: list[run_service_pb2.RunEvent] = []
        self._steps: dict[int, run_service_pb2.RunStep] = {}
        self._wanted = asyncio.Event()
        self._sending = asyncio.Lock()
        self.cancel_requested = False
        """Whether a cancel was asked for, as of the last answer."""

    def progress(self, progress: run_service_pb2.RunProgress) -> None:
        """Note progress; returns at once."""
        now = run_service_pb2.RunProgress()
        now.CopyFrom(progress)
        now.update_time.CopyFrom(_now())
        self._progress = now
        self._wanted.set()

    def event(self, kind: str, message: str) -> None:
        """Note an event; returns at once."""
        self._events.append(run_service_pb2.RunEvent(time=_now(), kind=kind, message=message))
        _log.info("event", extra={"fields": {"kind": kind, "event": message}})
        self._wanted.set()

    def step(self, step: run_service_pb2.RunStep) -> None:
        """Note the figures of a step, in place of what was noted for it before; returns at once."""
        noted = run_service_pb2.RunStep()
        noted.CopyFrom(step)
        self._steps[step.step] = noted
        self._wanted.set()

    async def run(self) -> None:
        """Send until cancelled. Ends only by raising :class:`LeaseLost`."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await self.flush()
            await asyncio.sleep(self._interval_s)

    async def flush(self) -> None:
        """Send what has not been sent. Raises :class:`LeaseLost`; any other failure is tried again with the next."""
        async with self._sending:
            progress, events = self._progress, list(self._events)
            steps = list(self._steps.values())[:_MAX_STEPS]
            if progress is None and not events and not steps:
                return
            try:
                self.cancel_requested = await self._send(progress, events, steps) or self.cancel_requested
            except LeaseLost:
                raise
            except MintError as error:
                _log.warning("progress not written", extra={"fields": {"error": str(error)}})
                self._wanted.set()
                return
            del self._events[: len(events)]
            for step in steps:
                if self._steps.get(step.step) is step:
                    del self._steps[step.step]
            if self._steps:
                self._wanted.set()
            if self._progress is progress:
                self._progress = None


def _now() -> timestamp_pb2.Timestamp:
    now = timestamp_pb2.Timestamp()
    now.FromNanoseconds(round(clock.wall_s() * 1e9))
    return now
