"""A signal that many coroutines can wait for without missing one that came before they slept."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["Signal"]


class Signal:
    """Counts notifications; a waiter names the count it has seen."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seen: int, *, timeout_s: float) -> bool:
        """Wait until the count is above ``seen``; False when ``timeout_s`` passed first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.count <= seen:
                    await self._event.wait()
        return self.count > seen
