"""Lines to examples to token ids, and which of them a step takes."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_runs.data import ChatExample, TextExample, parse_examples
from mint_runs.examples import tokenize_examples
from mint_runs.order import permutation, step_indices
from mint_runs.tokenization import BaseTokenizer

NOW = datetime.datetime(2025, 1, 31, tzinfo=datetime.UTC)
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '<e>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def make_base(folder: Path, template: str | None = TEMPLATE, eos: object = "<e>") -> Path:
    """A folder with a byte-level tokenizer of one token for each byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"eos_token": eos}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    return BaseTokenizer(make_base(tmp_path_factory.mktemp("base")))


def spelled(tokenizer: BaseTokenizer, ids: tuple[int, ...], loss: tuple[bool, ...]) -> tuple[str, str]:
    """The text of an example, and the same with everything without loss as dots."""
    texts = [tokenizer._tokenizer.id_to_token(token).replace("Ċ", "\n").replace("Ġ", " ") for token in ids]
    masked = "".join(text if carries else "." * len(text) for text, carries in zip(texts, loss, strict=True))
    return "".join(texts), masked


def test_text_examples_carry_loss_on_the_completion_and_its_end(tokenizer: BaseTokenizer) -> None:
    examples = parse_examples([b'{"prompt": "ab", "completion": "cd"}'], source="train_data")
    (done,) = tokenize_examples(examples, tokenizer, max_tokens=9, source="train_data", now=NOW)
    assert spelled(tokenizer, done.token_ids, done.carries_loss) == ("abcd<e>", "..cd<e>")
    datum = done.datum()
    assert list(datum.tokens) == list(done.token_ids[:-1])
    assert list(datum.targets) == list(done.token_ids[1:])
    assert list(datum.weights) == [0.0, 1.0, 1.0, 1.0]
    assert done.num_loss_tokens == 3


def test_chat_examples_carry_loss_on_what_the_assistant_says(tokenizer: BaseTokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    examples = parse_examples([json.dumps({"messages": messages}).encode()], source="train_data")
    (done,) = tokenize_examples(examples, tokenizer, max_tokens=99, source="train_data", now=NOW)
    text, masked = spelled(tokenizer, done.token_ids, done.carries_loss)
    assert text == "<s>system:S<e>\n<s>user:q<e>\n<s>assistant:a<e>\n<s>user:r<e>\n<s>assistant:b<e>"
    assert masked.replace(".", "") == "a<e>b<e>"
    assert masked.index("a<e>") == text.index("a<e>")


def test_a_template_without_end_tokens_gets_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    plain = BaseTokenizer(make_base(tmp_path / "b", template))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]
    (done,) = tokenize_examples([ChatExample(1, tuple(messages))], plain, max_tokens=9, source="s", now=NOW)
    assert spelled(plain, done.token_ids, done.carries_loss) == ("uqaz<e>", "...z<e>")


