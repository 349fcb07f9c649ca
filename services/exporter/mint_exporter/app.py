"""The exporter, put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version

from mint_api.runtime.v1 import exporter_service_pb2, exporter_service_pb2_grpc
from mint_api.v1 import blob_service_pb2, blob_service_pb2_grpc
from mint_blobs.s3 import S3ObjectStore
from mint_core import log
from mint_core.channel import connect
from mint_core.errors import InvalidArgument, Unavailable
from mint_core.server import Binding, Services
from mint_core.signing import Signer
from mint_exporter.clients import CatalogClient
from mint_exporter.export import Exporter
from mint_exporter.imports import Importer
from mint_exporter.model import Limits
from mint_exporter.publishing import Publisher
from mint_exporter.reading import Reader
from mint_exporter.scratch import Scratch
from mint_exporter.service import BlobServicer, ExporterServicer
from mint_exporter.settings import ExporterSettings
from mint_exporter.uploads import Uploads

__all__ = ["exporter"]

_EXPORTER = exporter_service_pb2.DESCRIPTOR.services_by_name["ExporterService"].full_name
_BLOBS = blob_service_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name
_MAX_SWEEP_INTERVAL_S = 30.0

_log = log.get_logger(__name__)


@contextlib.asynccontextmanager
async def exporter(settings: ExporterSettings) -> AsyncIterator[Services]:
    """Everything the exporter serves. Store and catalog need not be there yet; wrong credentials end it at once."""
    needed = max(2 * settings.max_adapter_bytes, settings.max_blob_bytes)
    if settings.max_scratch_bytes < needed:
        raise InvalidArgument(
            f"exporter.max_scratch_bytes is {settings.max_scratch_bytes}: expected at least {needed}, twice "
            "max_adapter_bytes and once max_blob_bytes",
            field="max_scratch_bytes",
        )
    signer = Signer.from_file(settings.signing_key_file) if settings.signing_key_file else None
    if signer is not None:
        fields = {"key_id": signer.key_id, "public_key": signer.public_key}
        _log.info("what is published is signed", extra={"fields": fields})
    async with contextlib.AsyncExitStack() as stack:
        scratch = await stack.enter_async_context(Scratch(settings.scratch_dir, settings.max_scratch_bytes))
        store = await stack.enter_async_context(S3ObjectStore(settings.object_store))
        try:
            await store.ensure_bucket()
        except Unavailable as error:
            _log.warning("the object store is not there yet", extra={"fields": {"error": error.message}})
        public = await stack.enter_async_context(connect(settings.catalog_address))
        runtime = await stack.enter_async_context(connect(settings.catalog_runtime_address))
        catalog = CatalogClient(public, runtime, timeout_s=settings.catalog_timeout_s)
        limits = Limits(
            settings.max_adapter_bytes, settings.max_rank, settings.max_concurrent_exports, settings.max_blob_bytes
        )
        publisher = Publisher(catalog, store, limits, signer)
        working = asyncio.Semaphore(limits.max_exports)
        exporting = ExporterServicer(
            Exporter(catalog, store, scratch, publisher, limits, working),
            Importer(catalog, store, scratch, publisher, limits, working),
            Reader(catalog, store, scratch),
            code_version=_code_version(),
        )
        uploads = Uploads(
            catalog,
            store,
            scratch,
            max_bytes=settings.max_blob_bytes,
            idle_timeout_s=settings.upload_idle_timeout_s,
        )
        stack.callback(uploads.close)
        sweeper = asyncio.create_task(_drop_idle(uploads, settings.upload_idle_timeout_s), name="drop-idle-uploads")
        stack.push_async_callback(_stop, sweeper)
        yield Services(
            public=[Binding(blob_service_pb2_grpc.add_BlobServiceServicer_to_server, BlobServicer(uploads), _BLOBS)],
            runtime=[Binding(exporter_service_pb2_grpc.add_ExporterServiceServicer_to_server, exporting, _EXPORTER)],
        )


async def _drop_idle(uploads: Uploads, idle_timeout_s: float) -> None:
    while True:
        await asyncio.sleep(min(idle_timeout_s / 4, _MAX_SWEEP_INTERVAL_S))
        num_dropped = uploads.drop_idle()
        if num_dropped:
            _log.info("uploads given up", extra={"fields": {"num_uploads": num_dropped}})


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _code_version() -> str:
    try:
        return f"mint-lora {version('mint-lora')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "mint-lora"
