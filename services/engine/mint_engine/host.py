"""The rules under which an engine answers.

A stream belongs to the digest it was asked for, from the first token to the last, or there is no first token: the
adapter is checked before the engine sees it, referenced while it is used, and the base answers only whoever asks for
the base.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from mint_core import failpoints, log
from mint_core.clock import Deadline
from mint_core.errors import DeadlineExceeded, InvalidArgument, Unavailable, WrongState
from mint_core.names import check_digest
from mint_engine.adapter_engine import AdapterEngine, Delta, Finish, GenerationCall, Sampling
from mint_engine.adapter_folder import AdapterFolder, AdapterRules, check_adapter_folder
from mint_engine.prompts import Prompt, PromptEncoder
from mint_engine.residency import LoadOutcome, Residency, Resident

__all__ = ["EngineHost", "FolderChecker", "Generation", "HostState", "Scored", "Started", "adapter_checker"]

GENERATING = failpoints.declare("engine.generating", "a stream holds its reference, the engine has not seen it yet")

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256

_log = log.get_logger(__name__)


class HostState(Enum):
    """What the replica says of itself."""

    READY = "ready"
    DRAINING = "draining"
    SICK = "sick"


class FolderChecker(Protocol):
    """Finds the folder of an adapter by its name and checks it; blocks while it reads."""

    def __call__(self, folder: str, digest: str) -> AdapterFolder: ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One request for a completion or a score."""

    prompt: Prompt
    tenant: str
    """Salt of the prefix cache."""
    digest: str = ""
    """Adapter that answers; empty only together with ``base``."""
    base: bool = False
    """Ask the base on purpose."""
    sampling: Sampling = field(default_factory=Sampling)
    with_logprobs: bool = False
    with_routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """What comes first in a stream, once the request is accepted and the adapter is held."""

    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token but the first."""


def adapter_checker(adapters_folder: Path, rules: AdapterRules) -> FolderChecker:
    """The checker of one engine: adapters lie in folders of their own directly below ``adapters_folder``."""

    def check(folder: str, digest: str) -> AdapterFolder:
        if not _FOLDER_NAME.fullmatch(folder):
            raise InvalidArgument(
                f"folder is {folder!r}; expected the name of a folder directly below the node's adapter directory",
                field="folder",
            )
        return check_adapter_folder(adapters_folder / folder, digest, rules)

    return check


class EngineHost:
    """One engine under MinT's rules. All methods belong to one event loop."""

    def __init__(
        self,
        engine: AdapterEngine,
        prompts: PromptEncoder,
        check_folder: FolderChecker,
        *,
        call_timeout_s: float = 30.0,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._check_folder = check_folder
        self._call_timeout_s = call_timeout_s
        self._residency = Residency(
            engine,
            capacity=engine.limits.max_loaded_adapters,
            call_timeout_s=call_timeout_s,
            on_stuck=self._become_sick,
        )
        self._sick = ""
        self._draining = False
        self._stopping = False
        self._num_running = 0

    @property
    def engine(self) -> AdapterEngine:
        return self._engine

    @property
    def state(self) -> HostState:
        if self._sick or self._engine.failure:
            return HostState.SICK
        return HostState.DRAINING if self._draining or self._stopping else HostState.READY

    @property
    def num_running(self) -> int:
        """Streams running now, the base's included."""
        return self._num_running

    def residents(self) -> list[Resident]:
        """Resident adapters, most recently used first."""
        return self._residency.list()

    def begin_drain(self) -> None:
        """Take nothing new; what runs goes on."""
        self._draining = True

    def end_drain(self) -> None:
        """Take requests again. :class:`WrongState` once the process is stopping."""
        if self._stopping:
            raise WrongState("this engine replica is stopping and takes nothing new; use the process that follows it")
        self._draining = False

    def begin_stop(self) -> None:
        """Drain for good: the process is about to end."""
        self._stopping = True

    async def load(self, digest: str, folder: str, *, into_slot: bool = False, pinned: bool = False) -> LoadOutcome:
        """Make the adapter in ``folder`` resident under ``digest``; a no-op when it is.

        Raises what :func:`check_adapter_folder` and :meth:`Residency.load` raise, :class:`Unavailable` when the replica
        is draining or sick.
        """
        self._check_taking()
        check_digest(digest, field="digest")
        return await self._residency.load(
            digest, lambda: asyncio.to_thread(self._check_folder, folder, digest), into_slot=into_slot, pinned=pinned
        )

    async def unload(self, digest: str) -> bool:
        """Forget ``digest``; ``False`` if it was absent. :class:`AdapterPinned` while it is in use or pinned."""
        self._check_healthy()
        check_digest(digest, field="digest")
        return await self._residency.unload(digest)

    def unpin(self, digest: str) -> None:
        """Let ``digest`` be evicted again; a no-op if it is not pinned or not resident."""
        self._residency.unpin(check_digest(digest, field="digest"))

    async def generate(self, request: Generation, *, timeout_s: float) -> AsyncGenerator[Started | Delta]:
        """Stream a completion: first :class:`Started`, then deltas, the last of which has ``finish``.

        Close the iterator to abort. Raises :class:`InvalidArgument` for a bad prompt or parameter, or a prompt that
        with ``max_new_tokens`` exceeds the engine's limit; :class:`AdapterNotResident`; :class:`Unavailable` when
        draining or sick; :class:`DeadlineExceeded`. The first three come before any token.
        """
        deadline = Deadline.after(timeout_s)
        self._check_taking()
        digest = _resolve(request)
        self._check_sampling(request)
        async with _within(deadline):
            token_ids = await self._prompts.encode(request.prompt)
        self._check_length(len(token_ids), request.sampling.max_new_tokens)
        async with contextlib.aclosing(self._run(request, digest, token_ids, deadline)) as deltas:
            async for item in deltas:
                yield item

    async def score(self, request: Generation, *, timeout_s: float) -> Scored:
        """Log-probability of each token of the prompt given those before it. Raises as :meth:`generate`."""
        deadline = Deadline.after(timeout_s)
        self._check_taking()
        digest = _resolve(request)
        async with _within(deadline):
            token_ids = await self._prompts.encode(request.prompt)
        if len(token_ids) < 2:
            raise InvalidArgument("the prompt has one token; a score needs at least two", field="prompt")
        self._check_length(len(token_ids), 0)
        finish: Finish | None = None
        async with contextlib.aclosing(self._run(request, digest, token_ids, deadline, score=True)) as deltas:
            async for item in deltas:
                finish = item.finish if isinstance(item, Delta) and item.finish else finish
        if finish is None or len(finish.prompt_logprobs) != len(token_ids) - 1:
            raise Unavailable("the engine ended a score without the log-probabilities; retry")
        return Scored(tuple(token_ids), finish.prompt_logprobs)

    async def flush_prefix_cache(self) -> None:
        """Empty the prefix cache; :class:`WrongState` while requests run."""
        self._check_healthy()
        async with asyncio.timeout(self._call_timeout_s):
            flushed = not self._num_running and await self._engine.flush_prefix_cache()
        if not flushed:
            raise WrongState(
                f"the prefix cache cannot be emptied while {self._num_running} requests run; retry when none does",
                retry_after_s=0.1,
            )

    async def close(self) -> None:
        """Stop taking requests, finish changes under way, end the engine."""
        self.begin_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._call_timeout_s):
                await self._residency.wait_for_changes()
        await self._engine.close()

    async def _run(
        self, request: Generation, digest: str | None, token_ids: list[int], deadline: Deadline, *, score: bool = False
    ) -> AsyncGenerator[Started | Delta]:
        call = GenerationCall(
            request_id=uuid.uuid4().hex,
            digest=digest,
            cache_salt=request.tenant,
            prompt_token_ids=token_ids,
            sampling=Sampling(max_new_tokens=0) if score else request.sampling,
            with_logprobs=request.with_logprobs and not score,
            with_prompt_logprobs=score,
            with_routed_experts=request.with_routed_experts and not score,
        )
        with contextlib.nullcontext() if digest is None else self._residency.reference(digest):
            self._check_taking()
            self._num_running += 1
            try:
                await GENERATING.reached()
                yield Started(tuple(token_ids))
                async with contextlib.aclosing(self._engine.generate(call)) as deltas:
                    while True:
                        async with _within(deadline):
                            delta = await anext(deltas, None)
                        if delta is None:
                            raise Unavailable("the engine ended a stream without finishing it; retry")
                        yield delta
                        if delta.finish is not None:
                            return
            finally:
                self._num_running -= 1

    def _check_sampling(self, request: Generation) -> None:
        sampling, limits = request.sampling, self._engine.limits
        _check(sampling.max_new_tokens >= 1, "max_new_tokens", sampling.max_new_tokens, "at least 1")
        temperature, top_p = sampling.temperature, sampling.top_p
        _check(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "0 or more, and finite")
        _check(math.isfinite(top_p) and 0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
        _check(sampling.top_k >= 0, "top_k", sampling.top_k, "0 (no limit) or more")
        _check(len(sampling.stop) <= _MAX_STOPS, "stop", len(sampling.stop), f"at most {_MAX_STOPS} texts")
        for place, stop in enumerate(sampling.stop):
            _check(0 < len(stop) <= _MAX_STOP_CHARS, f"stop[{place}]", stop, f"1 to {_MAX_STOP_CHARS} characters")
        for place, token_id in enumerate(sampling.stop_token_ids):
            known = 0 <= token_id < limits.vocab_size
            _check(known, f"stop_token_ids[{place}]", token_id, f"0 to {limits.vocab_size - 1}")
        _check(
            not (sampling.ignore_eos and sampling.stop_token_ids),
            "ignore_eos",
            True,
            "false together with stop_token_ids: the engine ignores both or neither",
        )
        _check(
            sampling.seed is None or 0 <= sampling.seed < 1 << 64, "seed", sampling.seed, "an unsigned 64-bit number"
        )
        if request.with_routed_experts and not limits.returns_routed_experts:
            raise InvalidArgument(
                "return_routed_experts is set, but this engine does not record routes: its base has no routed experts, "
                "or the engine was started without return_routed_experts",
                field="return_routed_experts",
            )

    def _check_length(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        limits = self._engine.limits
        if num_prompt_tokens > limits.max_prompt_tokens:
            raise InvalidArgument(
                f"the prompt has {num_prompt_tokens} tokens; this engine takes at most {limits.max_prompt_tokens} "
                f"(context length {limits.context_length})",
                field="prompt",
                metadata={"max_prompt_tokens": str(limits.max_prompt_tokens)},
            )
        total = num_prompt_tokens + max_new_tokens
        if total > limits.max_total_tokens:
            raise InvalidArgument(
                f"the prompt has {num_prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together {total}; "
                f"this engine takes at most {limits.max_total_tokens} (context length {limits.context_length})",
                field="sampling.max_new_tokens",
                metadata={"max_total_tokens": str(limits.max_total_tokens)},
            )

    def _check_healthy(self) -> None:
        why = self._sick or self._engine.failure
        if why:
            raise Unavailable(f"this engine replica is sick and waits for a restart: {why}", retry_after_s=5.0)

    def _check_taking(self) -> None:
        self._check_healthy()
        if self.state is HostState.DRAINING:
            raise Unavailable("this engine replica is draining and takes nothing new; ask another one")

    def _become_sick(self, why: str) -> None:
        self._sick = self._sick or why
        _log.error("engine replica is sick", extra={"fields": {"why": why}})


def _resolve(request: Generation) -> str | None:
    """The digest to ask, or ``None`` for the base; never the base by omission."""
    if request.base:
        if request.digest:
            raise InvalidArgument(f"digest is {request.digest} and base is set; ask for one of them", field="base")
        return None
    if not request.digest:
        raise InvalidArgument("digest is empty; name the adapter's digest, or set base to ask the base", field="digest")
    return check_digest(request.digest, field="digest")


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidArgument(f"{name} is {value!r}; expected {expected}", field=f"sampling.{name}")


@contextlib.asynccontextmanager
async def _within(deadline: Deadline) -> AsyncIterator[None]:
    # A step that needs not wait is never interrupted, so a passed deadline is looked for first.
    deadline.check("the completion")
    try:
        async with asyncio.timeout(deadline.remaining_s):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the completion did not finish before its deadline; retry with a longer one") from None