def test_a_template_that_rewrites_its_beginning_is_refused(tmp_path: Path) -> None:
    odd = BaseTokenizer(make_base(tmp_path / "b", "{{ messages | length }}{{ messages[-1].content }}"))
    example = ChatExample(3, ({"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}))
    with pytest.raises(InvalidArgument, match=r"train_data line 3: cannot tell where messages\[1\] begins"):
        tokenize_examples([example], odd, max_tokens=9, source="train_data", now=NOW)


def test_templates_may_refuse_and_may_write_the_date(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ strftime_now('%d %b %Y') }}{{ messages[0].content | tojson }}"
    )
    base = BaseTokenizer(make_base(tmp_path / "b", template))
    rendered = base.render_chat([{"role": "user", "content": "é"}], add_generation_prompt=True, now=NOW)
    assert rendered == '31 Jan 2025"é"'
    with pytest.raises(InvalidArgument, match="no system"):
        base.render_chat([{"role": "system", "content": "s"}], add_generation_prompt=True, now=NOW)


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    base = BaseTokenizer(make_base(tmp_path / "b", "{{ ''.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(InvalidArgument, match="refuses"):
        base.render_chat([{"role": "user", "content": "q"}], add_generation_prompt=True, now=NOW)


def test_a_base_without_template_takes_text_only(tmp_path: Path) -> None:
    base = BaseTokenizer(make_base(tmp_path / "b", None))
    assert base.encode_part("a")
    with pytest.raises(InvalidArgument, match="no chat template"):
        base.render_chat([{"role": "user", "content": "q"}], add_generation_prompt=True, now=NOW)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
        (lambda f: make_base(f, eos="<nope>"), "eos_token '<nope>'"),
        (lambda f: make_base(f, "{% for %}"), "chat template"),
    ],
)
def test_an_unusable_folder_is_named(tmp_path: Path, break_it: object, message: str) -> None:
    folder = make_base(tmp_path / "b")
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(FailedPrecondition, match=message):
        BaseTokenizer(folder)


def test_too_long_examples_are_refused_by_line(tokenizer: BaseTokenizer) -> None:
    lines = [b'{"prompt": "a", "completion": "b"}', b"", b'{"prompt": "abcdef", "completion": "b"}']
    examples = parse_examples(lines, source="eval_data")
    with pytest.raises(InvalidArgument, match="eval_data line 3: has 8 tokens, max_tokens is 4") as caught:
        tokenize_examples(examples, tokenizer, max_tokens=4, source="eval_data", now=NOW)
    assert caught.value.field == "eval_data"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"\xff", "not UTF-8 at byte 1"),
        (b"[1]", "a JSON list, not an object"),
        (b"null", "a JSON null, not an object"),
        (b"{}", r"prompt is missing \(keys: none\)"),
        (b'{"prompt": "a"}', r"completion is missing \(keys: prompt\)"),
        (b'{"prompt": "", "completion": "b"}', "prompt is empty"),
        (b'{"prompt": "a", "completion": 3}', "completion is a JSON number, not text"),
        (b'{"prompt": "a", "completion": true}', "completion is a JSON boolean, not text"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "prompt has half of a surrogate pair"),
        (b'{"prompt": "a", "messages": []}', "has both messages and prompt"),
        (b'{"messages": []}', "messages is not a list with at least one message"),
        (b'{"messages": ["a"]}', r"messages\[0\] is a JSON text, not an object"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', r"messages\[0\].role is 'bot'"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content is missing"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "x"}]}', r"messages\[0\] has 'name'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "the last message is the user's"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            "messages has nothing before the assistant's first message",
        ),
        (b"[" * 100_000, "not usable: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_what_is_expected(line: bytes, message: str) -> None:
    good = b'{"prompt": "a", "completion": "b"}\n'
    with pytest.raises(InvalidArgument, match=f"^train_data line 2: {message}.*; expected one JSON object a line"):
        parse_examples([good, line + b"\n"], source="train_data")


def test_other_bad_lines_are_counted() -> None:
    with pytest.raises(InvalidArgument, match=r"line 1: .*; also bad: line 2, 3, 4, 5, 6 and 2 more$"):
        parse_examples([b"{"] * 8, source="train_data")


@pytest.mark.parametrize("lines", [[], [b"\n", b"  \n"]])
def test_no_example_at_all_is_an_error(lines: list[bytes]) -> None:
    with pytest.raises(InvalidArgument, match="train_data has no example"):
        parse_examples(lines, source="train_data")


def test_a_byte_order_mark_is_skipped() -> None:
    (example,) = parse_examples([b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}'], source="s")
    assert example == TextExample(1, "a", "b")


@given(st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 20))
def test_every_epoch_takes_every_example_once(seed: int, batch_size: int, num_examples: int) -> None:
    num_steps = num_examples  # num_examples * batch_size positions: batch_size whole epochs
    taken = [i for step in range(num_steps) for i in step_indices(seed, step, batch_size, num_examples)]
    for start in range(0, len(taken), num_examples):
        assert sorted(taken[start : start + num_examples]) == list(range(num_examples))


def test_the_order_never_changes() -> None:
    # Written down: another order would make resumed runs end with other bytes.
    assert permutation(7, 0, 8) == (2, 4, 5, 7, 1, 6, 0, 3)
    assert permutation(7, 1, 8) != permutation(7, 0, 8)
    assert permutation(8, 0, 8) != permutation(7, 0, 8)


def test_the_worker_never_imports_torch(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "b")
    code = (
        "import sys, pathlib, mint_runs.app, mint_runs.__main__\n"
        "from mint_runs.tokenization import BaseTokenizer\n"
        "BaseTokenizer(pathlib.Path(sys.argv[1])).encode_prompt('a')\n"
        "print(sorted({'torch', 'transformers', 'peft', 'sglang', 'etcd3aio'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
