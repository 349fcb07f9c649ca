"""Many requests to something that generates: so many at a time, or when they are due; and how long each took."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from bench.support.timing import quantile

__all__ = ["Answer", "Asked", "Request", "at_a_time", "when_due"]


@dataclass(frozen=True, slots=True)
class Request:
    """A policy by its number, and a prompt; the base is asked the same prompt."""

    policy: int
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Something that came out of a generation."""

    num_tokens: int
    is_cold: bool = False
    """The adapter was not in the engine when the request came."""


Ask = Callable[[Request], AsyncIterator[Answer]]


@dataclass(slots=True)
class Asked:
    """What became of some requests."""

    num_tokens: int = 0
    num_cold: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    """Of each, from when it was made (at a time) or was due."""
    last_token_s: list[float] = field(default_factory=list)
    """Of each of these, likewise."""
    longest_pause_s: list[float] = field(default_factory=list)
    """Of each of these, the longest time from one of its tokens to the next."""
    num_others: list[int] = field(default_factory=list)
    """Of each of these, how many other policies had requests under way when it was made."""
    errors: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return len(self.first_token_s) + len(self.errors)

    @property
    def per_s(self) -> float:
        """Requests per second that were answered."""
        return len(self.first_token_s) / self.seconds

    def first_token_ms(self, q: float) -> float:
        return quantile(self.first_token_s, q) * 1e3

    async def one(self, ask: Ask, request: Request, since_s: float, under_way: Counter[int]) -> None:
        """Ask once and note it; an error is noted and not raised. ``under_way`` counts requests by policy."""
        first_s: float | None = None
        last_s, longest_pause_s = 0.0, 0.0
        num_others = len(under_way.keys() - {request.policy})
        under_way[request.policy] += 1
        try:
            async for answer in ask(request):
                if answer.is_cold:
                    self.num_cold += 1
                if answer.num_tokens:
                    now_s = time.perf_counter() - since_s
                    if first_s is None:
                        first_s = now_s
                    else:
                        longest_pause_s = max(longest_pause_s, now_s - last_s)
                    last_s = now_s
                self.num_tokens += answer.num_tokens
        except Exception as error:  # noqa: BLE001 - whatever went wrong, one request failed and is counted
            self.errors.append(f"{type(error).__name__}: {error}"[:300])
        else:
            if first_s is None:
                self.errors.append("the generation ended without a token")
            else:
                self.first_token_s.append(first_s)
                self.last_token_s.append(last_s)
                self.longest_pause_s.append(longest_pause_s)
                self.num_others.append(num_others)
        finally:
            under_way[request.policy] -= 1
            if not under_way[request.policy]:
                del under_way[request.policy]


async def at_a_time(ask: Ask, requests: Sequence[Request], num_callers: int) -> Asked:
    """Closed loop: each caller asks again as soon as it was answered."""
    asked, under_way = Asked(), Counter[int]()
    waiting = iter(requests)

    async def caller() -> None:
        for request in waiting:
            await asked.one(ask, request, time.perf_counter(), under_way)

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(num_callers)))
    asked.seconds = time.perf_counter() - begun
    return asked


async def when_due(ask: Ask, requests: Sequence[Request], due_s: Sequence[float]) -> Asked:
    """Open loop: each request is made when it is due, whatever became of those before."""
    asked, under_way = Asked(), Counter[int]()
    begun = time.perf_counter()

    async def one(request: Request, at_s: float) -> None:
        await asyncio.sleep(at_s - time.perf_counter())
        await asked.one(ask, request, at_s, under_way)

    await asyncio.gather(*(one(request, begun + each_s) for request, each_s in zip(requests, due_s, strict=True)))
    asked.seconds = time.perf_counter() - begun
    return asked
