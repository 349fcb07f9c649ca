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
from mint_api.v1 import revision_service_pb2 as revision_pb
from mint_api.v1 import revision_service_pb2_grpc as revision_grpc
from mint_core import log
from mint_core.channel import call, stream
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, RevisionName
from mint_core.signing import Signature
from mint_loader.model import AdapterRef, EngineLoad, Resident
from mint_loader.prefetch import AliasMove, Publication, Target

__all__ = ["CatalogClient", "EngineClient", "decode_adapter", "encode_adapter"]

_log = log.get_logger(__name__)


class EngineClient:
    """An :class:`~mint_loader.model.Engine` over its channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = engine_grpc.EngineServiceStub(channel)

    async def load(self, digest: str, folder: str, *, into_slot: bool, pinned: bool, timeout_s: float) -> EngineLoad:
        request = engine_pb.LoadAdapterRequest(digest=digest, folder=folder, into_slot=into_slot, pinned=pinned)
        response: engine_pb.LoadAdapterResponse = await call(self._stub.LoadAdapter, request, timeout_s=timeout_s)
        return EngineLoad(response.already_resident, response.load_ms)

    async def unpin(self, digest: str, *, timeout_s: float) -> None:
        await call(self._stub.UnpinAdapter, engine_pb.UnpinAdapterRequest(digest=digest), timeout_s=timeout_s)

    async def resident(self, *, timeout_s: float) -> Resident:
        response: engine_pb.GetResidencyResponse = await call(
            self._stub.GetResidency, engine_pb.GetResidencyRequest(), timeout_s=timeout_s
        )
        return Resident(
            response.engine_replica.numerics.base_digest,
            frozenset(adapter.digest for adapter in response.adapters),
            tuple(_checked(response.adapters_to_load)),
            frozenset(adapter.digest for adapter in response.adapters if adapter.pinned),
        )


class CatalogClient:
    """A :class:`~mint_loader.prefetch.Catalog` over its channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = 5.0) -> None:
        self._aliases = alias_grpc.AliasServiceStub(channel)
        self._revisions = revision_grpc.RevisionServiceStub(channel)
        self._timeout_s = timeout_s

    async def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        request = alias_pb.WatchAliasesRequest(parent="tenants/-", start_after_catalog_revision=after)
        async for response in stream(self._aliases.WatchAliases, request, timeout_s=None):
            yield _alias_move(response)

    async def watch_publications(self, *, after: int) -> AsyncIterator[Publication]:
        request = revision_pb.WatchRevisionsRequest(parent="tenants/-", start_after_catalog_revision=after)
        async for response in stream(self._revisions.WatchRevisions, request, timeout_s=None):
            yield _publication(response)

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        request = alias_pb.ResolveRequest(name=str(revision))
        response: alias_pb.ResolveResponse = await call(self._aliases.Resolve, request, timeout_s=self._timeout_s)
        return _resolved(revision.tenant, response.resolution)

    async def targets(self, alias: AliasName) -> tuple[AdapterRef, ...]:
        request = alias_pb.GetAliasRequest(name=str(alias))
        response: alias_pb.GetAliasResponse = await call(self._aliases.GetAlias, request, timeout_s=self._timeout_s)
        found = [response.alias.resolution]
        if response.alias.HasField("canary_resolution"):
            found.append(response.alias.canary_resolution)
        return tuple(_resolved(alias.tenant, each) for each in found)


def decode_adapter(adapter: loader_pb.AdapterRef) -> AdapterRef:
    """A reference off the wire. Raises :class:`InvalidArgument` naming the field."""
    return AdapterRef.checked(
        tenant=adapter.tenant,
        digest=adapter.blob.digest,
        size_bytes=adapter.blob.size_bytes,
        object_key=adapter.object_key,
        base_digest=adapter.base_digest,
        signature=_signature(adapter),
    )


def encode_adapter(ref: AdapterRef) -> loader_pb.AdapterRef:
    """A reference for the wire."""
    signature = ref.signature
    return loader_pb.AdapterRef(
        tenant=f"tenants/{ref.tenant}",
        blob=common_pb2.BlobRef(digest=ref.digest, size_bytes=ref.size_bytes),
        object_key=ref.object_key,
        base_digest=ref.base_digest,
        signature=(
            common_pb2.AdapterSignature(key_id=signature.key_id, value=signature.value)
            if signature is not None
            else None
        ),
    )


def _signature(message: loader_pb.AdapterRef | alias_pb.Resolution | revision_pb.Revision) -> Signature | None:
    if not message.HasField("signature"):
        return None
    return Signature(message.signature.key_id, message.signature.value)


def _resolved(tenant: str, resolution: alias_pb.Resolution) -> AdapterRef:
    return AdapterRef.checked(
        tenant=f"tenants/{tenant}",
        digest=resolution.blob.digest,
        size_bytes=resolution.blob.size_bytes,
        object_key=resolution.object_key,
        base_digest=resolution.base_digest,
        signature=_signature(resolution),
    )


def _publication(response: revision_pb.WatchRevisionsResponse) -> Publication:
    revision = response.revision
    is_new = (
        response.type == common_pb2.WATCH_EVENT_TYPE_PUT and revision.state == revision_pb.REVISION_STATE_READY
    )  # what was retired is never asked for again
    if not is_new:
        return Publication(response.catalog_revision)
    name = RevisionName.parse(revision.name)
    try:
        ref = AdapterRef.checked(
            tenant=f"tenants/{name.tenant}",
            digest=revision.blob.digest,
            size_bytes=revision.blob.size_bytes,
            object_key=revision.object_key,
            base_digest=revision.base_digest,
            signature=_signature(revision),
        )
    except InvalidArgument as error:  # it will not get better, and the publications after it are no worse for it
        _log.warning("a publication makes no sense", extra={"fields": {"error": error.message}})
        return Publication(response.catalog_revision)
    return Publication(response.catalog_revision, name, ref)


def _checked(adapters: Iterable[loader_pb.AdapterRef]) -> Iterator[AdapterRef]:
    for each in adapters:
        try:
            yield decode_adapter(each)
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
