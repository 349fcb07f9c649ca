"""How long one stream waits for its next piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["Patience"]


class Patience:
    """A limit on silence that can be shortened while somebody waits under it."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Wait inside the block for one piece; :class:`TimeoutError` after the limit."""
        async with asyncio.timeout(self.limit_s) as self._timeout:
            try:
                yield
            finally:
                self._timeout = None

    def shorten(self, limit_s: float) -> None:
        """Wait no longer than this from now on, the one who waits now included."""
        self.limit_s = min(self.limit_s, limit_s)
        timeout = self._timeout
        if timeout is None or timeout.expired():
            return
        until_s = asyncio.get_running_loop().time() + limit_s
        known_s = timeout.when()
        if known_s is None or known_s > until_s:
            timeout.reschedule(until_s)
