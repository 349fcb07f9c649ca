"""An engine for unit tests that computes nothing: its tokens say who answered, and it can be told to misbehave."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path

from mint_core.errors import InvalidArgument
from mint_engine.adapter_engine import Delta, EngineLimits, EngineNumerics, Finish, GenerationCall
from mint_engine.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt

__all__ = ["FAKE_LIMITS", "FakeEngine", "FakePrompts"]

FAKE_LIMITS = EngineLimits(
    max_loaded_adapters=3,
    num_slots=2,
    max_lora_rank=8,
    target_modules=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    context_length=512,
    max_total_tokens=510,
    max_prompt_tokens=505,
    vocab_size=384,
)


class FakePrompts:
    """One token per character."""

    async def encode(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TextPrompt(text):
                ids = [ord(character) % 384 for character in text]
            case ChatPrompt(messages):
                ids = [ord(character) % 384 for message in messages for character in message.content]
            case TokenPrompt(token_ids):
                ids = list(token_ids)
        if not ids or not all(0 <= token_id < 384 for token_id in ids):
            raise InvalidArgument("the prompt is not valid; send tokens 0 to 383", field="prompt")
        return ids


class FakeEngine:
    """Keeps digests, streams tokens derived from (digest, prompt); every misuse that SGLang would not survive
    raises."""

    def __init__(self, limits: EngineLimits = FAKE_LIMITS) -> None:
        self._limits = limits
        self.loaded: dict[str, Path] = {}
        self.warmed: list[str] = []
        self.calls: list[str] = []
        self.token_s = 0.001
        self.num_aborted = 0
        self.num_running = 0
        self.closed = False
        self.failure: str | None = None
        self.refused: set[str] = set()
        """Digests whose load fails."""
        self.gate = asyncio.Event()
        """Loads and unloads wait for it; set by default."""
        self.gate.set()
        self.unload_gate = asyncio.Event()
        """Unloads wait for it too; set by default."""
        self.unload_gate.set()
        self.token_gate = asyncio.Event()
        """Every token waits for it; set by default."""
        self.token_gate.set()

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def numerics(self) -> EngineNumerics:
        return EngineNumerics("fake", "0", "float32")

    async def start(self) -> None:
        self.loaded.clear()

    async def close(self) -> None:
        self.closed = True

    async def load(self, digest: str, folder: Path, *, into_slot: bool) -> None:
        self.calls.append(f"load {digest}")
        await self.gate.wait()
        if digest in self.refused:
            raise InvalidArgument(f"adapter {digest} does not fit", field="digest")
        assert digest not in self.loaded, "loaded twice"
        assert len(self.loaded) <= self._limits.max_loaded_adapters, "SGLang would evict by itself"
        self.loaded[digest] = folder
        if into_slot:
            self.warmed.append(digest)

    async def warm(self, digest: str) -> None:
        assert digest in self.loaded, "warmed without being loaded"
        self.warmed.append(digest)

    async def unload(self, digest: str) -> None:
        self.calls.append(f"unload {digest}")
        await self.gate.wait()
        await self.unload_gate.wait()
        del self.loaded[digest]

    async def generate(self, call: GenerationCall) -> AsyncGenerator[Delta]:
        assert call.digest is None or call.digest in self.loaded, "a stream for an adapter that is not there"
        self.num_running += 1
        finished = False
        try:
            prompt = call.prompt_token_ids
            seed = f"{call.digest}:{list(prompt)}:{call.sampling.seed}".encode()
            count = call.sampling.max_new_tokens
            for index in range(count):
                await self.token_gate.wait()
                await asyncio.sleep(self.token_s)
                assert call.digest is None or call.digest in self.loaded, "unloaded under a running stream"
                token = hashlib.sha256(seed + str(index).encode()).digest()[0]
                logprobs = (-float(token) / 16,) if call.with_logprobs else ()
                finish = None
                if index == count - 1:
                    finish = Finish("length", len(prompt), count)
                    finished = True
                yield Delta((token,), logprobs, chr(97 + token % 26), finish)
            if count == 0:
                finished = True
                scores = tuple(-float(token) / 16 for token in prompt[1:])
                yield Delta(finish=Finish("length", len(prompt), 0, prompt_logprobs=scores))
        finally:
            self.num_running -= 1
            self.num_aborted += not finished

    async def flush_prefix_cache(self) -> bool:
        return self.num_running == 0
