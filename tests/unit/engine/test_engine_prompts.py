"""Prompts by a real tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_engine.prompts import ChatMessage, ChatPrompt, HuggingFacePrompts, TextPrompt, TokenPrompt
from support.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("prompts") / "base")


@pytest.fixture(scope="module")
def prompts(base: Path) -> Iterator[HuggingFacePrompts]:
    prompts = HuggingFacePrompts(base, vocab_size=384)
    yield prompts
    prompts.close()


async def test_text_and_tokens(prompts: HuggingFacePrompts) -> None:
    ids = await prompts.encode(TextPrompt("The capital of France — Ωé"))
    assert len(ids) > 5
    assert await prompts.encode(TokenPrompt((0, 383, 5))) == [0, 383, 5]


async def test_chat_is_rendered_by_the_template_and_ends_with_the_assistants_turn(
    prompts: HuggingFacePrompts,
) -> None:
    chat = ChatPrompt((ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")))
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert await prompts.encode(chat) == await prompts.encode(TextPrompt(rendered))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TextPrompt(""), "prompt.text"),
        (TokenPrompt(()), "prompt"),
        (TokenPrompt((1, 384)), "prompt.tokens.ids[1]"),
        (TokenPrompt((-1,)), "prompt.tokens.ids[0]"),
        (ChatPrompt(()), "prompt.chat.messages"),
        (ChatPrompt((ChatMessage("user", "a"), ChatMessage("root", "b"))), "prompt.chat.messages[1].role"),
    ],
)
async def test_bad_prompts_are_named(prompts: HuggingFacePrompts, prompt, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await prompts.encode(prompt)
    assert raised.value.field == field


async def test_template_that_refuses_or_is_absent_is_the_callers_error(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "base")
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    prompts = HuggingFacePrompts(folder, vocab_size=384)
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        await prompts.encode(ChatPrompt((ChatMessage("user", "a"),)))
    prompts.close()
    template.unlink()
    prompts = HuggingFacePrompts(folder, vocab_size=384)
    with pytest.raises(InvalidArgument, match="no chat template"):
        await prompts.encode(ChatPrompt((ChatMessage("user", "a"),)))
    prompts.close()


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FailedPrecondition, match="tokenizer"):
        HuggingFacePrompts(tmp_path, vocab_size=384)
