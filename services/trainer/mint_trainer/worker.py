"""The one thread that computes, and the way onto it.

Every session's steps end on this thread, so two of them can neither disturb each other's bits nor fight for cores; the
thread count inside a kernel is fixed, because it decides how sums are split and so their last bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch

from mint_core import calls
from mint_core.clock import Deadline
from mint_core.errors import Cancelled, ResourceExhausted

__all__ = ["Ticket", "TorchThread"]

T = TypeVar("T")


class Ticket:
    """Whether somebody still waits for a piece of work; asked just before it starts, never after."""

    def __init__(self, deadline: Deadline | None = None) -> None:
        self._deadline = deadline
        self._cancelled = False

    @classmethod
    def of_call(cls) -> Self:
        """A ticket with the deadline of the call being served."""
        remaining_s = calls.remaining_s()
        return cls(None if remaining_s is None else Deadline.after(remaining_s))

    def cancel(self) -> None:
        """Nobody waits any more; work that runs already is finished and its result kept."""
        self._cancelled = True

    def check(self) -> None:
        """Raise :class:`Cancelled` or :class:`DeadlineExceeded` if there is no use in starting."""
        if self._cancelled:
            raise Cancelled("the caller went away before the step started; nothing was done")
        if self._deadline is not None:
            self._deadline.check("the step was still waiting for its turn and")


class TorchThread:
    """Runs functions one after another; first come, first served."""

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, "torch", initializer=_prepare, initargs=(num_threads,))

    async def run(self, work: Callable[[], T], ticket: Ticket) -> T:
        """Run ``work`` unless ``ticket`` is void by then. Not to be cancelled: see :func:`sessions.Sessions`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _run, work, ticket)

    def close(self) -> None:
        """Finish what runs, drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _prepare(num_threads: int) -> None:
    torch.set_num_threads(num_threads)  # counts for the calling thread
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor with NaN, a help for debugging that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def _run(work: Callable[[], T], ticket: Ticket) -> T:
    ticket.check()
    try:
        return work()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory() from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # the CPU allocator has no class of its own
            raise _out_of_memory() from error
        raise


def _out_of_memory() -> ResourceExhausted:
    return ResourceExhausted(
        "the trainer ran out of memory in this step; nothing changed; send fewer or shorter sequences, "
        "or lower micro_batch_tokens"
    )
