"""A child process that is asked by lines of JSON and answers so: for engines that are not MinT's."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from support.children import dying_with_parent

__all__ = ["JsonChild", "answer_lines"]

_TESTS = Path(__file__).resolve().parents[2] / "tests"
_ANSWERS_FD = "MINT_BENCH_ANSWERS_FD"


class JsonChild:
    """``python -m module``, asked one thing at a time."""

    def __init__(self, module: str, log: Path, environ: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._log = log
        self._environ = dict(environ or {})
        self._process: asyncio.subprocess.Process | None = None
        self._answers: asyncio.StreamReader | None = None
        self._pipe: IO[bytes] | None = None

    async def start(self) -> None:
        reading, writing = os.pipe()
        environ = os.environ | {"PYTHONPATH": str(_TESTS)} | self._environ | {_ANSWERS_FD: str(writing)}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *dying_with_parent([sys.executable, "-W", "ignore", "-m", self._module]),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environ,
                pass_fds=(writing,),
            )
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")
        self._answers = asyncio.StreamReader(limit=1 << 26)
        protocol = asyncio.StreamReaderProtocol(self._answers)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, self._pipe)

    async def ask(self, call: str, timeout_s: float = 900.0, **arguments: Any) -> Any:
        """What the child's function ``call`` returned. Raises RuntimeError with the end of its log if it failed."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._answers is not None
        self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
        async with asyncio.timeout(timeout_s):
            line = await self._answers.readline()
        answer = json.loads(line) if line else {"error": "it died"}
        if "error" in answer:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self._module} failed: {answer['error']}; the end of its log:\n{tail}")
        return answer["value"]

    async def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 20)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def answer_lines(calls: Mapping[str, Callable[..., Any]]) -> None:
    """In the child: answer until standard input ends. What others print goes where standard output goes."""
    with os.fdopen(int(os.environ[_ANSWERS_FD]), "wb") as answers:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = {"value": calls[asked["call"]](**asked["arguments"])}
            except Exception as error:  # noqa: BLE001 - handed to whoever asked
                traceback.print_exc()
                answer = {"error": repr(error)}
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
