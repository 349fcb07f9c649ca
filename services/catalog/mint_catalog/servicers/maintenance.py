"""MaintenanceService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_api.runtime.v1 import maintenance_service_pb2_grpc as pb_grpc
from mint_catalog.model.codec import to_message
from mint_catalog.servicers.backup import BackupServicer
from mint_catalog.upkeep.backup import Backup
from mint_catalog.upkeep.garbage import GarbageCollector
from mint_catalog.upkeep.restore import Restore

__all__ = ["MaintenanceServicer"]


class MaintenanceServicer(BackupServicer, pb_grpc.MaintenanceServiceServicer):
    def __init__(self, garbage: GarbageCollector, backup: Backup, restore: Restore) -> None:
        super().__init__(backup, restore)
        self._garbage = garbage

    async def CollectGarbage(self, request: pb.CollectGarbageRequest, _context: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._garbage.collect(dry_run=request.dry_run)) as steps:
            async for progress in steps:
                report = to_message(progress.report, pb.GarbageReport)
                yield pb.CollectGarbageResponse(step=progress.step, report=report)
