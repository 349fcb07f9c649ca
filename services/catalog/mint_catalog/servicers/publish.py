"""PublishService: how bytes become a revision."""

from __future__ import annotations

from typing import Any

from mint_api.runtime.v1 import publish_service_pb2 as pb
from mint_api.runtime.v1 import publish_service_pb2_grpc as pb_grpc
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.policies.blobs import Blobs
from mint_catalog.policies.revisions import Revisions
from mint_catalog.servicers.common import fence_of, identity
from mint_core.names import BlobName, PolicyName

__all__ = ["PublishServicer"]


class PublishServicer(pb_grpc.PublishServiceServicer):
    def __init__(self, blobs: Blobs, revisions: Revisions, codecs: MessageCodecs) -> None:
        self._blobs = blobs
        self._revisions = revisions
        self._blob_codec = codecs.blob
        self._codec = codecs.revision

    async def StageBlob(self, request: pb.StageBlobRequest, _context: Any) -> Any:
        record = await self._blobs.stage(BlobName.parse(request.name), request.size_bytes)
        return pb.StageBlobResponse(blob=self._blob_codec.to_message(record))

    async def VerifyBlob(self, request: pb.VerifyBlobRequest, _context: Any) -> Any:
        record = await self._blobs.verify(BlobName.parse(request.name), request.object_key)
        return pb.VerifyBlobResponse(blob=self._blob_codec.to_message(record))

    async def GetBlob(self, request: pb.GetBlobRequest, _context: Any) -> Any:
        record = await self._blobs.get(BlobName.parse(request.name))
        return pb.GetBlobResponse(blob=self._blob_codec.to_message(record))

    async def PublishRevision(self, request: pb.PublishRevisionRequest, _context: Any) -> Any:
        policy = PolicyName.parse(request.parent, field="parent")
        wanted = self._codec.from_message(request.revision, name=None)
        written = await self._revisions.publish(
            policy,
            wanted,
            fence_of(request),
            unfenced=request.unfenced,
            request=identity(request, policy.tenant),
        )
        return pb.PublishRevisionResponse(
            revision=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )
