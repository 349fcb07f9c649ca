"""The way of one request: resolve, choose a replica, ask its engine, have the adapter loaded if need be, relay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from mint_core import calls, failpoints, log
from mint_core.clock import Deadline
from mint_core.errors import (
    AdapterNotResident,
    BlobCorrupt,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import BaseModelName
from mint_inference.model import (
    Call,
    Catalog,
    Chunk,
    Consistency,
    Engines,
    Header,
    Loaders,
    Replica,
    Resolution,
    Scored,
    Started,
)
from mint_inference.resolver import Resolver
from mint_inference.router import Router
from mint_inference.usage import UsageMeter

__all__ = ["Generation", "GenerationLimits"]

RESOLVED = failpoints.declare("inference.resolved", "a request's name is resolved, no engine was asked yet")
STARTED = failpoints.declare("inference.started", "the engine started a stream, its header was not sent yet")

_log = log.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Bounds of one request and of all."""

    max_streams: int = 1024
    """Requests under way at one time; more are refused."""
    max_loads: int = 4
    """How often one request has its adapter loaded; between load and use another may push it out again."""
    silence_s: float = 60.0
    """Longest silence of an engine inside a stream."""
    place_wait_s: float = 10.0
    """How long a request waits for a place in an engine whose adapters are all in use."""


@dataclass(frozen=True, slots=True)
class _Answered(Generic[T]):
    replica: Replica
    resolution: Resolution
    cold: bool
    answer: T


@dataclass(frozen=True, slots=True)
class _Stream:
    started: Started
    chunks: AsyncGenerator[Started | Chunk, None]


