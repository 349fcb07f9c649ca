"""Lines of JSON to examples; every complaint names the line, what is wrong and what is expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from mint_core.errors import InvalidArgument

__all__ = [
    "ChatExample",
    "Example",
    "LineProblem",
    "TextExample",
    "bad_lines",
    "parse_examples",
    "parse_lines",
    "parse_messages",
    "parse_text",
]

EXPECTED = (
    'expected one JSON object a line: {"prompt": text, "completion": text}, or '
    '{"messages": [{"role": "system" | "user" | "assistant", "content": text}, …]} ending with the assistant'
)

_ROLES = ("system", "user", "assistant")
_MAX_LISTED = 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextExample:
    """A prompt as it is and what should follow it; the loss is on the completion and the end token after it."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; the loss is on everything the assistant says and its end-of-turn token."""

    line: int
    messages: tuple[dict[str, str], ...]


Example = TextExample | ChatExample


class LineProblem(ValueError):
    """One line is unusable; the message says why."""


def parse_examples(lines: Iterable[bytes], *, source: str) -> list[Example]:
    """Examples of a JSONL file: :func:`parse_lines` for training on completions."""
    return parse_lines(lines, _example, source=source, expected=EXPECTED)


def parse_lines(
    lines: Iterable[bytes], parse: Callable[[dict[str, Any], int], T], *, source: str, expected: str
) -> list[T]:
    """What ``parse`` makes of each line's JSON object and number; empty lines are skipped.

    ``source`` says which data set it is. Raises :class:`InvalidArgument` naming the first bad line, what is wrong with
    it and what is ``expected``, or that there is no line at all. ``parse`` raises :class:`LineProblem`.
    """
    parsed: list[T] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            parsed.append(parse(_object(text), number))
        except LineProblem as problem:
            problems.append((number, str(problem)))
    if problems:
        raise bad_lines(source, problems, expected=expected)
    if not parsed:
        raise InvalidArgument(f"{source} has no example: {expected}", field=source)
    return parsed


def bad_lines(source: str, problems: list[tuple[int, str]], *, expected: str) -> InvalidArgument:
    """The error for unusable lines (number and problem): the first one in full, the others by number."""
    number, problem = problems[0]
    others = [str(other) for other, _ in problems[1 : _MAX_LISTED + 1]]
    hidden = len(problems) - 1 - len(others)
    more = f"; also bad: line {', '.join(others)}" if others else ""
    more += f" and {hidden} more" if hidden > 0 else ""
    return InvalidArgument(f"{source} line {number}: {problem}; {expected}{more}", field=source)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise LineProblem(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise LineProblem(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise LineProblem("not usable: nested too deeply") from None
    if not isinstance(value, dict):
        raise LineProblem(f"a JSON {_kind(value)}, not an object")
    if "messages" in value and ("prompt" in value or "completion" in value):
        raise LineProblem("has both messages and prompt or completion")
    return value


def _example(value: dict[str, Any], number: int) -> Example:
    if "messages" not in value:
        return TextExample(number, parse_text(value, "prompt"), parse_text(value, "completion"))
    messages = parse_messages(value["messages"])
    if messages[-1]["role"] != "assistant":
        raise LineProblem(f"the last message is the {messages[-1]['role']}'s, not the assistant's")
    if len(messages) == 1:
        raise LineProblem("messages has nothing before the assistant's first message")
    return ChatExample(number, messages)


def parse_text(value: dict[str, Any], key: str) -> str:
    """The non-empty text under ``key`` of a line. Raises :class:`LineProblem`."""
    if key not in value:
        raise LineProblem(f"{key} is missing (keys: {', '.join(sorted(map(str, value))) or 'none'})")
    return _plain_text(value[key], key)


def _plain_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise LineProblem(f"{what} is a JSON {_kind(text)}, not text")
    if not text:
        raise LineProblem(f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise LineProblem(f"{what} has half of a surrogate pair") from None
    return text


def parse_messages(value: Any) -> tuple[dict[str, str], ...]:
    """At least one message with a known role and content. Raises :class:`LineProblem`."""
    if not isinstance(value, list) or not value:
        raise LineProblem("messages is not a list with at least one message")
    messages = []
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            raise LineProblem(f"messages[{place}] is a JSON {_kind(message)}, not an object")
        role = message.get("role")
        if role not in _ROLES:
            raise LineProblem(f"messages[{place}].role is {role!r}, not one of {', '.join(_ROLES)}")
        unknown = sorted(set(message) - {"role", "content"})
        if unknown:
            raise LineProblem(f"messages[{place}] has {unknown[0]!r}; known are role and content")
        if "content" not in message:
            raise LineProblem(f"messages[{place}].content is missing")
        messages.append({"role": role, "content": _plain_text(message["content"], f"messages[{place}].content")})
    return tuple(messages)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: dict[type, str] = {dict: "object", list: "list", str: "text", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
