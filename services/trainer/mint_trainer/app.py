"""Puts a trainer together; nothing is served before the base is loaded and proven to be the registered one."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import torch
import transformers

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import (
    common_pb2,
    session_service_pb2_grpc,
)
from mint_blobs.s3 import S3ObjectStore
from mint_client.registered_base import check_registered_base
from mint_client.runtime import WorkClient
from mint_core import clock, log
from mint_core.names import BaseModelName, BlobName
from mint_core.server import Binding, Services
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits
from mint_trainer.service import SessionServicer
from mint_trainer.sessions import SessionLimits, Sessions, StageBlob, StagedBlob
from mint_trainer.settings import TrainerSettings
from mint_trainer.worker import Ticket, TorchThread

__all__ = ["build"]

_log = log.get_logger(__name__)
_MAX_SWEEP_INTERVAL_S = 30.0


@contextlib.asynccontextmanager
async def build(settings: TrainerSettings) -> AsyncIterator[Services]:
    """Load and check everything, then offer the services; what was acquired is released in the end."""
    thread = TorchThread(settings.num_threads)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(thread.close)
        started_s = clock.monotonic_s()
        model_id = BaseModelName.parse(settings.base_model, field="base_model").base_model
        load = partial(ResidentBase.load, model_id=model_id, dtype=settings.dtype, attention=settings.attention)
        base = await thread.run(partial(load, settings.base_model_path), Ticket())
        _log.info(
            "base loaded",
            extra={
                "fields": {
                    "digest": base.digest,
                    "seconds": round(clock.monotonic_s() - started_s, 1),
                    "shares_prefixes": base.shares_prefixes,
                }
            },
        )
        await check_registered_base(
            settings.catalog_address,
            settings.base_model,
            settings.base_model_path,
            base.digest,
            timeout_s=settings.catalog_timeout_s,
        )
        store = await stack.enter_async_context(S3ObjectStore(settings.object_store))
        await store.ensure_bucket()
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="mint-trainer-", dir=settings.scratch_path))
        stage_blob = None
        if settings.catalog_runtime_address:
            stage_blob = _staging(await stack.enter_async_context(WorkClient(settings.catalog_runtime_address)))
        sessions = Sessions(
            base,
            store,
            thread,
            BatchLimits(
                vocab_size=base.vocab_size,
                max_datum_tokens=min(settings.max_datum_tokens, base.max_context_tokens),
                max_step_tokens=settings.max_step_tokens,
                micro_batch_tokens=settings.micro_batch_tokens,
                share_prefixes=settings.share_prefixes,
            ),
            SessionLimits(
                max_sessions=settings.max_sessions,
                max_waiting_steps=settings.max_waiting_steps,
                idle_ttl_s=settings.session_ttl_s,
                num_kept_results=settings.num_kept_results,
            ),
            Path(scratch),
            stage_blob,
        )
        stack.callback(thread.close)  # a step that still runs may need scratch and store
        sweeper = asyncio.ensure_future(_sweep(sessions, settings.session_ttl_s))
        stack.push_async_callback(_stop, sweeper)
        numerics = common_pb2.Numerics(
            base_digest=base.digest,
            dtype=base.dtype,
            engine_version=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )
        targets = [name for name in settings.default_target_modules if name in sessions.target_modules]
        yield Services(
            public=[
                Binding(
                    session_service_pb2_grpc.add_SessionServiceServicer_to_server,
                    SessionServicer(sessions, numerics, targets),
                    "mint.v1.SessionService",
                )
            ]
        )


def _staging(work: WorkClient) -> StageBlob:
    async def stage(name: BlobName, size_bytes: int) -> StagedBlob:
        record = await work.stage_blob(str(name), size_bytes)
        return StagedBlob(record.object_key, record.state == publish_service_pb2.BLOB_STATE_VERIFIED)

    return stage


async def _sweep(sessions: Sessions, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(min(_MAX_SWEEP_INTERVAL_S, ttl_s / 4))
        await sessions.expire_idle()


async def _stop(task: asyncio.Future[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
