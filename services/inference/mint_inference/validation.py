"""What can be told to be wrong about a request before anybody else is asked. Takes plain values, knows no wire
format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mint_core.errors import InvalidArgument

__all__ = ["check_chat", "check_prompt_kind", "check_sampling", "check_text", "check_tokens"]

_ROLES = ("system", "user", "assistant")
_MAX_NEW_TOKENS = 1 << 20
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256


def check_prompt_kind(kind: str | None) -> None:
    """``kind`` is the content that is set."""
    if kind is None:
        raise InvalidArgument("prompt is empty: set one of text, chat and tokens", field="prompt")


def check_text(text: str) -> None:
    if not text:
        raise InvalidArgument("prompt.text is empty: send at least one character", field="prompt.text")


def check_tokens(ids: Sequence[int]) -> None:
    if not ids:
        raise InvalidArgument("prompt.tokens.ids is empty: send at least one token id", field="prompt.tokens.ids")
    lowest = min(ids)
    if lowest < 0:
        raise InvalidArgument(f"prompt.tokens.ids has {lowest}: token ids are not negative", field="prompt.tokens.ids")


def check_chat(roles: Sequence[str], contents: Sequence[str]) -> None:
    """Of the same length: one role and one content per message."""
    if not roles:
        raise InvalidArgument("prompt.chat.messages is empty: send at least one message", field="prompt.chat.messages")
    for place, role in enumerate(roles):
        if role not in _ROLES:
            field = f"prompt.chat.messages[{place}].role"
            raise InvalidArgument(f"{field} is {role[:60]!r}: expected one of {', '.join(_ROLES)}", field=field)
    if not any(contents):
        raise InvalidArgument(
            "prompt.chat.messages have no content: send at least one character", field="prompt.chat.messages"
        )


def check_sampling(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop: Sequence[str],
    stop_token_ids: Sequence[int],
) -> None:
    """0 stands for the default of ``max_new_tokens``, ``top_p`` and ``top_k``, as the contract says."""
    _check(0 <= max_new_tokens <= _MAX_NEW_TOKENS, "max_new_tokens", max_new_tokens, f"0 to {_MAX_NEW_TOKENS}")
    _check(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "0 or more, and finite")
    _check(math.isfinite(top_p) and 0 <= top_p <= 1, "top_p", top_p, "0 to 1")
    _check(top_k >= 0, "top_k", top_k, "0 (no limit) or more")
    _check(len(stop) <= _MAX_STOPS, "stop", f"{len(stop)} texts long", f"at most {_MAX_STOPS}")
    for place, text in enumerate(stop):
        _check(0 < len(text) <= _MAX_STOP_CHARS, f"stop[{place}]", text, f"1 to {_MAX_STOP_CHARS} characters")
    for place, token_id in enumerate(stop_token_ids):
        _check(token_id >= 0, f"stop_token_ids[{place}]", token_id, "0 or more")


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        shown = value if not isinstance(value, str) else value[:60]
        raise InvalidArgument(f"sampling.{name} is {shown!r}: expected {expected}", field=f"sampling.{name}")
