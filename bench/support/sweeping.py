"""Asking many adapters, a lap at a time, and judging what they said.

The clock stands still between laps: answers are compared with the reference there, so that judging takes no time from
the servers while they are timed. What is kept of an answer that was right is its times.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.support.population import alias_name
from bench.support.random_adapters import RandomAdapters
from bench.support.reference import Expected, Reference
from mint_api.v1 import inference_service_pb2
from mint_client import Generation, MintClient
from mint_core.errors import MintError, ResourceExhausted, Unavailable

__all__ = ["Answer", "Lap", "Sweeper", "Times"]

_SHOWN = 10
_ATTEMPTS = 5
_MAX_FAILED = 20
_BATCH = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What a policy answered."""

    number: int
    is_first: bool
    """Nobody asked for this adapter before."""
    generation: Generation

    @property
    def load_s(self) -> float:
        """From the call to the stream's first message: the adapter is in the engine by then."""
        return self.generation.header_s


@dataclass(slots=True)
class Lap:
    """One lap's answers."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Times:
    """Of each first request, in the order in which they were asked; flat, so that many take little memory."""

    load_s: array[float] = field(default_factory=lambda: array("d"))
    total_s: array[float] = field(default_factory=lambda: array("d"))
    top_tokens: array[int] = field(default_factory=lambda: array("q"))
    """The reference's most probable first token."""


class Sweeper:
    """Asks by ``policy@live`` through inference, greedily, all by one prompt."""

    def __init__(
        self,
        client: MintClient,
        adapters: RandomAdapters,
        reference: Reference,
        prompt: Sequence[int],
        digests: Sequence[str],
        *,
        num_tokens: int,
        num_callers: int,
        tolerance: float,
    ) -> None:
        self._client = client
        self._adapters = adapters
        self._reference = reference
        self.prompt = list(prompt)
        self._digests = [bytes.fromhex(digest.removeprefix("sha256:")) for digest in digests]
        self.sampling = inference_service_pb2.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        self._num_callers = num_callers
        self._tolerance = tolerance
        self.num_wrong = 0
        self.num_compared_exactly = 0
        self.num_failed = 0
        self.num_retries = 0
        self.max_difference = 0.0
        self.is_right = bytearray(len(digests))
        """1 for each adapter that gave a right answer."""
        self._num_shown = 0

    async def one(self, number: int, *, is_first: bool = True) -> Answer:
        """Ask one adapter's policy."""
        generation = await self._client.generate_text(
            alias_name(number), self.prompt, sampling=self.sampling, return_logprobs=True
        )
        return Answer(number, is_first, generation)

    async def ask(self, first: Sequence[int], again: Sequence[int] = (), times: Times | None = None) -> Lap:
        """One lap: all of ``first`` in their order, ``again`` spread among them; judged before it is given back."""
        asked = list(_spread(first, again))
        order = {number: place for place, number in enumerate(first)}
        work = iter(asked)
        lap = Lap()
        begun = time.perf_counter()

        async def caller() -> None:
            for number, is_first in work:
                answer = await self._patiently(number, is_first=is_first)
                if answer is not None:
                    lap.answers.append(answer)

        await asyncio.gather(*(caller() for _ in range(self._num_callers)))
        lap.seconds = time.perf_counter() - begun
        # Those of several callers came in any order.
        lap.answers.sort(key=lambda answer: (not answer.is_first, order.get(answer.number, 0)))
        if self.num_failed > _MAX_FAILED:
            raise RuntimeError(f"{self.num_failed} requests failed")
        self._judge(lap.answers, times)
        return lap

    async def _patiently(self, number: int, *, is_first: bool) -> Answer | None:
        """Ask as a user does who was told to retry; such an answer does not count as a first one."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self.one(number, is_first=is_first and not attempt)
            except (Unavailable, ResourceExhausted) as error:
                self.num_retries += 1
                self._show(f"{alias_name(number)} must be asked again: {error.message}")
                await asyncio.sleep(error.retry_after_s or 1.0)
            except MintError as error:
                self._show(f"{alias_name(number)} was not answered: {error.reason}: {error.message}")
                break
        self.num_failed += 1
        return None

    def _judge(self, answers: Sequence[Answer], times: Times | None) -> None:
        num_tokens = self.sampling.max_new_tokens
        whole = []
        for answer in answers:
            found = answer.generation
            if found.digest != self.digest(answer.number):
                self._wrong(answer, f"it was answered by {found.digest}")
            elif len(found.token_ids) != num_tokens or len(found.logprobs) != num_tokens:
                self._wrong(answer, f"it has {len(found.token_ids)} tokens and {len(found.logprobs)} log-probabilities")
            else:
                whole.append(answer)
        for start in range(0, len(whole), _BATCH):
            batch = whole[start : start + _BATCH]
            expected = self._reference.of(
                [each.number for each in batch], self.prompt, [each.generation.token_ids for each in batch]
            )
            for row, answer in enumerate(batch):
                self._compare(answer, expected, row, again=True)
                if times is not None and answer.is_first:
                    times.load_s.append(answer.load_s)
                    times.total_s.append(answer.generation.total_s)
                    times.top_tokens.append(int(expected.best_tokens[row, 0]))

    def _compare(self, answer: Answer, expected: Expected, row: int, *, again: bool) -> None:
        """Greedy tokens are the reference's most probable ones, but for ties, and have the reference's probability.

        One that is not is compared ``again``, with an expectation in float64; that one counts.
        """
        found = np.array(answer.generation.logprobs, np.float32)
        difference = float(np.abs(found - expected.logprobs[row]).max())
        behind = float((expected.best_logprobs[row] - expected.logprobs[row]).max())
        # Written so that NaN is wrong.
        is_right = difference <= self._tolerance and behind <= self._tolerance
        if again and not is_right:
            self.num_compared_exactly += 1
            exact = self._reference.exact(answer.number, self.prompt, answer.generation.token_ids)
            self._compare(answer, exact, 0, again=False)
            return
        self.max_difference = max(self.max_difference, difference)
        if not is_right:
            best = expected.best_tokens[row].tolist()
            self._wrong(
                answer,
                f"tokens {list(answer.generation.token_ids)} with {found.tolist()}; expected {best} with "
                f"{expected.logprobs[row].tolist()}",
            )
        else:
            self.is_right[answer.number] = 1

    def digest(self, number: int) -> str:
        """Digest of an adapter's blob."""
        return f"sha256:{self._digests[number].hex()}"

    def _wrong(self, answer: Answer, why: str) -> None:
        self.num_wrong += 1
        self._show(f"WRONG: {alias_name(answer.number)} (adapter {self.digest(answer.number)}): {why}")

    def _show(self, what: str) -> None:
        self._num_shown += 1
        if self._num_shown <= _SHOWN:
            print(f"    {what}", flush=True)


def _spread(first: Sequence[int], again: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """``again`` at equal distances among ``first``."""
    num_again = 0
    for place, number in enumerate(first):
        yield number, True
        while num_again < (place + 1) * len(again) // len(first):
            yield again[num_again], False
            num_again += 1
