"""The gRPC border: decode, one domain call, encode."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import grpc

from mint_api.runtime.v1 import exporter_service_pb2 as exporter_pb
from mint_api.runtime.v1 import exporter_service_pb2_grpc as exporter_grpc
from mint_api.v1 import blob_service_pb2 as blob_pb
from mint_api.v1 import blob_service_pb2_grpc as blob_grpc
from mint_api.v1 import common_pb2 as common_pb
from mint_core.errors import InvalidArgument
from mint_core.names import BlobName, PolicyName, RevisionName
from mint_exporter.export import Exporter
from mint_exporter.imports import Importer
from mint_exporter.model import Exported, Fence, ImportSource, Lineage, SavedWeights
from mint_exporter.reading import FolderFile, Reader
from mint_exporter.uploads import Chunk, Uploads
from mint_lora.diff import AdapterDiff, ModuleDiff

__all__ = ["BlobServicer", "ExporterServicer"]


class ExporterServicer(exporter_grpc.ExporterServiceServicer):
    """``mint.runtime.v1.ExporterService``."""

    def __init__(self, exporter: Exporter, importer: Importer, reader: Reader, *, code_version: str) -> None:
        self._exporter = exporter
        self._importer = importer
        self._reader = reader
        self._code_version = code_version

    async def Export(
        self, request: exporter_pb.ExportRequest, _context: grpc.aio.ServicerContext
    ) -> exporter_pb.ExportResponse:
        state = request.training_state
        exported = await self._exporter.export(
            PolicyName.parse(request.policy, field="policy"),
            SavedWeights(state.weights_key, state.weights.digest, state.weights.size_bytes),
            Fence(request.fence.resource, request.fence.token),
            self._trained(request),
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
        exported = await self._importer.import_revision(
            PolicyName.parse(request.policy, field="policy"),
            ImportSource(
                request.weights.digest,
                request.adapter_config_json,
                request.archive.digest,
                request.object.key,
                request.object.blob.digest,
            ),
            self._lineage(request),
            _request_id(request.request_id),
        )
        return exporter_pb.ImportRevisionResponse(
            revision=exported.published.revision,
            timings=_timings(exported),
            catalog_revision=exported.published.catalog_revision,
        )

    async def ExportPeft(
        self, request: exporter_pb.ExportPeftRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[exporter_pb.ExportPeftResponse]:
        name = RevisionName.parse(request.revision, field="revision")
        async with contextlib.aclosing(self._reader.peft_folder(name, request.layout)) as parts:
            async for part in parts:
                yield _peft_part(part)

    async def DiffRevisions(
        self, request: exporter_pb.DiffRevisionsRequest, _context: grpc.aio.ServicerContext
    ) -> exporter_pb.DiffRevisionsResponse:
        return _diff(
            await self._reader.diff(
                RevisionName.parse(request.revision, field="revision"), RevisionName.parse(request.other, field="other")
            )
        )

    def _trained(self, request: exporter_pb.ExportRequest) -> Lineage:
        state, told = request.training_state, request.lineage
        for field, known, other in (("run", state.run, told.run), ("step", state.step, told.step)):
            if other and known and other != known:
                raise InvalidArgument(
                    f"lineage.{field} is {other!r}, the training state says {known!r}: leave it out or make them equal",
                    field=f"lineage.{field}",
                )
        lineage = self._lineage(request)
        return replace(lineage, run=state.run or told.run, step=state.step or told.step)

    def _lineage(self, request: exporter_pb.ExportRequest | exporter_pb.ImportRevisionRequest) -> Lineage:
        told = request.lineage
        return Lineage(
            told.run,
            told.step,
            told.parent_revision,
            told.data_digest,
            told.code_version or self._code_version,
            told.recipe,
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


def _peft_part(part: FolderFile | Chunk) -> exporter_pb.ExportPeftResponse:
    if isinstance(part, Chunk):
        return exporter_pb.ExportPeftResponse(chunk=blob_pb.BlobChunk(offset=part.offset, data=part.data))
    blob = common_pb.BlobRef(digest=part.digest, size_bytes=part.size_bytes)
    return exporter_pb.ExportPeftResponse(file=exporter_pb.PeftFile(name=part.name, blob=blob))


def _diff(diff: AdapterDiff) -> exporter_pb.DiffRevisionsResponse:
    return exporter_pb.DiffRevisionsResponse(
        config=[
            exporter_pb.ConfigDifference(field=each.field, value=_json(each.one), other_value=_json(each.other))
            for each in diff.config
        ],
        modules=[_module(each) for each in diff.modules],
        total=exporter_pb.ModuleDifference(**_figures(diff)),
    )


def _module(module: ModuleDiff) -> exporter_pb.ModuleDifference:
    return exporter_pb.ModuleDifference(
        module=module.module,
        num_experts=module.num_experts or 0,
        rank=module.rank_one,
        other_rank=module.rank_other,
        **_figures(module),
    )


def _figures(diff: AdapterDiff | ModuleDiff) -> dict[str, Any]:
    return {
        "norm": diff.norm_one,
        "other_norm": diff.norm_other,
        "norm_difference": diff.norm_difference,
        "cosine": diff.cosine,
        "max_abs_difference": diff.max_abs_difference,
        "max_is_exact": diff.is_max_exact,
    }


def _json(value: object) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, sort_keys=True)
