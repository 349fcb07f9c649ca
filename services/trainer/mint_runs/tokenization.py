"""The base's tokenizer and chat template, read from its folder without torch or transformers.

Text goes through ``tokenizer.json`` as the engine's own tokenizer reads it; chat templates are Jinja, rendered in a
sandbox with the same options and helpers that transformers gives them. Code in the folder is never run.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from mint_core.errors import FailedPrecondition, InvalidArgument

__all__ = ["BaseTokenizer"]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class BaseTokenizer:
    """See the module. Raises :class:`FailedPrecondition` if the folder has no usable tokenizer."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            # The library raises bare Exceptions; whatever it is, the folder is unusable.
            raise FailedPrecondition(f"the base model folder {folder} has no usable tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = {
            name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name) and _content(config[name])
        }
        self._template = _template(folder, config)
        self.end_token_id: int = self._id_of_end_token(folder, config)
        """What ends a completion."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer itself puts around one."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a text that goes on after another one: nothing is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, now: datetime.datetime
    ) -> str:
        """The conversation as the base's chat template writes it; templates that write a date write ``now``'s.

        Raises :class:`InvalidArgument` if there is no template or it refuses the conversation.
        """
        if self._template is None:
            raise InvalidArgument("this base model has no chat template: use prompt and completion", field="messages")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
                **self._special,
            )
        except jinja2.TemplateError as error:
            # Templates refuse by raising, for example when user and assistant do not alternate.
            raise InvalidArgument(f"the base's chat template refuses it: {error}", field="messages") from error

    def _id_of_end_token(self, folder: Path, config: Mapping[str, Any]) -> int:
        token = self._special.get("eos_token")
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token_id is None:
            raise FailedPrecondition(
                f"{folder / 'tokenizer_config.json'} has eos_token {config.get('eos_token')!r}: expected a token of "
                "tokenizer.json, which ends every completion"
            )
        return int(token_id)


def _content(token: Any) -> str:
    """A special token as text; configurations have it as such or as an object."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}; name a complete Hugging Face folder") from error
    if not isinstance(value, dict):
        raise FailedPrecondition(f"{path} is not a JSON object; name a complete Hugging Face folder")
    return value


def _template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    if not source:
        return None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise FailedPrecondition(f"the chat template of {folder} is not usable: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
