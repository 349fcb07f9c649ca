"""Installed scorers, in a few processes that are replaced when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

from mint_core.clock import Deadline
from mint_core.errors import MintError
from mint_runs.scoring.outcome import Scored, Scoring, seconds, unscored
from mint_runs.scoring.process import ScorerProcess
from mint_scorers import Sample

__all__ = ["local_scoring"]

_MAX_PROCESSES = 4
_HELP_AFTER_S = 0.5
"""A batch that takes longer gets another process, and another: a quick scorer is done before the second could start."""


@contextlib.asynccontextmanager
async def local_scoring(name: str, options: Mapping[str, str], *, timeout_s: float) -> AsyncIterator[Scoring]:
    """The installed scorer ``name``, ready inside the block; its processes end with it.

    Raises what :meth:`ScorerProcess.start` raises.
    """
    seats = [_Seat(lambda: ScorerProcess.start(name, options)) for _ in range(_MAX_PROCESSES)]
    try:
        await seats[0].ready()
        yield _LocalScoring(seats, timeout_s)
    finally:
        await asyncio.gather(*(seat.close() for seat in seats))


class _LocalScoring:
    """Gives the samples of a batch to the seats, each to whichever is free next."""

    def __init__(self, seats: Sequence[_Seat], timeout_s: float) -> None:
        self._seats = seats
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """See :class:`Scoring`. Takes at most ``timeout_s`` for each sample, restarts of processes included."""
        async with self._turn:
            return await self._score(samples)

    async def _score(self, samples: Sequence[Sample]) -> list[Scored]:
        total_s = self._timeout_s * len(samples)
        deadline = Deadline.after(total_s)
        waiting = deque(enumerate(samples))
        outcomes: dict[int, Scored] = {}

        async def work(seat: _Seat) -> None:
            while waiting and deadline.remaining_s > 0:
                place, sample = waiting.popleft()
                outcomes[place] = await seat.score(sample, self._timeout_s, deadline)

        working: set[asyncio.Task[None]] = set()
        try:
            for seat in self._seats:
                if not waiting:
                    break
                working.add(asyncio.create_task(work(seat)))
                await asyncio.wait(working, timeout=_HELP_AFTER_S)
            await asyncio.gather(*working)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        late = unscored(f"not scored: the {seconds(total_s)} for {len(samples)} samples went to time-outs and restarts")
        return [outcomes.get(place, late) for place in range(len(samples))]


class _Seat:
    """A place for one process at a time; a lost one is replaced when the next sample comes."""

    def __init__(self, start: Callable[[], Coroutine[Any, Any, ScorerProcess]]) -> None:
        self._start = start
        self._starting: asyncio.Task[ScorerProcess] | None = None

    async def ready(self) -> ScorerProcess:
        """The process; raises why there is none. Whoever stops waiting leaves the start under way for the next."""
        if self._starting is None or await _is_lost(self._starting):
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def score(self, sample: Sample, timeout_s: float, deadline: Deadline) -> Scored:
        """Outcome for one sample, before ``deadline``."""
        try:
            async with asyncio.timeout(deadline.remaining_s):
                process = await self.ready()
        except TimeoutError:
            return unscored("not scored: another process of the scorer was not ready in time")
        except MintError as error:
            return unscored(f"not scored: another process of the scorer could not be started: {error.message}")
        return await process.score(sample, min(timeout_s, deadline.remaining_s))

    async def close(self) -> None:
        """End the process, also one that is just starting."""
        if self._starting is None:
            return
        self._starting.cancel()
        for process in await asyncio.gather(self._starting, return_exceptions=True):
            if isinstance(process, ScorerProcess):
                await process.kill()


async def _is_lost(starting: asyncio.Task[ScorerProcess]) -> bool:
    """Whether a start has failed, or the process it gave has ended; what that one started is ended with it."""
    if not starting.done():
        return False
    if starting.exception() is not None:
        return True
    process = starting.result()
    if process.has_ended:
        await process.kill()
    return process.has_ended
