"""Blocking work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["run_to_end"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run_to_end(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As :func:`asyncio.to_thread`, but a cancelled caller waits until the thread has finished.

    A thread cannot be stopped. One that goes on writing after its caller has cleaned up could hit another file that got
    the same descriptor, or fill a folder that was just removed.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # seen, so that it is not reported as forgotten
        raise
