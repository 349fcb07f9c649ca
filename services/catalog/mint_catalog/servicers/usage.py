"""UsageService, and UsageReportService behind it."""

from __future__ import annotations

from typing import Any

from mint_api.runtime.v1 import usage_report_service_pb2 as report_pb
from mint_api.runtime.v1 import usage_report_service_pb2_grpc as report_pb_grpc
from mint_api.v1 import usage_service_pb2 as pb
from mint_api.v1 import usage_service_pb2_grpc as pb_grpc
from mint_catalog.model.codec import from_message, to_message
from mint_catalog.trail.usage import UsageCount, UsageQuery, Usages

__all__ = ["UsageReportServicer", "UsageServicer"]


class UsageServicer(pb_grpc.UsageServiceServicer):
    def __init__(self, usages: Usages) -> None:
        self._usages = usages

    async def GetUsage(self, request: pb.GetUsageRequest, _context: Any) -> Any:
        usage = await self._usages.get(from_message(request, UsageQuery))
        return pb.GetUsageResponse(usage=to_message(usage, pb.Usage))


class UsageReportServicer(report_pb_grpc.UsageReportServiceServicer):
    def __init__(self, usages: Usages) -> None:
        self._usages = usages

    async def ReportUsage(self, request: report_pb.ReportUsageRequest, _context: Any) -> Any:
        await self._usages.report(request.reporter, [from_message(each, UsageCount) for each in request.counts])
        return report_pb.ReportUsageResponse()
