"""The runs worker's end of a scorer's process; :mod:`mint_scorers.process` is the other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from typing import Any, Self

from mint_core import log
from mint_core.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from mint_runs.scoring.outcome import Scored, one_line, seconds, unscored
from mint_scorers import Sample

__all__ = ["ScorerProcess"]

_log = log.get_logger(__name__)

_START_TIMEOUT_S = 60.0
"""A scorer may load a model when it is made."""
_REAP_TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 64 * 1024
_NUM_LAST_WORDS_BYTES = 4096


class ScorerProcess:
    """One process with one scorer in it, made by :meth:`start`; scores one sample at a time.

    It leads a session of its own, so that what a scorer starts is killed with it.
    """

    def __init__(self, name: str, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._name = name
        self._process = process
        self._requests = process.stdin
        self._answers = process.stdout
        self._last_words = b""
        self._listening = asyncio.create_task(self._listen(process.stderr))
        self._is_killed = False

    @classmethod
    async def start(cls, name: str, options: Mapping[str, str]) -> Self:
        """Start a process and let it make the scorer.

        Raises :class:`NotFound` for a scorer that is not installed, :class:`InvalidArgument` for options it does not
        take, :class:`FailedPrecondition` if it cannot be made, :class:`Unavailable` if there can be no process.
        """
        # Where the worker happens to stand must not decide what a scorer imports (-P). MINT_… are the worker's own
        # settings, with its secrets, and no business of a scorer's.
        environ = {key: value for key, value in os.environ.items() if not key.upper().startswith("MINT_")}
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-u", "-m", "mint_scorers", name),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                limit=_MAX_ANSWER_BYTES,
                env=environ,
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(
                f"no process can be started for scorer {name!r}: {error}; free some on the worker's machine"
            ) from error
        started = cls(name, process)
        try:
            await started._make(options)
        except BaseException:  # failed or cancelled: nobody else knows of the process
            await started.kill()
            raise
        return started

    @property
    def has_ended(self) -> bool:
        """Whether there is no process any more that could be given a sample."""
        return self._is_killed or self._process.returncode is not None

    async def score(self, sample: Sample, timeout_s: float) -> Scored:
        """Outcome for one sample. After a time-out or a death the process is gone, see :attr:`has_ended`."""
        try:
            request = _line(prompt=sample.prompt, completion=sample.completion, example=dict(sample.example))
        except (TypeError, ValueError, RecursionError) as error:
            return unscored(f"the sample cannot be written as JSON: {error}")
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._ask(request)
        except TimeoutError:
            await self.kill()
            self._warn("a scorer timed out")
            return unscored(f"the scorer timed out after {seconds(timeout_s)}")
        except BaseException:  # cancelled: the answer that is under way would be taken for the next sample's
            await self.kill()
            raise
        if answer is None:
            await self.kill()
            self._warn("a scorer's process ended")
            return unscored(f"the scorer's process {self._ending()}")
        value = answer.get("value")
        return Scored(value) if isinstance(value, float) else unscored(str(answer.get("error")))

    async def kill(self) -> None:
        """End it and everything it started."""
        if self._is_killed:
            return
        self._is_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._requests.close()
        try:
            async with asyncio.timeout(_REAP_TIMEOUT_S):
                await self._process.wait()
                await self._listening
        except TimeoutError:
            # What it started in a session of its own still holds its pipes.
            self._warn("a scorer left a process behind")
        finally:
            self._listening.cancel()

    async def _make(self, options: Mapping[str, str]) -> None:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                answer = await self._ask(_line(options=dict(options)))
        except TimeoutError:
            self._warn("a scorer did not start")
            raise FailedPrecondition(
                f"scorer {self._name!r} was not ready after {seconds(_START_TIMEOUT_S)}: let it load less, or serve it "
                "by gRPC"
            ) from None
        if answer is None:
            await self.kill()
            self._warn("a scorer's process ended while it started")
            raise FailedPrecondition(
                f"scorer {self._name!r} cannot be made: its process {self._ending()}; the worker's log has what it said"
            )
        error = one_line(str(answer.get("error")))
        match answer.get("refused"):
            case "name":
                raise NotFound(error, metadata={"scorer": self._name})
            case "scorer":
                raise FailedPrecondition(error)
            case "options":
                raise InvalidArgument(error, field="scorer_options")

    async def _ask(self, request: bytes) -> dict[str, Any] | None:
        """The process's answer, or None if it has ended or what it says is no answer."""
        try:
            self._requests.write(request)
            await self._requests.drain()
            line = await self._answers.readline()
            answer = json.loads(line)
        except (ConnectionError, ValueError):  # ValueError: an overlong line, half a line, or none
            return None
        return answer if isinstance(answer, dict) else None

    async def _listen(self, errors: asyncio.StreamReader) -> None:
        """Read what the scorer prints, so that it never waits for a reader, and keep the end of it."""
        while words := await errors.read(65536):
            self._last_words = (self._last_words + words)[-_NUM_LAST_WORDS_BYTES:]

    def _warn(self, what: str) -> None:
        fields = {"scorer": self._name, "last_words": self._last_words.decode(errors="replace")}
        _log.warning(what, extra={"fields": fields})

    def _ending(self) -> str:
        status = self._process.returncode
        if status is None:
            return "ended"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"
