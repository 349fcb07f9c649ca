"""RevisionService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import revision_service_pb2 as pb
from mint_api.v1 import revision_service_pb2_grpc as pb_grpc
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.policies.revisions import Revisions
from mint_catalog.servicers.common import identity, min_revision, watch_responses
from mint_catalog.storage.changes import Changes
from mint_core.names import PolicyName, RevisionName

__all__ = ["RevisionServicer"]


class RevisionServicer(pb_grpc.RevisionServiceServicer):
    def __init__(self, revisions: Revisions, changes: Changes, codecs: MessageCodecs) -> None:
        self._revisions = revisions
        self._changes = changes
        self._codec = codecs.revision

    async def GetRevision(self, request: pb.GetRevisionRequest, _context: Any) -> Any:
        record = await self._revisions.get(RevisionName.parse(request.name), min_revision=min_revision(request))
        return pb.GetRevisionResponse(revision=self._codec.to_message(record))

    async def ListRevisions(self, request: pb.ListRevisionsRequest, _context: Any) -> Any:
        page = await self._revisions.list(
            PolicyName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListRevisionsResponse(
            revisions=map(self._codec.to_message, page.records),
            next_page_token=page.next_page_token,
            catalog_revision=page.catalog_revision,
        )

    async def RetireRevision(self, request: pb.RetireRevisionRequest, _context: Any) -> Any:
        name = RevisionName.parse(request.name)
        written = await self._revisions.retire(name, request.etag, identity(request, name.tenant))
        return pb.RetireRevisionResponse(
            revision=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def DeleteRevision(self, request: pb.DeleteRevisionRequest, _context: Any) -> Any:
        name = RevisionName.parse(request.name)
        revision = await self._revisions.delete(name, request.etag, identity(request, name.tenant))
        return pb.DeleteRevisionResponse(catalog_revision=revision)

    async def WatchRevisions(self, request: pb.WatchRevisionsRequest, _context: Any) -> AsyncIterator[Any]:
        events = self._changes.revisions(request.parent, after=request.start_after_catalog_revision)
        responses = watch_responses(events, pb.WatchRevisionsResponse, "revision", self._codec)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response
