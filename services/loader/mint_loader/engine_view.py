"""Looking at the engine once for many: callers at one time share a question, and the last answer is kept."""

from __future__ import annotations

import asyncio

from mint_core import calls, clock
from mint_core.errors import MintError, Unavailable
from mint_loader.model import Engine, Resident

__all__ = ["EngineView"]


class EngineView:
    """What the engine holds. At most one question is under way, and one waits behind it."""

    def __init__(self, engine: Engine, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._asking: asyncio.Task[Resident] | None = None
        self._next: asyncio.Task[Resident] | None = None
        self._last: Resident | None = None
        """None if the engine did not answer the last time."""
        self._last_asked_at_s = 0.0

    def lately(self, within_s: float) -> Resident | None:
        """What it held at most ``within_s`` ago, if that is known without asking."""
        return self._last if clock.monotonic_s() - self._last_asked_at_s <= within_s else None

    async def resident(self) -> Resident:
        """What it holds now. Raises what the engine raises. A question that was asked before this call is not good
        enough: the engine may have loaded or evicted since.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._ask(self._asking))
            self._next.add_done_callback(self._ended)
        task = self._next
        await asyncio.wait([task])
        if task.cancelled():
            raise Unavailable("the loader is shutting down; retry at another replica or in a moment")
        error = task.exception()
        if error is not None:
            # One exception object serves all who asked; without this its traceback grows with each of them.
            raise error.with_traceback(None)
        return task.result()

    async def close(self) -> None:
        """Give the questions up."""
        tasks = [task for task in (self._asking, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, before: asyncio.Task[Resident] | None) -> Resident:
        if before is not None:
            await asyncio.wait([before])
        # From here on newcomers are too late for this question.
        self._asking, self._next = self._next, None
        asked_at_s = clock.monotonic_s()
        try:
            with calls.inbound_call(calls.principal(), None):
                answer = await self._engine.resident(timeout_s=self._timeout_s)
        except MintError:
            self._last = None
            raise
        self._last, self._last_asked_at_s = answer, asked_at_s
        return answer

    def _ended(self, task: asyncio.Task[Resident]) -> None:
        if self._asking is task:
            self._asking = None
        if self._next is task:  # cancelled before it began
            self._next = None
        if not task.cancelled():
            task.exception()  # seen, so that it is not reported as forgotten when every caller left
