"""Puts a runs worker together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from mint_blobs.s3 import S3ObjectStore
from mint_client import Endpoints, MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core import log
from mint_core.base_model import digest_of_folder
from mint_core.errors import BaseModelMismatch
from mint_core.server import Services
from mint_runs.patience import patiently
from mint_runs.settings import RunsSettings
from mint_runs.tokenization import BaseTokenizer
from mint_runs.worker import Worker

__all__ = ["runs"]

_log = log.get_logger(__name__)


@contextlib.asynccontextmanager
async def runs(settings: RunsSettings) -> AsyncIterator[Services]:
    """A worker that claims runs inside the block and is drained at its end. It serves nothing but its health.

    Raises :class:`BaseModelMismatch` if the folder is not the registered base model.
    """
    tokenizer = BaseTokenizer(settings.base_model_path)
    digest = await asyncio.to_thread(digest_of_folder, settings.base_model_path)
    endpoints = Endpoints(
        catalog=settings.catalog_address, trainer=settings.trainer_address, inference=settings.inference_address
    )
    async with (
        MintClient(endpoints) as client,
        WorkClient(settings.catalog_runtime_address) as work,
        ExporterClient(settings.exporter_runtime_address) as exporter,
        S3ObjectStore(settings.object_store) as store,
    ):
        registered = await patiently(
            "catalog", lambda: client.base_models.get(settings.base_model), patience_s=settings.patience_s
        )
        if registered.digest != digest.digest:
            raise BaseModelMismatch(
                f"{settings.base_model} is registered with {registered.digest}, but {settings.base_model_path} has "
                f"{digest.digest}: name the right folder or the right base model",
                metadata={"expected": registered.digest, "actual": digest.digest},
            )
        worker = Worker(settings, client=client, work=work, exporter=exporter, store=store, tokenizer=tokenizer)
        working = asyncio.create_task(worker.run())
        try:
            yield Services()
        finally:
            worker.drain()
            await asyncio.wait({working}, timeout=settings.drain_timeout_s)
            if not working.done():
                _log.warning("not drained in time", extra={"fields": {"timeout_s": settings.drain_timeout_s}})
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
