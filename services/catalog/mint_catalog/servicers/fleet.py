"""FleetService."""

from __future__ import annotations

from typing import Any

from mint_api.v1 import fleet_service_pb2 as pb
from mint_api.v1 import fleet_service_pb2_grpc as pb_grpc
from mint_catalog.fleet.operations import Fleet
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.servicers.common import check_parent, identity
from mint_core.calls import principal
from mint_core.names import FleetOperationName, TenantName

__all__ = ["FleetServicer"]


class FleetServicer(pb_grpc.FleetServiceServicer):
    def __init__(self, fleet: Fleet, codecs: MessageCodecs) -> None:
        self._fleet = fleet
        self._codec = codecs.fleet_operation
        self._result_codec = codecs.fleet_result

    async def CreateFleetOperation(self, request: pb.CreateFleetOperationRequest, _context: Any) -> Any:
        tenant = TenantName.parse(request.parent, field="parent")
        check_parent(request.fleet_operation.name, "", field="fleet_operation.name")
        wanted = self._codec.from_message(request.fleet_operation, name=None)
        written = await self._fleet.create(
            tenant, request.fleet_operation_id, wanted, principal(), identity(request, tenant.tenant)
        )
        return pb.CreateFleetOperationResponse(
            fleet_operation=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetFleetOperation(self, request: pb.GetFleetOperationRequest, _context: Any) -> Any:
        record = await self._fleet.get(FleetOperationName.parse(request.name))
        return pb.GetFleetOperationResponse(fleet_operation=self._codec.to_message(record))

    async def ListFleetOperations(self, request: pb.ListFleetOperationsRequest, _context: Any) -> Any:
        page = await self._fleet.list(
            TenantName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListFleetOperationsResponse(
            fleet_operations=map(self._codec.to_message, page.records), next_page_token=page.next_page_token
        )

    async def ListFleetResults(self, request: pb.ListFleetResultsRequest, _context: Any) -> Any:
        page = await self._fleet.results(
            FleetOperationName.parse(request.name),
            page_size=request.page_size,
            page_token=request.page_token,
            failed_only=request.failed_only,
        )
        return pb.ListFleetResultsResponse(
            fleet_results=map(self._result_codec.to_message, page.records), next_page_token=page.next_page_token
        )

    async def CancelFleetOperation(self, request: pb.CancelFleetOperationRequest, _context: Any) -> Any:
        written = await self._fleet.cancel(FleetOperationName.parse(request.name), request.reason)
        return pb.CancelFleetOperationResponse(fleet_operation=self._codec.to_message(written.record))
