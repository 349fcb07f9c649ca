"""Reading the logs of running processes, line by line as they are written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

__all__ = ["LogReader", "fields_of"]

_POLL_S = 0.05


class LogReader:
    """One service's log from ``offset`` on."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    @classmethod
    def at_end(cls, path: Path) -> LogReader:
        """Of what will be written from now on."""
        return cls(path, offset=path.stat().st_size)

    def new_lines(self) -> list[bytes]:
        """Whole lines since the last call."""
        if self._path.stat().st_size <= self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()

    async def wait_for(self, message: str, *, timeout_s: float) -> dict[str, Any]:
        """Fields of the next line of this message."""
        async with asyncio.timeout(timeout_s):
            while True:
                for line in self.new_lines():
                    fields = fields_of(line)
                    if fields.get("message") == message:
                        return fields
                await asyncio.sleep(_POLL_S)


def fields_of(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is not one of ours, as those that libraries write.

    Ours is written at once, but it may follow what a library's progress bar left without an end.
    """
    try:
        fields: object = json.loads(line[max(0, line.find(b"{")) :])
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
