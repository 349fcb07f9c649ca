"""MaintenanceService's backup and restore, a part of its servicer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_catalog.model.codec import from_message, to_message
from mint_catalog.upkeep.backup import Backup, BackupHeader, BackupPart, BackupRecord, BackupTrailer
from mint_catalog.upkeep.restore import Restore
from mint_core.errors import InvalidArgument

__all__ = ["BackupServicer"]


class BackupServicer:
    def __init__(self, backup: Backup, restore: Restore) -> None:
        self._backup = backup
        self._restore = restore

    async def Backup(self, _request: pb.BackupRequest, _context: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._backup.stream()) as parts:
            async for part in parts:
                yield _encode(part)

    async def Restore(self, requests: AsyncIterator[pb.RestoreRequest], _context: Any) -> Any:
        report = await self._restore.restore(_decode(requests))
        return pb.RestoreResponse(
            num_records=report.num_records,
            num_blobs_checked=report.missing.num_checked,
            missing_blobs=report.missing.names,
            num_missing_blobs=report.missing.num,
        )


def _encode(part: BackupPart) -> Any:
    if isinstance(part, BackupHeader):
        return pb.BackupResponse(header=to_message(part, pb.BackupHeader))
    if isinstance(part, BackupTrailer):
        return pb.BackupResponse(trailer=to_message(part, pb.BackupTrailer))
    records = [pb.BackupRecord(key=record.key, value=record.value) for record in part]
    return pb.BackupResponse(records=pb.BackupRecords(records=records))


async def _decode(requests: AsyncIterator[pb.RestoreRequest]) -> AsyncIterator[BackupPart]:
    async for request in requests:
        match request.WhichOneof("part"):
            case "header":
                yield from_message(request.header, BackupHeader)
            case "records":
                yield [BackupRecord(record.key, record.value) for record in request.records.records]
            case "trailer":
                yield from_message(request.trailer, BackupTrailer)
            case _:
                raise InvalidArgument("a message without header, records or trailer: not a backup", field="part")
