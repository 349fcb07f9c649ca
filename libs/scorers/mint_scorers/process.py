"""One scorer in a process of its own, so that a scorer that hangs or dies takes nobody with it.

``python -m mint_scorers NAME`` reads lines of JSON from standard input and answers each by one line of JSON on standard
output, in order::

    {"options": {"normalize": "casefold"}}                              → {"ready": true}
    {"prompt": "2 + 2", "completion": "4", "example": {"answer": 4}}    → {"value": 1.0} or {"error": "…"}

If the scorer cannot be made, the first answer is ``{"refused": "name" | "scorer" | "options", "error": "…"}`` and
the process ends. It ends as well with its input, and with the process that started it.

Whatever a scorer prints goes to standard error: the descriptors of the conversation are moved out of its way first.
"""

from __future__ import annotations

import ctypes
import json
import math
import numbers
import os
import signal
from collections.abc import Mapping
from typing import Any, BinaryIO

from mint_scorers.installed import UnknownScorer, UnusableScorer, make_scorer
from mint_scorers.scorer import Sample, Scorer

__all__ = ["serve"]

_MAX_ERROR_CHARS = 1000
_PR_SET_PDEATHSIG = 1


def serve(name: str) -> None:
    """Be the process of scorer ``name`` until its input ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a scorer that hangs does not see its input end
    requests, answers = _take_stdio()
    with requests, answers:
        first = requests.readline()
        if not first:
            return
        scorer, answer = _make(name, json.loads(first)["options"])
        _write(answers, answer)
        if scorer is None:
            return
        for line in requests:
            _write(answers, _score(scorer, Sample(**json.loads(line))))


def _take_stdio() -> tuple[BinaryIO, BinaryIO]:
    """The conversation's ends, on descriptors that a scorer does not know and its children do not inherit."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _write(answers: BinaryIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _make(name: str, options: Mapping[str, str]) -> tuple[Scorer | None, dict[str, Any]]:
    try:
        return make_scorer(name, options), {"ready": True}
    except UnknownScorer as error:
        return None, {"refused": "name", "error": _text(error)}
    except UnusableScorer as error:
        return None, {"refused": "scorer", "error": _text(error)}
    except ValueError as error:
        return None, {"refused": "options", "error": f"scorer {name!r} does not take its options: {_text(error)}"}


def _score(scorer: Scorer, sample: Sample) -> dict[str, Any]:
    try:
        value: object = scorer(sample)
        # numbers.Real: numpy's scalars are among them, texts and arrays are not.
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            shown = repr(value) if value is None or isinstance(value, bool) else f"one of type {type(value).__name__}"
            return {"error": f"the scorer returned {shown}, not a number"}
        reward = float(value)
        if not math.isfinite(reward):
            return {"error": f"the scorer returned {reward}, not a finite number"}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a scorer is an installed package's code and may raise anything
        return {"error": f"the scorer raised {type(error).__name__}: {_text(error)}"}
    return {"value": reward}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_ERROR_CHARS]
    except Exception as second:  # noqa: BLE001 - also the text of an error is a scorer's code
        return f"(its text cannot be had: {type(second).__name__})"
