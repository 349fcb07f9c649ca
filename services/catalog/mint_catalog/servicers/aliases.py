"""AliasService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import alias_service_pb2 as pb
from mint_api.v1 import alias_service_pb2_grpc as pb_grpc
from mint_catalog.aliases import Aliases, Move
from mint_catalog.changes import Changes
from mint_catalog.codec import to_message
from mint_catalog.codecs import MessageCodecs
from mint_catalog.resolve import Resolver
from mint_catalog.servicers.common import identity, min_revision, watch_responses
from mint_core.calls import principal
from mint_core.errors import InvalidArgument, MintError
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
        if request.min_resident_replicas:
            raise InvalidArgument(
                f"min_resident_replicas is {request.min_resident_replicas}: this catalog does not know what engines "
                "hold; leave it 0",
                field="min_resident_replicas",
            )
        move = _move(request)
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

    async def Resolve(self, request: pb.ResolveRequest, _context: Any) -> Any:
        resolution = await self._resolver.resolve(request.name, min_revision=min_revision(request))
        return pb.ResolveResponse(resolution=to_message(resolution, pb.Resolution))

    async def BatchResolve(self, request: pb.BatchResolveRequest, _context: Any) -> Any:
        results = await self._resolver.resolve_batch(request.names, min_revision=min_revision(request))
        return pb.BatchResolveResponse(
            results=[
                pb.BatchResolveResult(status=to_status(each))
                if isinstance(each, MintError)
                else pb.BatchResolveResult(resolution=to_message(each, pb.Resolution))
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
