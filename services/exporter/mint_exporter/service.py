"""The gRPC border: decode, one domain call, encode."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator

import grpc

from mint_api.runtime.v1 import exporter_service_pb2 as exporter_pb
from mint_api.runtime.v1 import exporter_service_pb2_grpc as exporter_grpc
from mint_api.v1 import blob_service_pb2 as blob_pb
from mint_api.v1 import blob_service_pb2_grpc as blob_grpc
from mint_api.v1 import common_pb2 as common_pb
from mint_core.errors import InvalidArgument
from mint_core.names import BlobName, PolicyName
from mint_exporter.export import Exporter
from mint_exporter.model import Exported, Fence, Lineage, SavedWeights
from mint_exporter.uploads import Chunk, Uploads

__all__ = ["BlobServicer", "ExporterServicer"]


class ExporterServicer(exporter_grpc.ExporterServiceServicer):
    """``mint.runtime.v1.ExporterService``."""

    def __init__(self, exporter: Exporter, *, code_version: str) -> None:
        self._exporter = exporter
        self._code_version = code_version

    async def Export(
        self, request: exporter_pb.ExportRequest, _context: grpc.aio.ServicerContext
    ) -> exporter_pb.ExportResponse:
        state = request.training_state
        exported = await self._exporter.export(
            PolicyName.parse(request.policy, field="policy"),
            SavedWeights(state.weights_key, state.weights.digest, state.weights.size_bytes),
            Fence(request.fence.resource, request.fence.token),
            self._lineage(request),
            _request_id(request.request_id),
        )
        return exporter_pb.ExportResponse(
            revision=exported.published.revision,
            timings=_timings(exported),
            catalog_revision=exported.published.catalog_revision,
        )

    async def ImportRevision(
        self, request: exporter_pb.ImportRevisionRequest, _context: grpc.aio.ServicerContext
    ) -> exporter_pb.ImportRevisionResponse:
        exported = await self._exporter.import_revision(
            PolicyName.parse(request.policy, field="policy"),
            request.weights.digest,
            request.adapter_config_json,
            _request_id(request.request_id),
        )
        return exporter_pb.ImportRevisionResponse(revision=exported.published.revision)

    def _lineage(self, request: exporter_pb.ExportRequest) -> Lineage:
        state, told = request.training_state, request.lineage
        for field, known, other in (("run", state.run, told.run), ("step", state.step, told.step)):
            if other and known and other != known:
                raise InvalidArgument(
                    f"lineage.{field} is {other!r}, the training state says {known!r}: leave it out or make them equal",
                    field=f"lineage.{field}",
                )
        return Lineage(
            run=state.run or told.run,
            step=state.step or told.step,
            parent_revision=told.parent_revision,
            data_digest=told.data_digest,
            code_version=told.code_version or self._code_version,
        )


class BlobServicer(blob_grpc.BlobServiceServicer):
    """``mint.v1.BlobService``."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    async def UploadBlob(
        self, request_iterator: AsyncIterator[blob_pb.UploadBlobRequest], _context: grpc.aio.ServicerContext
    ) -> blob_pb.UploadBlobResponse:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("content") != "announcement":
            raise InvalidArgument("the first message must be an announcement of name and size", field="announcement")
        name = BlobName.parse(first.announcement.name, field="announcement.name")
        size_bytes = await self._uploads.receive(name, first.announcement.size_bytes, _chunks(requests))
        return blob_pb.UploadBlobResponse(blob=common_pb.BlobRef(digest=name.digest, size_bytes=size_bytes))

    async def GetUpload(
        self, request: blob_pb.GetUploadRequest, _context: grpc.aio.ServicerContext
    ) -> blob_pb.GetUploadResponse:
        num_committed, is_verified = await self._uploads.progress(BlobName.parse(request.name))
        return blob_pb.GetUploadResponse(committed_bytes=num_committed, verified=is_verified)

    async def DownloadBlob(
        self, request: blob_pb.DownloadBlobRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[blob_pb.DownloadBlobResponse]:
        async with contextlib.aclosing(self._uploads.download(BlobName.parse(request.name))) as chunks:
            async for chunk in chunks:
                yield blob_pb.DownloadBlobResponse(chunk=blob_pb.BlobChunk(offset=chunk.offset, data=chunk.data))


async def _chunks(requests: AsyncIterator[blob_pb.UploadBlobRequest]) -> AsyncIterator[Chunk]:
    async for request in requests:
        if request.WhichOneof("content") != "chunk":
            raise InvalidArgument("every message after the first must be a chunk", field="chunk")
        yield Chunk(request.chunk.offset, request.chunk.data)


def _request_id(request_id: str) -> str:
    if request_id:
        try:
            uuid.UUID(request_id)
        except ValueError:
            raise InvalidArgument(
                f"request_id is {request_id[:80]!r}: expected a UUID4 or nothing", field="request_id"
            ) from None
    return request_id


def _timings(exported: Exported) -> exporter_pb.ExportTimings:
    timings = exported.timings
    return exporter_pb.ExportTimings(
        fetch_ms=timings.fetch_ms,
        pack_ms=timings.pack_ms,
        upload_ms=timings.upload_ms,
        publish_ms=timings.publish_ms,
    )
