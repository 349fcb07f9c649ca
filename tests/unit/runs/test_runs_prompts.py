"""Lines to prompts: lines of SFT data are usable, and bad ones are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mint_core.errors import InvalidArgument
from mint_runs.prompts import PromptExample, parse_prompts


def parse(*lines: Any) -> list[PromptExample]:
    return parse_prompts([json.dumps(line).encode() + b"\n" for line in lines], source="prompts")


def test_a_text_prompt_with_fields() -> None:
    (prompt,) = parse({"prompt": "2 + 2 =", "answer": 4, "tags": ["easy"]})
    assert (prompt.line, prompt.prompt, prompt.prompt_text, prompt.reference) == (1, "2 + 2 =", "2 + 2 =", "")
    assert prompt.fields == {"answer": 4, "tags": ["easy"]}


def test_a_line_of_sft_data_has_a_reference() -> None:
    text, chat = parse(
        {"prompt": "Say hi", "completion": "hi"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Say hi"},
                {"role": "assistant", "content": "hi"},
            ],
            "id": 7,
        },
    )
    assert (text.reference, text.fields) == ("hi", {"completion": "hi"})
    assert (chat.reference, chat.fields) == ("hi", {"id": 7, "completion": "hi"})
    assert [message["role"] for message in chat.messages] == ["system", "user"]
    assert chat.prompt == chat.messages
    assert chat.prompt_text == "Be brief.\n\nSay hi"


def test_a_conversation_without_an_answer_is_a_prompt() -> None:
    (prompt,) = parse({"messages": [{"role": "user", "content": "Say hi"}]})
    assert (prompt.reference, prompt.fields, len(prompt.messages)) == ("", {}, 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"completion": "hi"}, "prompt is missing (keys: completion)"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a", "completion": 3}, "completion is a JSON number, not text"),
        ({"prompt": "a", "messages": []}, "has both messages and prompt or completion"),
        ({"messages": []}, "messages is not a list with at least one message"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "nothing before the assistant's first message"),
        ([1], "a JSON list, not an object"),
    ],
)
def test_a_bad_line_is_named(line: Any, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse({"prompt": "good"}, line)
    assert caught.value.message.startswith("prompts line 2: ")
    assert problem in caught.value.message
    assert '{"prompt": text, …}' in caught.value.message
