"""The way of one request: resolve, choose a replica, ask its engine, have the adapter loaded if need be, relay."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from mint_core.signing import TrustedKeys
from mint_inference.copies import Copies
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
from mint_inference.patience import Patience
from mint_inference.resolver import Resolver
from mint_inference.router import Router
from mint_inference.usage import UsageMeter

__all__ = ["Generation", "GenerationLimits"]

RESOLVED = failpoints.declare("inference.resolved", "a request's name is resolved, no engine was asked yet")
_SUSPECT_START_S = 1.0
"""How much longer a start is waited for at a replica that does not answer others."""

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
    gone_silence_s: float = 5.0
    """The same of an engine whose registration has ended."""
    start_s: float = 10.0
    """Longest wait for an engine to accept a stream if another one can be asked instead."""
    load_s: float = 120.0
    """Longest load of an adapter."""
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
        copies: Copies | None = None,
        trusted: TrustedKeys | None = None,
    ) -> None:
        self._catalog = catalog
        self._resolver = resolver
        self._router = router
        self._engines = engines
        self._loaders = loaders
        self._limits = limits
        self._trusted = trusted or TrustedKeys()
        self._meter = meter or UsageMeter()
        self._copies = copies
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
        # It accepts a stream before it computes anything; alone it gets all the time there is.
        limits = self._limits
        patience = Patience(limits.silence_s)
        if self._router.has_other(replica):
            patience.shorten(limits.start_s)

        def shorten() -> None:
            patience.shorten(_SUSPECT_START_S if self._router.has_other(replica) else limits.silence_s)

        with self._router.watching(replica, on_gone=shorten, on_suspect=shorten):
            try:
                async with patience.waiting():
                    first = await anext(chunks, None)
            except TimeoutError:
                raise Unavailable(
                    f"{replica.name} did not start within {patience.limit_s:.3g} s; nothing was generated, retry"
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
        unsure: set[str] = set()
        num_loads = 0
        is_cold = False
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
                unsure.clear()
                failure = None
                continue
            # An engine that seems to lack the adapter is not asked; its loader finds out if that is wrong.
            is_asked = replica.name in unsure or not self._router.lacks(replica, resolution.digest)
            if is_asked:
                try:
                    async with AsyncExitStack() as attempt:
                        attempt.enter_context(self._router.using(replica, resolution.digest))
                        answer = await _asked(ask(attempt, replica, call, resolution.digest), replica)
                        self._note_answered(replica, call, resolution, answer)
                        stack.push_async_callback(attempt.pop_all().aclose)
                        return _Answered(replica, resolution, is_cold, answer)
                except AdapterNotResident:
                    self._router.note_absent(replica, resolution.digest)
                except (Unavailable, ResourceExhausted) as error:
                    if isinstance(error, Unavailable):
                        self._router.note_failed(replica)
                    failure = _weightier(failure, error)
                    excluded.add(replica.name)
                    continue
                if replica.name in unsure:
                    excluded.add(replica.name)
                    continue
            if not resolution.digest or num_loads >= self._limits.max_loads:
                raise Unavailable(
                    f"adapter {resolution.digest} was loaded {num_loads} times and pushed out of {replica.name} "
                    "before it could be used; retry, or give the engine more places",
                    metadata={"digest": resolution.digest},
                )
            try:
                is_cold |= await self._load(replica, call, resolution)
                num_loads += 1
            except (Unavailable, ResourceExhausted) as error:
                failure = _weightier(failure, error)
                # The engine may hold it all the same: without its loader it serves what it has.
                (excluded if is_asked else unsure).add(replica.name)
            except NotFound as gone:
                # A revision may have been deleted under a cached answer; then the catalog knows better by now.
                known, resolution = resolution, await self._resolve(call, Consistency(strong=True))
                if is_rechecked or resolution.digest == known.digest:
                    raise BlobCorrupt(
                        f"the stored adapter of {resolution.revision} is gone: {gone.message}",
                        metadata={"digest": resolution.digest, "object_key": resolution.object_key},
                    ) from None
                is_rechecked = True

    def _note_answered(self, replica: Replica, call: Call, resolution: Resolution, answer: object) -> None:
        """The replica holds the adapter and took the request."""
        num_running = answer.started.num_running if isinstance(answer, _Stream) else None
        self._router.note_answered(replica, num_running)
        if resolution.digest:
            self._router.note_resident(replica, resolution.digest)
            if self._copies is not None:
                self._copies.consider(replica, call.tenant, resolution)

    async def _wait_for_place(self, failure: MintError, give_up: Deadline) -> None:
        """Pause before all replicas are asked again; raises ``failure`` if that is no use or the time is up."""
        pause_s = failure.retry_after_s
        if not isinstance(failure, ResourceExhausted) or pause_s is None or give_up.remaining_s <= 0:
            raise failure.with_traceback(None)
        await asyncio.sleep(min(pause_s, give_up.remaining_s))

    async def _resolve(self, call: Call, consistency: Consistency) -> Resolution:
        model = call.model
        if not isinstance(model, BaseModelName):
            resolution = await self._resolver.resolve(model, call.sticky_key, consistency)
            # Loaders ask the same before they bring an adapter. But what an engine holds needs no load, and another
            # tenant, who demands no signatures, may have brought the same bytes.
            self._trusted.check(model.tenant, resolution.digest, resolution.base_digest, resolution.signature)
            return resolution
        # Name and digest of a base model belong together for ever, and the registry checked the replica's.
        digest = self._router.base_digest_of(model)
        if digest is None:
            digest = await self._catalog.base_digest(model, timeout_s=5.0)
        return Resolution(base_digest=digest, base_model=str(model))

    async def _load(self, replica: Replica, call: Call, resolution: Resolution) -> bool:
        """Have the replica's loader bring the adapter, and tell its failures in the client's terms; whether it had to
        be loaded."""
        patience = Patience(self._limits.load_s)

        def shorten(limit_s: float) -> None:
            if self._router.has_other(replica):
                patience.shorten(limit_s)

        # A busy machine is slow to answer others while it loads: that is no reason to give a load up at once.
        on_gone = functools.partial(shorten, _SUSPECT_START_S)
        on_suspect = functools.partial(shorten, self._limits.start_s)
        try:
            with (
                self._router.loading(replica, resolution.digest),
                # It will be served there: who is placed meanwhile sees that.
                self._router.using(replica, resolution.digest),
                self._router.watching(replica, on_gone=on_gone, on_suspect=on_suspect),
            ):
                async with patience.waiting():
                    return await self._loaders.ensure(replica, call.tenant, resolution)
        except TimeoutError:
            self._router.note_absent(replica, resolution.digest)
            raise Unavailable(
                f"the adapter of {resolution.revision} was not loaded by {replica.name} within "
                f"{patience.limit_s:.3g} s; retry"
            ) from None
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
        limits = self._limits
        patience = Patience(limits.silence_s)
        num_tokens = 0
        is_finished = False

        def lost(why: str) -> Unavailable:
            self._router.note_failed(replica)
            if answered.resolution.digest:
                self._router.note_absent(replica, answered.resolution.digest)
            return _lost(replica, num_tokens, why)

        with self._router.watching(replica, on_gone=lambda: patience.shorten(limits.gone_silence_s)):
            while True:
                try:
                    async with patience.waiting():
                        chunk = await anext(chunks, None)
                except TimeoutError:
                    if is_finished:
                        return
                    raise lost(f"it was silent for {patience.limit_s:.3g} s") from None
                except MintError as error:
                    if is_finished:  # the client has the whole answer
                        _log.info("engine stream ended badly after its end", extra={"fields": {"error": error.message}})
                        return
                    if isinstance(error, (Unavailable, AdapterNotResident)) or _is_broken_transport(error):
                        raise lost(error.message) from error
                    raise
                if chunk is None:
                    if is_finished:
                        return
                    raise lost("it ended the stream too early")
                piece = cast("Chunk", chunk)
                num_tokens += len(piece.token_ids)
                is_finished = is_finished or piece.finish_reason != 0
                yield piece


async def _asked(answer: Awaitable[T], replica: Replica) -> T:
    """A replica that broke off before it answered is one that did not answer: another can be asked."""
    try:
        return await answer
    except MintError as error:
        if _is_broken_transport(error):
            raise Unavailable(f"{replica.name} was lost before it answered: {error.message}; retry") from error
        raise


def _weightier(before: MintError | None, now: MintError) -> MintError:
    """Of two replicas' reasons the one to act on: that one is full is worth waiting for, whoever else is away."""
    if isinstance(before, ResourceExhausted) and before.retry_after_s is not None:
        return before
    return now


def _is_broken_transport(error: MintError) -> bool:
    """A connection that is cut may end as CANCELLED, INTERNAL or UNKNOWN; a bug in the engine carries an error id."""
    return isinstance(error, Cancelled) or (isinstance(error, Internal) and "error_id" not in error.metadata)


def _lost(replica: Replica, num_tokens: int, why: str) -> Unavailable:
    return Unavailable(
        f"{replica.name} was lost after {num_tokens} tokens: {why}. The answer is incomplete; retry the whole request",
        metadata={"engine_replica": replica.name, "num_tokens": str(num_tokens)},
    )


def _header(answered: _Answered[T], prompt_token_ids: Sequence[int]) -> Header:
    replica = answered.replica
    return Header(answered.resolution, replica.name, answered.cold, prompt_token_ids, replica.numerics)
