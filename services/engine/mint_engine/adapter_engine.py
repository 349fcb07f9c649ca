"""The port between the host's rules and an engine that computes.

An :class:`AdapterEngine` keeps adapters under the digest as name and does what it is told: it neither evicts on its own
nor reloads what was unloaded. Who may ask for what and when is the business of :mod:`mint_engine.host`. One contract
suite is asked of every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

__all__ = [
    "AdapterEngine",
    "Delta",
    "EngineLimits",
    "EngineNumerics",
    "Finish",
    "FinishReason",
    "GenerationCall",
    "Sampling",
]

FinishReason = Literal["stop", "length", "abort"]
"""A stop token or text; ``max_new_tokens``; aborted inside the engine."""


@dataclass(frozen=True, slots=True)
class EngineNumerics:
    """What decides the bits an engine computes, apart from the base itself."""

    engine: str
    """``sglang``."""
    engine_version: str
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``."""
    quantization: str = ""
    """SGLang's name of the scheme; empty for none."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can take. Counts in tokens where nothing else is said."""

    max_loaded_adapters: int
    """Adapters in the engine's host pool. The engine takes one more, so that loading can come before evicting."""
    num_slots: int
    """Adapters, the base among them, that one batch can mix."""
    max_lora_rank: int
    target_modules: frozenset[str]
    """Last names of the modules an adapter may change, such as ``q_proj``."""
    context_length: int
    """Longest sequence of the model."""
    max_total_tokens: int
    """Longest prompt plus completion: the context or the key-value pool, whichever is smaller."""
    max_prompt_tokens: int
    vocab_size: int
    returns_routed_experts: bool = False
    spreads_shared_experts: bool = False
    """Takes adapters that store a matrix of all experts once."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 128
    """0 computes the prompt only."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    stop: tuple[str, ...] = ()
    """The completion ends before any of these texts."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """Unsigned, 64 bits. The same seed, prompt and weights draw the same tokens whoever shares the batch; ``None``
    draws a fresh one."""


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """One request as an engine sees it: everything resolved and checked."""

    request_id: str
    digest: str | None
    """Adapter that answers; ``None`` is the base, which the caller asked for by name."""
    cache_salt: str
    """Requests share a prefix cache only with the same salt."""
    prompt_token_ids: Sequence[int]
    sampling: Sampling
    with_logprobs: bool = False
    with_prompt_logprobs: bool = False
    with_routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """What is known when a completion ended."""

    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    """Tokens of the prompt taken from the prefix cache."""
    prompt_logprobs: tuple[float, ...] = ()
    """Log-probability of each prompt token but the first; empty unless asked for."""
    routed_experts: bytes = b""
    """int32 [num_tokens - 1, num_layers, top_k], little-endian; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a completion. The last one, and only that, has ``finish``.

    Log-probabilities are natural logarithms of the model's own distribution, before temperature, top-p and top-k, so
    that they equal what scoring the same tokens gives.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """One per token id, or empty when not asked for."""
    text: str = ""
    finish: Finish | None = field(default=None)


class AdapterEngine(Protocol):
    """One engine with a resident base. All methods belong to one event loop."""

    @property
    def limits(self) -> EngineLimits:
        """Known once started."""

    @property
    def numerics(self) -> EngineNumerics:
        """Known once started."""

    @property
    def failure(self) -> str | None:
        """One sentence once the engine cannot go on (a process of it died); ``None`` while it lives."""

    async def start(self) -> None:
        """Bring the base up, with no adapter loaded. Raises :class:`FailedPrecondition` when it cannot."""

    async def close(self) -> None:
        """End every process of the engine. Closing twice, or before :meth:`start`, is allowed."""

    async def load(self, digest: str, folder: Path, *, into_slot: bool) -> None:
        """Load the adapter in ``folder`` under ``digest``; with ``into_slot`` bring it into a batch slot if one can be
        had.

        The host calls it only for a digest that is not loaded and with a place free. Raises :class:`InvalidArgument`
        when the adapter does not fit, after which it is as if never loaded.
        """

    async def warm(self, digest: str) -> None:
        """Bring a loaded adapter into a slot, at the cost of another one's."""

    async def unload(self, digest: str) -> None:
        """Forget the adapter everywhere: a later request by that name fails until it is loaded anew."""

    def generate(self, call: GenerationCall) -> AsyncGenerator[Delta]:
        """Compute ``call``. Closing the iterator, or cancelling its consumer, aborts the request in the engine."""

    async def flush_prefix_cache(self) -> bool:
        """Empty the prefix cache; ``False`` when running requests prevent it."""
