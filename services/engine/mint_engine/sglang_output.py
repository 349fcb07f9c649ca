"""Reads SGLang's streamed output of one request."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from mint_core.errors import Internal, InvalidArgument, Unavailable
from mint_engine.adapter_engine import Delta, Finish, FinishReason, GenerationCall
from mint_engine.stop_text import StopTextFilter

__all__ = ["OutputReader"]

_BAD_REQUEST = 400
_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class OutputReader:
    """Turns one request's outputs, which are increments, into deltas."""

    def __init__(self, call: GenerationCall, *, decode_token: Callable[[int], str]) -> None:
        self._call = call
        self._decode_token = decode_token
        self._filter = StopTextFilter(call.sampling.stop)
        self._prompt_logprobs: tuple[float, ...] = ()

    def read(self, output: Mapping[str, Any]) -> Delta | None:
        """The next delta, or ``None`` where there is nothing to tell yet.

        Raises :class:`InvalidArgument` or :class:`Unavailable` when SGLang gave the request up with such a status.
        """
        meta = output["meta_info"]
        reason = meta.get("finish_reason")
        if reason is not None:
            _raise_if_refused(reason)
        token_ids = tuple(output["output_ids"])
        logprobs = self._logprobs(meta, len(token_ids))
        if self._call.with_prompt_logprobs and meta.get("input_token_logprobs"):
            self._prompt_logprobs = tuple(float(entry[0]) for entry in meta["input_token_logprobs"][1:])
        text = self._text(output.get("text") or "", reason)
        if reason is None:
            return Delta(token_ids, logprobs, text) if token_ids or text else None
        return Delta(token_ids, logprobs, text, self._finish(meta, reason))

    def _logprobs(self, meta: Mapping[str, Any], num_tokens: int) -> tuple[float, ...]:
        if not self._call.with_logprobs:
            return ()
        logprobs = tuple(float(entry[0]) for entry in meta.get("output_token_logprobs") or ())
        if len(logprobs) != num_tokens:
            raise Internal(f"SGLang returned {len(logprobs)} log-probabilities for {num_tokens} tokens")
        return logprobs

    def _text(self, text: str, reason: Mapping[str, Any] | None) -> str:
        matched = reason.get("matched") if reason is not None else None
        if self._call.sampling.stop and isinstance(matched, int):
            # Asked to leave stop texts in, SGLang leaves stop tokens in as well.
            text = text.removesuffix(self._decode_token(matched))
        certain = self._filter.feed(text)
        return certain if reason is None else certain + self._filter.close()

    def _finish(self, meta: Mapping[str, Any], reason: Mapping[str, Any]) -> Finish:
        routed = meta.get("routed_experts")
        return Finish(
            reason=_REASONS.get(str(reason.get("type")), "abort"),
            num_prompt_tokens=int(meta["prompt_tokens"]),
            num_completion_tokens=int(meta["completion_tokens"]),
            num_cached_tokens=int(meta.get("cached_tokens") or 0),
            prompt_logprobs=self._prompt_logprobs,
            routed_experts=base64.b64decode(routed) if routed else b"",
        )


def _raise_if_refused(reason: Mapping[str, Any]) -> None:
    status = reason.get("status_code")
    if reason.get("type") != "abort" or status is None:
        return
    message = f"SGLang gave the request up: {reason.get('message', 'no reason given')}"
    if int(status) == _BAD_REQUEST:
        raise InvalidArgument(message)
    raise Unavailable(message)
