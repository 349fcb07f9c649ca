"""Garbage collection of a catalog, for operators: over its runtime address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Self

from mint_api.runtime.v1 import maintenance_service_pb2, maintenance_service_pb2_grpc
from mint_client._calling import Connection
from mint_core.channel import stream

__all__ = ["GarbageClient"]

_TIMEOUT_S = 86_400.0


class GarbageClient:
    """Collects garbage now, or tells what would be collected."""

    def __init__(self, catalog_runtime_address: str) -> None:
        self._connection = Connection("catalog", catalog_runtime_address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _stub(self) -> Any:
        return self._connection.stub(maintenance_service_pb2_grpc.MaintenanceServiceStub)

    def collect(
        self, *, dry_run: bool = False, timeout_s: float = _TIMEOUT_S
    ) -> AsyncIterator[maintenance_service_pb2.CollectGarbageResponse]:
        """What is being done and the counts so far; the last one has the whole. Closing it ends the collection."""
        request = maintenance_service_pb2.CollectGarbageRequest(dry_run=dry_run)
        return stream(self._stub.CollectGarbage, request, timeout_s=timeout_s)
