"""A PEFT folder out of a stream of its files: whole and checked, or not there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from io import BufferedWriter
from pathlib import Path

from mint_api.runtime.v1 import exporter_service_pb2
from mint_core.errors import AlreadyExists, BlobCorrupt, InvalidArgument
from mint_core.files import atomic_folder

__all__ = ["write_peft_folder"]

_NAMES = ("adapter_config.json", "adapter_model.safetensors")


async def write_peft_folder(responses: AsyncIterator[exporter_service_pb2.ExportPeftResponse], folder: Path) -> None:
    """Write the files of an ``ExportPeft`` stream.

    Raises :class:`AlreadyExists` if ``folder`` exists, :class:`InvalidArgument` if it cannot be written,
    :class:`BlobCorrupt` if a file did not arrive as it was announced, and the errors of the call.
    """
    try:
        with atomic_folder(folder) as temporary, contextlib.ExitStack() as opened:
            current: _File | None = None
            async for response in responses:
                if response.WhichOneof("content") == "file":
                    if current is not None:
                        await asyncio.to_thread(current.finish)
                    current = _File(temporary, response.file)
                    opened.callback(current.close)
                elif current is not None:
                    await asyncio.to_thread(current.write, response.chunk.data)
            if current is not None:
                await asyncio.to_thread(current.finish)
            if sorted(each.name for each in temporary.iterdir()) != list(_NAMES):
                raise BlobCorrupt(
                    "the exporter's stream ended before the folder was whole; nothing was kept, repeat it"
                )
    except FileExistsError as error:
        raise AlreadyExists(f"{str(folder)!r} exists: name a new folder", metadata={"resource": str(folder)}) from error
    except OSError as error:
        raise InvalidArgument(f"cannot write {str(folder)!r}: {error.strerror}", field="folder") from error


class _File:
    """A file that is being written."""

    def __init__(self, folder: Path, announced: exporter_service_pb2.PeftFile) -> None:
        if announced.name not in _NAMES:
            raise BlobCorrupt(f"the exporter announced a file {announced.name[:120]!r}; nothing was kept")
        self._announced = announced
        self._hashed = hashlib.sha256()
        self._file: BufferedWriter = (folder / announced.name).open("xb")

    def write(self, data: bytes) -> None:
        self._hashed.update(data)
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        actual, expected = f"sha256:{self._hashed.hexdigest()}", self._announced.blob.digest
        if actual != expected:
            raise BlobCorrupt(
                f"{self._announced.name} arrived with digest {actual}; nothing was kept, repeat it",
                metadata={"expected": expected, "actual": actual},
            )

    def close(self) -> None:
        self._file.close()
