"""Groups over whole tenants: verbs over many policies, and a tenant's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import fleet_service_pb2, fleet_service_pb2_grpc, tenant_service_pb2, tenant_service_pb2_grpc
from mint_client._calling import Connection, new_request_id, pages
from mint_core.channel import call
from mint_core.clock import Deadline
from mint_core.errors import Unavailable

__all__ = ["FleetOperations", "Tenants"]

_POLL_S = 0.5


class FleetOperations:
    """Verbs over all policies of a filter; ``name`` is ``tenants/{t}/fleetOperations/{o}``."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    @property
    def _stub(self) -> Any:
        return self._connection.stub(fleet_service_pb2_grpc.FleetServiceStub)

    async def create(
        self,
        tenant: str,
        operation: fleet_service_pb2.FleetOperation,
        *,
        operation_id: str = "",
        request_id: str | None = None,
    ) -> fleet_service_pb2.FleetOperation:
        """Begin ``operation``: its filter, verb and reason. Without ``operation_id`` the catalog chooses a name."""
        request = fleet_service_pb2.CreateFleetOperationRequest(
            parent=f"tenants/{tenant}",
            fleet_operation_id=operation_id,
            fleet_operation=operation,
            request_id=request_id or new_request_id(),
        )
        return (await call(self._stub.CreateFleetOperation, request, timeout_s=self._timeout_s)).fleet_operation

    async def get(self, name: str) -> fleet_service_pb2.FleetOperation:
        request = fleet_service_pb2.GetFleetOperationRequest(name=name)
        return (await call(self._stub.GetFleetOperation, request, timeout_s=self._timeout_s)).fleet_operation

    def list(self, tenant: str, *, page_size: int = 0) -> AsyncIterator[fleet_service_pb2.FleetOperation]:
        """All operations of ``tenant``."""

        async def read(token: str) -> Any:
            request = fleet_service_pb2.ListFleetOperationsRequest(
                parent=f"tenants/{tenant}", page_size=page_size, page_token=token
            )
            return await call(self._stub.ListFleetOperations, request, timeout_s=self._timeout_s)

        return pages(read, "fleet_operations")

    def results(
        self, name: str, *, failed_only: bool = False, page_size: int = 0
    ) -> AsyncIterator[fleet_service_pb2.FleetResult]:
        """The results of the items tried so far."""

        async def read(token: str) -> Any:
            request = fleet_service_pb2.ListFleetResultsRequest(
                name=name, page_size=page_size, page_token=token, failed_only=failed_only
            )
            return await call(self._stub.ListFleetResults, request, timeout_s=self._timeout_s)

        return pages(read, "fleet_results")

    async def cancel(self, name: str, *, reason: str = "") -> fleet_service_pb2.FleetOperation:
        request = fleet_service_pb2.CancelFleetOperationRequest(name=name, reason=reason)
        return (await call(self._stub.CancelFleetOperation, request, timeout_s=self._timeout_s)).fleet_operation

    async def wait(self, name: str, *, timeout_s: float = 86_400.0) -> fleet_service_pb2.FleetOperation:
        """The operation once it has ended. Raises ``DeadlineExceeded``."""
        deadline = Deadline.after(timeout_s)
        while True:
            try:
                operation = await self.get(name)
            except Unavailable:  # it survives restarts of the catalog, and so does waiting for it
                operation = None
            if operation is not None and operation.state != fleet_service_pb2.FLEET_OPERATION_STATE_RUNNING:
                return operation
            deadline.check(f"{name}, or waiting for it,")
            await asyncio.sleep(min(_POLL_S, deadline.remaining_s))


class Tenants:
    """A tenant's end."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    @property
    def _stub(self) -> Any:
        return self._connection.stub(tenant_service_pb2_grpc.TenantServiceStub)

    async def delete(self, tenant: str, *, confirm: str, reason: str = "") -> tenant_service_pb2.TenantErasure:
        """Begin to erase everything of ``tenant``; ``confirm`` is its id again. It cannot be undone."""
        request = tenant_service_pb2.DeleteTenantRequest(
            name=f"tenants/{tenant}", confirm=f"tenants/{confirm}", reason=reason
        )
        return (await call(self._stub.DeleteTenant, request, timeout_s=self._timeout_s)).tenant_erasure

    async def erasure(self, tenant: str) -> tenant_service_pb2.TenantErasure:
        """The erasure under way, or the proof of the last one."""
        request = tenant_service_pb2.GetTenantErasureRequest(name=f"tenants/{tenant}/erasure")
        return (await call(self._stub.GetTenantErasure, request, timeout_s=self._timeout_s)).tenant_erasure
