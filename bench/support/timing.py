"""Timing of calls: medians over interleaved repetitions, from one client whatever the server is."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

__all__ = ["interleaved", "latencies_s", "median_s", "quantile", "throughput"]

Call = Callable[[int], Awaitable[Any]]
"""Makes the call number n."""


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share ``q`` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def latencies_s(call: Call, num_calls: int, start: int = 0) -> list[float]:
    """Seconds that each of some calls took, one after the other."""
    taken: list[float] = []
    for number in range(start, start + num_calls):
        begun = time.perf_counter()
        await call(number)
        taken.append(time.perf_counter() - begun)
    return taken


async def median_s(call: Call, num_calls: int, start: int = 0) -> float:
    return statistics.median(await latencies_s(call, num_calls, start))


async def throughput(call: Call, *, num_callers: int, seconds: float, start: int = 0) -> tuple[float, int]:
    """Calls per second with so many at a time, and the number of calls. Numbers count on from ``start``."""
    num_calls = 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal num_calls
        while time.perf_counter() < end:
            number = start + num_calls
            num_calls += 1
            await call(number)

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(num_callers)))
    return num_calls / (time.perf_counter() - begun), num_calls


async def interleaved(
    measures: Mapping[str, Callable[[int], Awaitable[float]]], num_reps: int
) -> dict[str, list[float]]:
    """A B A B …: each measure once in each repetition; a measure is told the repetition's number."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for rep in range(num_reps):
        for name, measure in measures.items():
            taken[name].append(await measure(rep))
    return taken
