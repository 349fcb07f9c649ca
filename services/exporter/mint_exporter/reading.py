"""Revisions read again: as the files of a PEFT folder, and two of them side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mint_blobs import ObjectStore, digest_file
from mint_core.errors import InvalidArgument
from mint_core.names import RevisionName
from mint_core.threads import run_to_end
from mint_exporter.keeping import store_trouble, verified_bytes
from mint_exporter.model import Catalog, RevisionBlob
from mint_exporter.scratch import Scratch
from mint_exporter.uploads import MAX_CHUNK_BYTES, Chunk
from mint_lora import LAYOUT_PARAMETERS, LAYOUT_PEFT, write_peft_folder
from mint_lora.diff import AdapterDiff, diff_adapters

__all__ = ["FolderFile", "Reader"]

_MAX_HEADER_BYTES = 32 << 20
_PEFT_LAYOUTS = (LAYOUT_PEFT, LAYOUT_PARAMETERS)


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file of a folder, before its chunks."""

    name: str
    digest: str
    size_bytes: int


class Reader:
    """Reads published revisions. One at a time is unpacked or compared, so that exports go on beside it."""

    def __init__(self, catalog: Catalog, store: ObjectStore, scratch: Scratch) -> None:
        self._catalog = catalog
        self._store = store
        self._scratch = scratch
        self._working = asyncio.Semaphore(1)

    async def peft_folder(self, name: RevisionName, layout: str) -> AsyncGenerator[FolderFile | Chunk, None]:
        """The files of a PEFT folder, each followed by its chunks. Errors as at ``ExporterService.ExportPeft``."""
        if layout not in ("", *_PEFT_LAYOUTS):
            raise InvalidArgument(
                f"layout is {layout[:80]!r}: expected {' or '.join(_PEFT_LAYOUTS)}, or nothing", field="layout"
            )
        revision = await self._catalog.revision_blob(name)
        base = await self._catalog.policy_base(name.parent)
        architecture = await self._catalog.architecture(base.base_model)
        async with await self._scratch.room(2 * revision.size_bytes + _MAX_HEADER_BYTES) as scratch:
            folder = scratch / "peft"
            async with self._working:
                blob = await self._fetch(revision, scratch / "blob")
                await run_to_end(write_peft_folder, blob, folder, layout=layout or None, architecture=architecture)
                blob.unlink()
            for path in sorted(folder.iterdir()):
                size_bytes = path.stat().st_size
                yield FolderFile(path.name, await digest_file(path), size_bytes)
                with FileIO(path, "rb") as file:
                    offset = 0
                    while data := await run_to_end(file.read, MAX_CHUNK_BYTES):
                        yield Chunk(offset, data)
                        offset += len(data)

    async def diff(self, one: RevisionName, other: RevisionName) -> AdapterDiff:
        """Compare two revisions. Errors as at ``ExporterService.DiffRevisions``."""
        if one.tenant != other.tenant:
            raise InvalidArgument(
                f"{one} and {other} belong to two tenants: only revisions of one can be compared", field="other"
            )
        revisions = [await self._catalog.revision_blob(name) for name in (one, other)]
        async with await self._scratch.room(sum(each.size_bytes for each in revisions)) as scratch, self._working:
            blobs = []
            for place, revision in enumerate(revisions):
                (folder := scratch / str(place)).mkdir()
                # Named as people name them: what is wrong is told by the file's name.
                path = folder / f"{revision.name.policy}@{revision.name.number}"
                blobs.append(await self._fetch(revision, path))
            return await run_to_end(diff_adapters, *blobs)

    async def _fetch(self, revision: RevisionBlob, path: Path) -> Path:
        with store_trouble(), verified_bytes(revision.digest):
            await self._store.get_file(
                revision.object_key, path, digest=revision.digest, size_bytes=revision.size_bytes, durable=False
            )
        return path
