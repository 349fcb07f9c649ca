"""The engine and the catalog behind the Protocols of this room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

import grpc

from mint_api.runtime.v1 import engine_service_pb2 as engine_pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as engine_grpc
from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import alias_service_pb2_grpc as alias_grpc
from mint_api.v1 import common_pb2
from mint_core import log
from mint_core.channel import call, stream
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, RevisionName
from mint_loader.model import AdapterRef, EngineLoad, Resident
from mint_loader.prefetch import AliasMove, Target

__all__ = ["CatalogClient", "EngineClient"]

_log = log.get_logger(__name__)


class EngineClient:
    """An :class:`~mint_loader.model.Engine` over its channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = engine_grpc.EngineServiceStub(channel)

    async def load(self, digest: str, folder: str, *, into_slot: bool, timeout_s: float) -> EngineLoad:
        request = engine_pb.LoadAdapterRequest(digest=digest, folder=folder, into_slot=into_slot)
        response: engine_pb.LoadAdapterResponse = await call(self._stub.LoadAdapter, request, timeout_s=timeout_s)
        return EngineLoad(response.already_resident, response.load_ms)

    async def resident(self, *, timeout_s: float) -> Resident:
        response: engine_pb.GetResidencyResponse = await call(
            self._stub.GetResidency, engine_pb.GetResidencyRequest(), timeout_s=timeout_s
        )
        return Resident(
            response.engine_replica.numerics.base_digest,
            frozenset(adapter.digest for adapter in response.adapters),
            tuple(_checked(response.adapters_to_load)),
        )


class CatalogClient:
    """A :class:`~mint_loader.prefetch.Catalog` over its channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = alias_grpc.AliasServiceStub(channel)
        self._timeout_s = timeout_s

    async def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        request = alias_pb.WatchAliasesRequest(parent="tenants/-", start_after_catalog_revision=after)
        async for response in stream(self._stub.WatchAliases, request, timeout_s=None):
            yield _alias_move(response)

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        request = alias_pb.ResolveRequest(name=str(revision))
        response: alias_pb.ResolveResponse = await call(self._stub.Resolve, request, timeout_s=self._timeout_s)
        resolution = response.resolution
        return AdapterRef.checked(
            tenant=f"tenants/{revision.tenant}",
            digest=resolution.blob.digest,
            size_bytes=resolution.blob.size_bytes,
            object_key=resolution.object_key,
            base_digest=resolution.base_digest,
        )


def _checked(adapters: Iterable[loader_pb.AdapterRef]) -> Iterator[AdapterRef]:
    for each in adapters:
        try:
            yield AdapterRef.checked(
                tenant=each.tenant,
                digest=each.blob.digest,
                size_bytes=each.blob.size_bytes,
                object_key=each.object_key,
                base_digest=each.base_digest,
            )
        except (
            InvalidArgument
        ) as error:  # it comes from the catalog and will not get better; what is held is still true
            _log.warning("an adapter to load makes no sense", extra={"fields": {"error": error.message}})


def _alias_move(response: alias_pb.WatchAliasesResponse) -> AliasMove:
    if response.type != common_pb2.WATCH_EVENT_TYPE_PUT:
        return AliasMove(response.catalog_revision)
    alias = response.alias
    current = [alias.active] if alias.HasField("active") else []
    if alias.HasField("canary"):
        current.append(alias.canary.target)
    return AliasMove(
        response.catalog_revision,
        AliasName.parse(alias.name),
        tuple(Target(target.revision_number, target.digest) for target in current),
        tuple(Target(entry.target.revision_number, entry.target.digest) for entry in alias.history),
    )