class Generation:
    """Answers generate and score."""

    def __init__(
        self,
        catalog: Catalog,
        resolver: Resolver,
        router: Router,
        engines: Engines,
        loaders: Loaders,
        limits: GenerationLimits,
        meter: UsageMeter | None = None,
    ) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._router = router
        self._engines = engines
        self._loaders = loaders
        self._limits = limits
        self._meter = meter or UsageMeter()
        self._num_streams = 0

    @property
    def num_streams(self) -> int:
        """Requests under way."""
        return self._num_streams

    async def generate(self, call: Call) -> AsyncGenerator[Header | Chunk, None]:
        """A header, then chunks, all of them by the revision that the header names. Closing it cancels the engine's
        work.

        The header comes as soon as the engine holds the adapter, before the first token. An error before it means that
        nothing was generated; :class:`Unavailable` after it, that the replica was lost and the rest with it.
        """
        with self._admitted():
            async with AsyncExitStack() as stack:
                answered = await self._answered(call, self._start, stack)
                await STARTED.reached()
                self._meter.began(call.model, len(answered.answer.started.prompt_token_ids))
                yield _header(answered, answered.answer.started.prompt_token_ids)
                relayed = self._relayed(answered)
                async with contextlib.aclosing(relayed):
                    async for chunk in relayed:
                        self._meter.generated(call.model, len(chunk.token_ids))
                        yield chunk

    async def score(self, call: Call) -> tuple[Header, Scored]:
        """Log-probabilities of the prompt's own tokens."""
        with self._admitted():
            async with AsyncExitStack() as stack:
                answered = await self._answered(call, self._score, stack)
                self._meter.began(call.model, len(answered.answer.token_ids))
                return _header(answered, answered.answer.token_ids), answered.answer

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._num_streams >= self._limits.max_streams:
            raise ResourceExhausted(
                f"{self._num_streams} requests are under way, which is the limit of this inference process; retry",
                retry_after_s=1.0,
            )
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    async def _start(self, stack: AsyncExitStack, replica: Replica, call: Call, digest: str) -> _Stream:
        chunks = self._engines.generate(replica, call, digest)
        await stack.enter_async_context(contextlib.aclosing(chunks))
        try:
            async with asyncio.timeout(self._limits.silence_s):
                first = await anext(chunks, None)
        except TimeoutError:
            raise Unavailable(
                f"{replica.name} did not start within {self._limits.silence_s:.0f} s; nothing was generated, retry"
            ) from None
        if not isinstance(first, Started):
            raise Unavailable(f"{replica.name} ended the stream before it began; nothing was generated, retry")
        return _Stream(first, chunks)

    async def _score(self, _: AsyncExitStack, replica: Replica, call: Call, digest: str) -> Scored:
        return await self._engines.score(replica, call, digest)

    async def _answered(
        self, call: Call, ask: Callable[[AsyncExitStack, Replica, Call, str], Awaitable[T]], stack: AsyncExitStack
    ) -> _Answered[T]:
        """Find a replica whose engine begins to answer; what the answer needs to stay open is handed to ``stack``."""
        resolution = await self._resolve(call, call.consistency)
        await RESOLVED.reached()
        excluded: set[str] = set()
        num_loads = 0
        give_up = Deadline.after(self._limits.place_wait_s)
        failure: MintError | None = None
        is_rechecked = False
        while True:
            try:
                replica = await self._router.choose(resolution.base_digest, resolution.digest, excluded)
            except Unavailable:
                if failure is None:
                    raise
                # The reason why the last replica could not is worth more than that there is no other.
                await self._wait_for_place(failure, give_up)
                excluded.clear()
                continue
            try:
                async with AsyncExitStack() as attempt:
                    attempt.enter_context(self._router.using(replica))
                    answer = await ask(attempt, replica, call, resolution.digest)
                    if resolution.digest:
                        self._router.note_resident(replica, resolution.digest)
                    stack.push_async_callback(attempt.pop_all().aclose)
                    return _Answered(replica, resolution, num_loads > 0, answer)
            except AdapterNotResident:
                self._router.note_absent(replica, resolution.digest)
                if not resolution.digest or num_loads >= self._limits.max_loads:
                    raise Unavailable(
                        f"adapter {resolution.digest} was loaded {num_loads} times and pushed out of {replica.name} "
                        "before it could be used; retry, or give the engine more places",
                        metadata={"digest": resolution.digest},
                    ) from None
            except (Unavailable, ResourceExhausted) as error:
                failure = error
                excluded.add(replica.name)
                continue
            try:
                await self._load(replica, call, resolution)
                num_loads += 1
            except (Unavailable, ResourceExhausted) as error:
                failure = error
                excluded.add(replica.name)
            except NotFound as gone:
                # A revision may have been deleted under a cached answer; then the catalog knows better by now.
                known, resolution = resolution, await self._resolve(call, Consistency(strong=True))
                if is_rechecked or resolution.digest == known.digest:
                    raise BlobCorrupt(
                        f"the stored adapter of {resolution.revision} is gone: {gone.message}",
                        metadata={"digest": resolution.digest, "object_key": resolution.object_key},
                    ) from None
                is_rechecked = True

    async def _wait_for_place(self, failure: MintError, give_up: Deadline) -> None:
        """Pause before all replicas are asked again; raises ``failure`` if that is no use or the time is up."""
        pause_s = failure.retry_after_s
        if not isinstance(failure, ResourceExhausted) or pause_s is None or give_up.remaining_s <= 0:
            raise failure.with_traceback(None)
        await asyncio.sleep(min(pause_s, give_up.remaining_s))

    async def _resolve(self, call: Call, consistency: Consistency) -> Resolution:
        model = call.model
        if not isinstance(model, BaseModelName):
            return await self._resolver.resolve(model, call.sticky_key, consistency)
        # Name and digest of a base model belong together for ever, and the registry checked the replica's.
        digest = self._router.base_digest_of(model)
        if digest is None:
            digest = await self._catalog.base_digest(model, timeout_s=5.0)
        return Resolution(base_digest=digest, base_model=str(model))

    async def _load(self, replica: Replica, call: Call, resolution: Resolution) -> None:
        """Have the replica's loader bring the adapter, and tell its failures in the client's terms."""
        self._router.note_resident(replica, resolution.digest)  # those who come meanwhile join this load
        try:
            await self._loaders.ensure(replica, call.tenant, resolution)
        except InvalidArgument as error:
            self._router.note_absent(replica, resolution.digest)
            # The bytes are what was published, so this is no loss of data: they never fitted this base.
            raise FailedPrecondition(
                f"the adapter of {resolution.revision} does not fit its base: {error.message}",
                metadata={"digest": resolution.digest, "object_key": resolution.object_key},
            ) from error
        except DeadlineExceeded as error:
            self._router.note_absent(replica, resolution.digest)
            remaining_s = calls.remaining_s()
            if remaining_s is not None and remaining_s <= 0:
                raise
            raise Unavailable(
                f"the adapter of {resolution.revision} is being loaded; retry: {error.message}"
            ) from error
        except MintError:
            self._router.note_absent(replica, resolution.digest)
            raise

    async def _relayed(self, answered: _Answered[_Stream]) -> AsyncGenerator[Chunk, None]:
        replica, chunks = answered.replica, answered.answer.chunks
        num_tokens = 0
        is_finished = False
        while True:
            try:
                async with asyncio.timeout(self._limits.silence_s):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                if is_finished:
                    return
                raise _lost(replica, num_tokens, f"it was silent for {self._limits.silence_s:.0f} s") from None
            except MintError as error:
                if is_finished:  # the client has the whole answer
                    _log.info("engine stream ended badly after its end", extra={"fields": {"error": error.message}})
                    return
                if isinstance(error, (Unavailable, Cancelled, AdapterNotResident)) or _is_broken_transport(error):
                    if answered.resolution.digest:
                        self._router.note_absent(replica, answered.resolution.digest)
                    raise _lost(replica, num_tokens, error.message) from error
                raise
            if chunk is None:
                if is_finished:
                    return
                raise _lost(replica, num_tokens, "it ended the stream too early")
            piece = cast("Chunk", chunk)
            num_tokens += len(piece.token_ids)
            is_finished = is_finished or piece.finish_reason != 0
            yield piece


def _is_broken_transport(error: MintError) -> bool:
    """A connection cut in mid-stream may end as INTERNAL or UNKNOWN; a bug in the engine carries an error id."""
    return isinstance(error, Internal) and "error_id" not in error.metadata


def _lost(replica: Replica, num_tokens: int, why: str) -> Unavailable:
    return Unavailable(
        f"{replica.name} was lost after {num_tokens} tokens: {why}. The answer is incomplete; retry the whole request",
        metadata={"engine_replica": replica.name, "num_tokens": str(num_tokens)},
    )


def _header(answered: _Answered[T], prompt_token_ids: Sequence[int]) -> Header:
    replica = answered.replica
    return Header(answered.resolution, replica.name, answered.cold, prompt_token_ids, replica.numerics)
