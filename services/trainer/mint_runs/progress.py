"""Progress, events and figures of steps on their way to the catalog, without training waiting for them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence

from google.protobuf import timestamp_pb2

from mint_api.v1 import run_service_pb2
from mint_core import clock, log
from mint_core.clock import Deadline
from mint_core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    LeaseLost,
    MintError,
    ResourceExhausted,
    Unavailable,
)
from mint_runs.patience import patiently

__all__ = ["Reporter"]

_log = log.get_logger(__name__)

_MAX_PARTS = 100

Send = Callable[
    [run_service_pb2.RunProgress | None, Sequence[run_service_pb2.RunEvent], Sequence[run_service_pb2.RunStep]],
    Awaitable[bool],
]
"""Writes progress, events and at most 100 steps; answers whether a cancel was asked for."""

_Part = run_service_pb2.RunProgress | run_service_pb2.RunEvent | run_service_pb2.RunStep


class Reporter:
    """Sends the newest progress, at most every ``interval_s``; what is overtaken is never sent. Events and the figures
    of steps all are. The catalog takes finite figures only, so the others are left out."""

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
        _keep_finite(now, ("loss", "eval_loss", "tokens_per_s"), now.metrics)
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
        _keep_finite(noted, ("loss",), noted.metrics)
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
        try:
            await self._send_waiting(self._send)
        except LeaseLost:
            raise
        except MintError as error:
            _log.warning("progress not written", extra={"fields": {"error": str(error)}})
            self._wanted.set()

    async def deliver(self, *, patience_s: float) -> None:
        """Send what has not been sent before the run ends or a state is saved, after which no attempt would say it
        again; a catalog that is away is waited for.

        Raises :class:`LeaseLost`, and what the catalog keeps answering when patience is over.
        """
        deadline = Deadline.after(patience_s)

        async def send(
            progress: run_service_pb2.RunProgress | None,
            events: Sequence[run_service_pb2.RunEvent],
            steps: Sequence[run_service_pb2.RunStep],
        ) -> bool:
            return await patiently(
                "catalog", lambda: self._send(progress, events, steps), patience_s=deadline.remaining_s
            )

        try:
            await self._send_waiting(send)
        except (LeaseLost, Unavailable, DeadlineExceeded, ResourceExhausted):
            raise
        except MintError as error:
            # Waiting does not change it, and for figures alone no run is done again.
            _log.error("progress not written", extra={"fields": {"error": str(error)}})

    async def _send_waiting(self, send: Send) -> None:
        """What waits now, in as many reports as it takes; what comes meanwhile waits for the next time."""
        async with self._sending:
            parts: list[_Part] = [*self._events, *self._steps.values()]
            if self._progress is not None:
                parts.insert(0, self._progress)
            for start in range(0, len(parts), _MAX_PARTS):
                await self._report(parts[start : start + _MAX_PARTS], send)

    async def _report(self, parts: Sequence[_Part], send: Send) -> None:
        """One report. The catalog refuses it whole, so a refused one is cut until what is bad is alone; that is
        dropped."""
        progress = next((part for part in parts if isinstance(part, run_service_pb2.RunProgress)), None)
        events = [part for part in parts if isinstance(part, run_service_pb2.RunEvent)]
        steps = [part for part in parts if isinstance(part, run_service_pb2.RunStep)]
        try:
            self.cancel_requested = await send(progress, events, steps) or self.cancel_requested
        except InvalidArgument as error:
            if len(parts) > 1:
                middle = len(parts) // 2
                await self._report(parts[:middle], send)
                await self._report(parts[middle:], send)
                return
            _log.error("report refused and dropped", extra={"fields": {"error": str(error), "report": str(parts[0])}})
        # In the order in which they wait.
        del self._events[: len(events)]
        for step in steps:
            if self._steps.get(step.step) is step:
                del self._steps[step.step]
        if self._progress is progress:
            self._progress = None


def _keep_finite(
    figures: run_service_pb2.RunProgress | run_service_pb2.RunStep,
    names: Sequence[str],
    metrics: MutableMapping[str, float],
) -> None:
    for name in names:
        if not math.isfinite(getattr(figures, name)):
            figures.ClearField(name)  # type: ignore[arg-type]
    for name in [name for name, value in metrics.items() if not math.isfinite(value)]:
        del metrics[name]


def _now() -> timestamp_pb2.Timestamp:
    now = timestamp_pb2.Timestamp()
    now.FromNanoseconds(round(clock.wall_s() * 1e9))
    return now
