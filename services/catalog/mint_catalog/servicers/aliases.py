"""AliasService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from mint_api.v1 import alias_service_pb2 as pb
from mint_api.v1 import alias_service_pb2_grpc as pb_grpc
from mint_api.v1 import common_pb2
from mint_catalog.model.codec import from_message, to_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.records import Canary, Gate, Resolution
from mint_catalog.servicers.common import identity, min_revision, watch_responses
from mint_catalog.serving.aliases import Aliases, Edit, Move
from mint_catalog.serving.resolve import Freshness, Resolver
from mint_catalog.storage.changes import Changes
from mint_core.calls import principal
from mint_core.errors import MintError
from mint_core.names import AliasName, PolicyName
from mint_core.status import to_status

__all__ = ["AliasServicer"]


class AliasServicer(pb_grpc.AliasServiceServicer):
    def __init__(self, aliases: Aliases, resolver: Resolver, changes: Changes, codecs: MessageCodecs) -> None:
        self._aliases = aliases
        self._resolver = resolver
        self._changes = changes
        self._codec = codecs.alias

    async def PromoteAlias(self, request: pb.PromoteAliasRequest, _context: Any) -> Any:
        timeout = request.residency_timeout
        move = replace(
            _move(request),
            ignore_gate=request.ignore_gate,
            min_resident_replicas=request.min_resident_replicas,
            residency_timeout_s=timeout.seconds + timeout.nanos / 1e9,
        )
        written = await self._aliases.promote(move, identity(request, move.name.tenant))
        return pb.PromoteAliasResponse(
            alias=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def RollbackAlias(self, request: pb.RollbackAliasRequest, _context: Any) -> Any:
        move = _move(request)
        written = await self._aliases.rollback(move, identity(request, move.name.tenant))
        return pb.RollbackAliasResponse(
            alias=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetAlias(self, request: pb.GetAliasRequest, _context: Any) -> Any:
        record = await self._aliases.get(AliasName.parse(request.name), min_revision=min_revision(request))
        return pb.GetAliasResponse(alias=self._codec.to_message(record))

    async def ListAliases(self, request: pb.ListAliasesRequest, _context: Any) -> Any:
        aliases, revision = await self._aliases.list(PolicyName.parse(request.parent, field="parent"))
        return pb.ListAliasesResponse(aliases=map(self._codec.to_message, aliases), catalog_revision=revision)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, _context: Any) -> Any:
        name = AliasName.parse(request.name)
        revision = await self._aliases.delete(name, request.etag, identity(request, name.tenant))
        return pb.DeleteAliasResponse(catalog_revision=revision)

    async def SetCanary(self, request: pb.SetCanaryRequest, _context: Any) -> Any:
        edit = Edit(AliasName.parse(request.name), request.etag, request.reason)
        canary = from_message(request.canary, Canary) if request.HasField("canary") else None
        written = await self._aliases.set_canary(edit, canary, identity(request, edit.name.tenant))
        return pb.SetCanaryResponse(
            alias=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def SetGate(self, request: pb.SetGateRequest, _context: Any) -> Any:
        edit = Edit(AliasName.parse(request.name), request.etag, request.reason)
        gate = from_message(request.gate, Gate) if request.HasField("gate") else None
        written = await self._aliases.set_gate(edit, gate, identity(request, edit.name.tenant))
        return pb.SetGateResponse(
            alias=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def Resolve(self, request: pb.ResolveRequest, _context: Any) -> Any:
        resolution = await self._resolver.resolve(request.name, request.sticky_key, _freshness(request))
        return pb.ResolveResponse(resolution=_resolution(resolution))

    async def BatchResolve(self, request: pb.BatchResolveRequest, _context: Any) -> Any:
        results = await self._resolver.resolve_batch(request.names, _freshness(request))
        return pb.BatchResolveResponse(
            results=[
                pb.BatchResolveResult(status=to_status(each))
                if isinstance(each, MintError)
                else pb.BatchResolveResult(resolution=_resolution(each))
                for each in results
            ]
        )

    async def WatchAliases(self, request: pb.WatchAliasesRequest, _context: Any) -> AsyncIterator[Any]:
        events = self._changes.aliases(request.parent, after=request.start_after_catalog_revision)
        responses = watch_responses(events, pb.WatchAliasesResponse, "alias", self._codec)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response


def _move(request: Any) -> Move:
    return Move(AliasName.parse(request.name), request.revision_number, request.etag, request.reason, principal())


def _freshness(request: Any) -> Freshness:
    return Freshness(request.consistency.strong, min_revision(request))


def _resolution(record: Resolution) -> Any:
    if record.split is not None:
        return to_message(record, pb.Resolution)
    # Written out: the conversion by plan takes several times as long, and this is the call that all others wait for.
    blob, signature = record.blob, record.signature
    return pb.Resolution(
        revision=record.revision,
        blob=common_pb2.BlobRef(digest=blob.digest, size_bytes=blob.size_bytes) if blob else None,
        object_key=record.object_key,
        base_model=record.base_model,
        base_digest=record.base_digest,
        canary=record.canary,
        catalog_revision=record.catalog_revision,
        signature=to_message(signature, common_pb2.AdapterSignature) if signature else None,
    )
