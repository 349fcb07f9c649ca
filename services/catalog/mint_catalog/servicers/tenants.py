"""TenantService."""

from __future__ import annotations

from typing import Any

from mint_api.v1 import tenant_service_pb2 as pb
from mint_api.v1 import tenant_service_pb2_grpc as pb_grpc
from mint_catalog.fleet.erasure import Erasures
from mint_catalog.model.codecs import MessageCodecs
from mint_core.calls import principal
from mint_core.names import TenantErasureName, TenantName

__all__ = ["TenantServicer"]


class TenantServicer(pb_grpc.TenantServiceServicer):
    def __init__(self, erasures: Erasures, codecs: MessageCodecs) -> None:
        self._erasures = erasures
        self._codec = codecs.erasure

    async def DeleteTenant(self, request: pb.DeleteTenantRequest, _context: Any) -> Any:
        tenant = TenantName.parse(request.name)
        record = await self._erasures.begin(tenant, request.confirm, request.reason, principal())
        return pb.DeleteTenantResponse(tenant_erasure=self._codec.to_message(record))

    async def GetTenantErasure(self, request: pb.GetTenantErasureRequest, _context: Any) -> Any:
        record = await self._erasures.get(TenantErasureName.parse(request.name))
        return pb.GetTenantErasureResponse(tenant_erasure=self._codec.to_message(record))
