"""Examples to token ids, with the loss on completions only.

Prompt and completion are tokenized apart, because that is what happens when they are served: the prompt is tokenized
alone and the model goes on from there. Each completion ends with the base's end token, which carries loss too.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from mint_api.v1 import session_service_pb2
from mint_core.errors import InvalidArgument
from mint_runs.data import ChatExample, Example, LineProblem, TextExample, bad_lines
from mint_runs.tokenization import BaseTokenizer

__all__ = ["TokenizedExample", "tokenize_examples"]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a whole example."""

    token_ids: tuple[int, ...]
    """Length n, at least 2."""
    carries_loss: tuple[bool, ...]
    """Length n: whether the token belongs to a completion. Never the first."""

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.carries_loss)

    def datum(self) -> session_service_pb2.Datum:
        """Inputs and targets, both of length n - 1, the targets one place ahead."""
        return session_service_pb2.Datum(
            tokens=self.token_ids[:-1],
            targets=self.token_ids[1:],
            weights=[1.0 if carries else 0.0 for carries in self.carries_loss[1:]],
        )


def tokenize_examples(
    examples: Sequence[Example], tokenizer: BaseTokenizer, *, max_tokens: int, source: str, now: datetime.datetime
) -> list[TokenizedExample]:
    """Tokenize all; :class:`InvalidArgument` names the lines that cannot be used, also those over ``max_tokens``.

    ``now`` is for chat templates that write a date: a run that is resumed tomorrow must see the same tokens.
    """
    tokenized: list[TokenizedExample] = []
    problems: list[tuple[int, str]] = []
    for example in examples:
        try:
            done = _text(example, tokenizer) if isinstance(example, TextExample) else _chat(example, tokenizer, now)
        except LineProblem as problem:
            problems.append((example.line, str(problem)))
        except InvalidArgument as error:
            problems.append((example.line, error.message))
        else:
            if len(done.token_ids) > max_tokens:
                problems.append((example.line, f"has {len(done.token_ids)} tokens, max_tokens is {max_tokens}"))
            tokenized.append(done)
    if problems:
        raise bad_lines(source, problems, expected="correct, shorten or leave out such examples")
    return tokenized


def _text(example: TextExample, tokenizer: BaseTokenizer) -> TokenizedExample:
    prompt = tokenizer.encode_prompt(example.prompt)
    completion = tokenizer.encode_part(example.completion)
    if not prompt:
        raise LineProblem("prompt has no tokens")
    if not completion:
        raise LineProblem("completion has no tokens")
    return _joined([(prompt, False), ([*completion, tokenizer.end_token_id], True)])


def _chat(example: ChatExample, tokenizer: BaseTokenizer, now: datetime.datetime) -> TokenizedExample:
    parts: list[tuple[list[int], bool]] = []
    done = ""
    for place, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(example.messages[:place], add_generation_prompt=True, now=now)
        after = tokenizer.render_chat(example.messages[: place + 1], add_generation_prompt=False, now=now)
        if not before.startswith(done) or not after.startswith(before) or len(before) == len(done):
            raise LineProblem(
                f"cannot tell where messages[{place}] begins: the base's chat template does not write a conversation "
                "as a continuation of its beginning"
            )
        completion = tokenizer.encode_part(after[len(before) :])
        trailing: list[int] = []
        if tokenizer.end_token_id in completion:
            # What the template writes after the end of the turn belongs to the next prompt.
            end = len(completion) - completion[::-1].index(tokenizer.end_token_id)
            completion, trailing = completion[:end], completion[end:]
        else:
            completion = [*completion, tokenizer.end_token_id]
        parts += [(tokenizer.encode_part(before[len(done) :]), False), (completion, True), (trailing, False)]
        done = after
    while parts and not parts[-1][1]:
        parts.pop()
    if not parts[0][0]:
        raise LineProblem("the part before the assistant's first message has no tokens")
    return _joined(parts)


def _joined(parts: Sequence[tuple[list[int], bool]]) -> TokenizedExample:
    return TokenizedExample(
        token_ids=tuple(token_id for token_ids, _ in parts for token_id in token_ids),
        carries_loss=tuple(carries for token_ids, carries in parts for _ in token_ids),
    )
