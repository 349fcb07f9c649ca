"""Lines of JSON to prompts: what to ask a policy, and what its scorer may look at.

Lines for supervised fine-tuning are usable as they are: what they end with, which would be trained on, becomes the
reference that a scorer may compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mint_client import PromptLike
from mint_runs.data import LineProblem, parse_lines, parse_messages, parse_text

__all__ = ["PromptExample", "parse_prompts"]

EXPECTED = (
    'expected one JSON object a line: {"prompt": text, …} or {"messages": [{"role": "system" | "user" | "assistant", '
    '"content": text}, …], …}, with a last assistant message or "completion" as reference if there is one'
)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """One line: a text to continue or a conversation to answer."""

    line: int
    text: str
    """The prompt as it is; empty if it is a conversation."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation up to the answer, rendered by the base's chat template; empty if the prompt is a text."""
    reference: str
    """A good completion, or empty."""
    fields: Mapping[str, Any]
    """The line's other fields, and the reference, where there is one, as "completion": what the scorer gets."""

    @property
    def prompt(self) -> PromptLike:
        """What inference is asked."""
        return self.messages or self.text

    @property
    def prompt_text(self) -> str:
        """The prompt as a scorer reads it: of a conversation what was said, without the template's marks."""
        return self.text or "\n\n".join(message["content"] for message in self.messages)


def parse_prompts(lines: Iterable[bytes], *, source: str) -> list[PromptExample]:
    """Prompts of a JSONL file. Raises :class:`InvalidArgument` as :func:`mint_runs.data.parse_lines`."""
    return parse_lines(lines, _prompt, source=source, expected=EXPECTED)


def _prompt(value: dict[str, Any], number: int) -> PromptExample:
    fields = {key: field for key, field in value.items() if key not in ("prompt", "messages")}
    if "messages" not in value:
        text = parse_text(value, "prompt")
        reference = parse_text(value, "completion") if "completion" in value else ""
        return PromptExample(number, text, (), reference, fields)
    messages = parse_messages(value["messages"])
    if messages[-1]["role"] != "assistant":
        return PromptExample(number, "", messages, "", fields)
    if len(messages) == 1:
        raise LineProblem("messages has nothing before the assistant's first message")
    reference = messages[-1]["content"]
    return PromptExample(number, "", messages[:-1], reference, fields | {"completion": reference})
