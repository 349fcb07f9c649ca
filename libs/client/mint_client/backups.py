"""Backup and restore of a catalog, for operators: over its runtime address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Self

from mint_api.runtime.v1 import maintenance_service_pb2, maintenance_service_pb2_grpc
from mint_client._calling import Connection
from mint_core.channel import call, stream

__all__ = ["BackupClient"]

_TIMEOUT_S = 86_400.0


class BackupClient:
    """Streams a backup out of a catalog and into one."""

    def __init__(self, catalog_runtime_address: str) -> None:
        self._connection = Connection("catalog", catalog_runtime_address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _stub(self) -> Any:
        return self._connection.stub(maintenance_service_pb2_grpc.MaintenanceServiceStub)

    def backup(self, *, timeout_s: float = _TIMEOUT_S) -> AsyncIterator[maintenance_service_pb2.BackupResponse]:
        """Header, records, trailer, as of one catalog revision."""
        return stream(self._stub.Backup, maintenance_service_pb2.BackupRequest(), timeout_s=timeout_s)

    async def restore(
        self, parts: AsyncIterator[maintenance_service_pb2.RestoreRequest], *, timeout_s: float = _TIMEOUT_S
    ) -> maintenance_service_pb2.RestoreResponse:
        """Write the parts of a backup into an empty catalog; whole or not at all."""
        response: maintenance_service_pb2.RestoreResponse = await call(self._stub.Restore, parts, timeout_s=timeout_s)
        return response
