"""The loader, put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from mint_api.runtime.v1 import loader_service_pb2, loader_service_pb2_grpc
from mint_blobs.s3 import S3ObjectStore
from mint_core.channel import connect
from mint_core.server import Binding, Services
from mint_core.signing import TrustedKeys
from mint_loader.adapters import verify_adapter, write_adapter
from mint_loader.cache import DiskCache
from mint_loader.clients import CatalogClient, EngineClient
from mint_loader.eviction import make_policy
from mint_loader.figures import node_figures
from mint_loader.loading import Limits, Loading
from mint_loader.node import Node
from mint_loader.pin_store import PinStore
from mint_loader.pins import Pins
from mint_loader.prefetch import Prefetcher
from mint_loader.served import ServedPolicies
from mint_loader.service import LoaderServicer
from mint_loader.settings import LoaderSettings
from mint_loader.tickets import Tickets
from mint_loader.wishes import Wishes

__all__ = ["loader"]

_SERVICE = loader_service_pb2.DESCRIPTOR.services_by_name["LoaderService"]


@contextlib.asynccontextmanager
async def loader(settings: LoaderSettings) -> AsyncIterator[Services]:
    """Everything one node's loader serves. Neither the store nor the engine nor the catalog need be there yet."""
    check_signature = None if settings.trusted_keys is None else TrustedKeys.from_file(settings.trusted_keys).check
    async with contextlib.AsyncExitStack() as stack:
        cache = DiskCache(
            settings.cache_dir,
            settings.max_cache_bytes,
            verify=verify_adapter,
            eviction=make_policy(settings.eviction),
            verify_again_s=settings.verify_again_s,
        )
        stack.push_async_callback(cache.close)
        await cache.open()
        store = await stack.enter_async_context(S3ObjectStore(settings.object_store))
        engine = EngineClient(
            await stack.enter_async_context(
                connect(settings.engine_address, max_message_bytes=settings.max_message_bytes)
            )
        )
        limits = Limits(
            max_fetches=settings.max_fetches,
            max_loads=settings.max_loads,
            max_queued=settings.max_queued,
            max_queued_per_tenant=settings.max_queued_per_tenant,
            max_waiting=settings.max_waiting,
            fetch_timeout_s=settings.fetch_timeout_s,
            slow_fetch_s=settings.slow_fetch_s,
            load_timeout_s=settings.load_timeout_s,
            burst=settings.burst,
            weights=settings.tenant_weights,
        )
        loading = Loading(cache, store, engine, write_adapter, limits, check_signature=check_signature)
        stack.push_async_callback(loading.close)
        tickets = Tickets(
            loading,
            max_open=settings.max_open_tickets,
            max_open_per_tenant=settings.max_open_tickets_per_tenant,
            timeout_s=settings.ticket_timeout_s,
        )
        stack.push_async_callback(tickets.close)
        wishes = Wishes(loading.view, tickets, poll_s=settings.wish_poll_s)
        stack.push_async_callback(_stop, asyncio.create_task(wishes.run(), name="wishes"))
        catalog: CatalogClient | None = None
        if settings.catalog_address:
            catalog = CatalogClient(await stack.enter_async_context(connect(settings.catalog_address)))
        pins = Pins(
            PinStore(settings.pins_path or settings.cache_dir / ".pins.json"),
            catalog,
            engine,
            cache,
            tickets,
            max_pins=settings.max_pins,
            max_bytes=int(settings.max_pinned_share * settings.max_cache_bytes),
            lead_s=settings.pin_lead_s,
            poll_s=settings.pin_poll_s,
            check_signature=check_signature,
        )
        await pins.open()
        stack.push_async_callback(_stop, asyncio.create_task(pins.run(), name="pins"))
        served = ServedPolicies(cache, recent_s=settings.prefetch_recent_s)
        prefetcher: Prefetcher | None = None
        if catalog is not None:
            prefetcher = Prefetcher(catalog, engine, cache, tickets, served, pins, recent_s=settings.prefetch_recent_s)
            stack.push_async_callback(_stop, asyncio.create_task(prefetcher.run(), name="prefetch"))
        node = Node(loading, tickets, pins, cache, engine, served, prefetcher)
        servicer = LoaderServicer(node, ensure_timeout_s=settings.ensure_timeout_s)
        add = loader_service_pb2_grpc.add_LoaderServiceServicer_to_server
        yield Services(runtime=[Binding(add, servicer, _SERVICE.full_name)], figures=lambda: node_figures(node))


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
