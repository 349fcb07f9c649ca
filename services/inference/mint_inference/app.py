"""Inference, put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from mint_api.v1 import inference_service_pb2, inference_service_pb2_grpc
from mint_core.channel import connect
from mint_core.server import Binding, Services
from mint_core.signing import TrustedKeys
from mint_inference.clients import CatalogClient, Channels, EngineClients, LoaderClients, UsageClient
from mint_inference.copies import Copies
from mint_inference.figures import inference_figures
from mint_inference.generation import Generation, GenerationLimits
from mint_inference.lookout import Lookout
from mint_inference.resolver import Resolver, ResolverLimits
from mint_inference.router import Router
from mint_inference.service import InferenceServicer
from mint_inference.settings import InferenceSettings
from mint_inference.usage import UsageMeter

__all__ = ["inference"]

_SERVICE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]
_TRIM_S = 60.0


@contextlib.asynccontextmanager
async def inference(settings: InferenceSettings) -> AsyncIterator[Services]:
    """Everything inference serves. Neither the catalog nor an engine need be there yet."""
    async with contextlib.AsyncExitStack() as stack:
        catalog = CatalogClient(await stack.enter_async_context(connect(settings.catalog_address)))
        # Whom to ask after an engine that is away is for the router to say, so gRPC does not repeat what failed.
        engine_channels = Channels(max_message_bytes=settings.max_message_bytes, retry=False)
        loader_channels = Channels(max_message_bytes=settings.max_message_bytes)
        for channels in (engine_channels, loader_channels):
            stack.push_async_callback(channels.close)
        resolver = Resolver(
            catalog,
            ResolverLimits(
                staleness_s=settings.staleness_s,
                serve_stale_for_s=settings.serve_stale_for_s,
                timeout_s=settings.resolve_timeout_s,
                max_entries=settings.max_cached_names,
            ),
        )
        stack.push_async_callback(resolver.close)
        router = Router(catalog, poll_s=settings.replica_poll_s, timeout_s=settings.resolve_timeout_s)
        stack.push_async_callback(router.close)
        meter = await _meter(settings, stack)
        trusted = None if settings.trusted_keys is None else TrustedKeys.from_file(settings.trusted_keys)
        engines = EngineClients(engine_channels, timeout_s=settings.generate_timeout_s)
        in_background = LoaderClients(loader_channels, timeout_s=settings.load_timeout_s, priority=0)
        copies = Copies(router, in_background, max_copies=settings.max_copies)
        stack.push_async_callback(copies.close)
        generation = Generation(
            catalog,
            resolver,
            router,
            engines,
            LoaderClients(loader_channels, timeout_s=settings.load_timeout_s, priority=settings.load_priority),
            GenerationLimits(
                max_streams=settings.max_streams,
                max_loads=settings.max_loads,
                silence_s=settings.silence_s,
                gone_silence_s=settings.gone_silence_s,
                start_s=settings.start_timeout_s,
                load_s=settings.load_timeout_s,
                place_wait_s=settings.place_wait_s,
            ),
            meter,
            copies,
            trusted,
        )
        works = (
            resolver.follow(),
            router.follow(),
            Lookout(router, engines, every_s=settings.residency_poll_s).run(),
            meter.run(settings.usage_report_s),
            _trim(engine_channels, loader_channels),
        )
        for work in works:
            stack.push_async_callback(_stop, asyncio.create_task(work))
        add = inference_service_pb2_grpc.add_InferenceServiceServicer_to_server
        yield Services(
            public=[Binding(add, InferenceServicer(generation), _SERVICE.full_name)],
            figures=lambda: inference_figures(generation, router),
        )


async def _meter(settings: InferenceSettings, stack: contextlib.AsyncExitStack) -> UsageMeter:
    """Reports once more when everything is served, at the stack's end."""
    address = settings.catalog_runtime_address
    if not address:
        return UsageMeter()
    channel = await stack.enter_async_context(connect(address))
    meter = UsageMeter(UsageClient(channel, timeout_s=settings.resolve_timeout_s))
    stack.push_async_callback(meter.report)
    return meter


async def _trim(*all_channels: Channels) -> None:
    while True:
        await asyncio.sleep(_TRIM_S)
        for channels in all_channels:
            await channels.trim()


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
