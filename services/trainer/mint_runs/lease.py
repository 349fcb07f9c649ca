"""Holding a lease: renew it in time, and stop in time when that does not work.

The catalog counts the time to live from when it handled a renewal, which is never before we sent it. So the holder
counts from the moment of sending, on ``CLOCK_BOOTTIME``, which goes on while the machine sleeps, and stops a margin
earlier: when the lease ends at the catalog, the holder has already stopped. Where even that fails (a stopped process
cannot look at a clock), the catalog refuses the fence.

A lease can also be lost earlier than that: somebody took it away. The catalog tells within a moment whoever watches it;
the watch only ever ends work sooner, it never lengthens it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from mint_core import clock, log
from mint_core.errors import LeaseLost, MintError

__all__ = ["HeldLease"]

_log = log.get_logger(__name__)

_RENEWALS_PER_TTL = 3
_MIN_RETRY_S = 0.2
_WATCH_AGAIN_S = 1.0


class HeldLease:
    """A lease this process holds.

    ``renew`` sends one renewal that gets a timeout in seconds; ``watch`` opens a stream that raises
    :class:`LeaseLost` when the lease is; ``acquired_at_s`` is CLOCK_BOOTTIME of when the lease was asked for.
    """

    def __init__(
        self,
        resource: str,
        renew: Callable[[float], Awaitable[object]],
        *,
        ttl_s: float,
        margin_s: float,
        acquired_at_s: float,
        watch: Callable[[], AsyncGenerator[Any, None]] | None = None,
    ) -> None:
        self._resource = resource
        self._renew = renew
        self._watch = watch
        self._ttl_s = ttl_s
        self._margin_s = margin_s
        self._stop_at_s = acquired_at_s + ttl_s - margin_s
        self._lost = ""

    @property
    def remaining_s(self) -> float:
        """Seconds in which work under this lease may still be done; never negative."""
        return 0.0 if self._lost else max(0.0, self._stop_at_s - clock.boottime_s())

    def check(self) -> None:
        """Raise :class:`LeaseLost` unless the lease is held for sure; call this before every write."""
        if self._lost:
            raise LeaseLost(self._lost, metadata={"resource": self._resource})
        if self._stop_at_s <= clock.boottime_s():
            self.lose(f"the lease of {self._resource} was not renewed in time; this worker stops")
            raise LeaseLost(self._lost, metadata={"resource": self._resource})

    def lose(self, reason: str) -> None:
        """Note that the lease is gone; every later :meth:`check` raises."""
        self._lost = self._lost or reason

    async def keep(self) -> None:
        """Renew and watch until cancelled. Ends only by raising :class:`LeaseLost`."""
        tasks = [asyncio.ensure_future(each) for each in (self._keep_renewing(), self._keep_watching())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_watching(self) -> None:
        if self._watch is None:
            await asyncio.Event().wait()
            return
        while True:
            try:
                async with contextlib.aclosing(self._watch()) as told:
                    async for _ in told:
                        pass
            except LeaseLost as error:
                self.lose(error.message)
                raise
            except MintError as error:
                _log.info("lease not watched", extra={"fields": {"resource": self._resource, "error": str(error)}})
            await asyncio.sleep(_WATCH_AGAIN_S)

    async def _keep_renewing(self) -> None:
        pause_s = self._ttl_s / _RENEWALS_PER_TTL
        while True:
            await asyncio.sleep(min(pause_s, self.remaining_s))
            self.check()
            sent_at_s = clock.boottime_s()
            try:
                await self._renew(self.remaining_s)
            except LeaseLost as error:
                self.lose(error.message)
                raise
            except MintError as error:
                # Whatever else went wrong may pass; the clock decides when it is too late.
                _log.warning(
                    "lease not renewed",
                    extra={"fields": {"resource": self._resource, "error": str(error), "left_s": self.remaining_s}},
                )
                pause_s = max(_MIN_RETRY_S, min(1.0, self._ttl_s / 10))
                continue
            self._stop_at_s = sent_at_s + self._ttl_s - self._margin_s
            pause_s = self._ttl_s / _RENEWALS_PER_TTL
