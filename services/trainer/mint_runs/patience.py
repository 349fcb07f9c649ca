"""Waiting for another service that is away for a while, as one that restarts is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mint_core import log
from mint_core.clock import Deadline
from mint_core.errors import DeadlineExceeded, ResourceExhausted, Unavailable

__all__ = ["patiently"]

_log = log.get_logger(__name__)

_MAX_PAUSE_S = 5.0

T = TypeVar("T")


async def patiently(what: str, call: Callable[[], Awaitable[T]], *, patience_s: float) -> T:
    """Make ``call``, and again for ``patience_s`` while it answers UNAVAILABLE, not in time, or RESOURCE_EXHAUSTED with
    a time to come back.

    ``call`` must be safe to repeat. Raises the last error when patience is over.
    """
    deadline = Deadline.after(patience_s)
    pause_s = 0.2
    while True:
        try:
            return await call()
        except (Unavailable, DeadlineExceeded, ResourceExhausted) as error:
            is_passing = not isinstance(error, ResourceExhausted) or error.retry_after_s is not None
            if deadline.remaining_s <= 0 or not is_passing:
                raise
            asked_s = error.retry_after_s or 0.0
            _log.info(
                "waiting", extra={"fields": {"for": what, "error": str(error), "patience_left_s": deadline.remaining_s}}
            )
            await asyncio.sleep(min(max(pause_s, asked_s), _MAX_PAUSE_S, deadline.remaining_s))
            pause_s = min(pause_s * 2, _MAX_PAUSE_S)
