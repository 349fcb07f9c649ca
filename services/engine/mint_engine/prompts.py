"""Turns what a client sends into token ids, by the base model's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mint_core.errors import FailedPrecondition, InvalidArgument

__all__ = ["ChatMessage", "ChatPrompt", "HuggingFacePrompts", "Prompt", "PromptEncoder", "TextPrompt", "TokenPrompt"]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, tokenized as it is: with the special tokens the tokenizer itself puts around a text."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation; the answer of the assistant is what comes next."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


class PromptEncoder(Protocol):
    """Makes token ids of prompts."""

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of ``prompt``; :class:`InvalidArgument` if it is empty or names what the base does not have."""


class HuggingFacePrompts:
    """The tokenizer of a Hugging Face folder. Code in the folder is never run."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"the base model folder {folder} has no usable tokenizer: {error}") from error
        self._vocab_size = vocab_size
        # A tokenizer may not be used by two threads at one time.
        self._thread = ThreadPoolExecutor(1, "mint-tokenizer")

    async def encode(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TextPrompt(text):
                _require(bool(text), "prompt.text is empty; send at least one character", "prompt.text")
                token_ids = await self._run(self._encode_text, text)
            case ChatPrompt(messages):
                token_ids = await self._run(self._encode_chat, messages)
            case TokenPrompt(ids):
                token_ids = list(ids)
                for place, token_id in enumerate(token_ids):
                    if not 0 <= token_id < self._vocab_size:
                        raise InvalidArgument(
                            f"prompt.tokens.ids[{place}] is {token_id}; the base's ids are 0 to {self._vocab_size - 1}",
                            field=f"prompt.tokens.ids[{place}]",
                        )
        _require(bool(token_ids), "the prompt has no tokens; send at least one", "prompt")
        return token_ids

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _run(self, encode: Any, value: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode, value)

    def _encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        _require(bool(messages), "prompt.chat.messages is empty; send at least one message", "prompt.chat.messages")
        for place, message in enumerate(messages):
            field = f"prompt.chat.messages[{place}].role"
            _require(message.role in _ROLES, f"{field} is {message.role!r}; expected one of {', '.join(_ROLES)}", field)
        if not self._tokenizer.chat_template:
            raise InvalidArgument(
                "prompt.chat cannot be rendered: this base model has no chat template; send text or token ids",
                field="prompt.chat",
            )
        turns: list[Mapping[str, str]] = [{"role": turn.role, "content": turn.content} for turn in messages]
        from jinja2.exceptions import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            # Templates refuse by raising, for example when user and assistant do not alternate.
            raise InvalidArgument(
                f"prompt.chat cannot be rendered by the base model's chat template: {error}", field="prompt.chat"
            ) from error
        return list(rendered["input_ids"])


def _require(condition: bool, message: str, field: str) -> None:
    if not condition:
        raise InvalidArgument(message, field=field)
