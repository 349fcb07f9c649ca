"""``mint.runtime.v1.LoaderService``: decode, one call, encode."""

from __future__ import annotations

import grpc

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as pb_grpc
from mint_core import calls
from mint_core.errors import InvalidArgument
from mint_core.names import LoadTicketName
from mint_loader.cache import DiskCache
from mint_loader.loading import Loading
from mint_loader.model import AdapterRef, Tier
from mint_loader.tickets import Ticket, Tickets, TicketState

__all__ = ["LoaderServicer"]

_STATES = {
    TicketState.QUEUED: pb.LOAD_TICKET_STATE_QUEUED,
    TicketState.LOADING: pb.LOAD_TICKET_STATE_LOADING,
    TicketState.DONE: pb.LOAD_TICKET_STATE_DONE,
    TicketState.FAILED: pb.LOAD_TICKET_STATE_FAILED,
    TicketState.CANCELLED: pb.LOAD_TICKET_STATE_CANCELLED,
}


class LoaderServicer(pb_grpc.LoaderServiceServicer):
    """The RPCs over one node's loading, tickets and cache."""

    def __init__(self, loading: Loading, tickets: Tickets, cache: DiskCache, *, ensure_timeout_s: float) -> None:
        self._loading = loading
        self._tickets = tickets
        self._cache = cache
        self._ensure_timeout_s = ensure_timeout_s

    async def EnsureLoaded(
        self, request: pb.EnsureLoadedRequest, _context: grpc.aio.ServicerContext
    ) -> pb.EnsureLoadedResponse:
        remaining_s = calls.remaining_s()
        loaded = await self._loading.ensure(
            _decode_ref(request.adapter),
            _decode_tier(request.tier, Tier.HOST),
            priority=request.priority,
            timeout_s=self._ensure_timeout_s if remaining_s is None else min(remaining_s, self._ensure_timeout_s),
        )
        return pb.EnsureLoadedResponse(
            found_at=pb.Tier.ValueType(loaded.found_at),
            fetch_ms=loaded.fetch_ms,
            load_ms=loaded.load_ms,
            bytes_fetched=loaded.bytes_fetched,
        )

    async def Prefetch(self, request: pb.PrefetchRequest, _context: grpc.aio.ServicerContext) -> pb.PrefetchResponse:
        refs = [_decode_ref(adapter) for adapter in request.adapters]
        tickets = self._tickets.submit(refs, _decode_tier(request.tier, Tier.DISK), priority=request.priority)
        return pb.PrefetchResponse(load_tickets=[_encode_ticket(ticket) for ticket in tickets])

    async def GetLoadTicket(
        self, request: pb.GetLoadTicketRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetLoadTicketResponse:
        ticket = self._tickets.get(LoadTicketName.parse(request.name))
        return pb.GetLoadTicketResponse(load_ticket=_encode_ticket(ticket))

    async def CancelLoadTicket(
        self, request: pb.CancelLoadTicketRequest, _context: grpc.aio.ServicerContext
    ) -> pb.CancelLoadTicketResponse:
        ticket = await self._tickets.cancel(LoadTicketName.parse(request.name))
        return pb.CancelLoadTicketResponse(load_ticket=_encode_ticket(ticket))

    async def GetLoaderStatus(
        self, _request: pb.GetLoaderStatusRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetLoaderStatusResponse:
        cache, loading = self._cache.status, self._loading.status
        return pb.GetLoaderStatusResponse(
            cache_bytes=cache.used_bytes,
            max_cache_bytes=cache.max_bytes,
            num_cached=cache.num_entries,
            num_queued=self._tickets.num_queued,
            num_loading=loading.num_loading,
            num_hits=loading.num_hits,
            num_misses=loading.num_misses,
            num_evictions=cache.num_evictions,
            bytes_fetched=loading.bytes_fetched,
        )


def _decode_ref(adapter: pb.AdapterRef) -> AdapterRef:
    return AdapterRef.checked(
        tenant=adapter.tenant,
        digest=adapter.blob.digest,
        size_bytes=adapter.blob.size_bytes,
        object_key=adapter.object_key,
        base_digest=adapter.base_digest,
    )


def _decode_tier(tier: int, default: Tier) -> Tier:
    if tier == pb.TIER_UNSPECIFIED:
        return default
    try:
        return Tier(tier)
    except ValueError:
        raise InvalidArgument(f"tier is {tier}: expected 1 (store) to 4 (slot)", field="tier") from None


def _encode_ticket(ticket: Ticket) -> pb.LoadTicket:
    encoded = pb.LoadTicket(
        name=str(ticket.name),
        adapter=pb.AdapterRef(
            tenant=f"tenants/{ticket.ref.tenant}", object_key=ticket.ref.object_key, base_digest=ticket.ref.base_digest
        ),
        tier=pb.Tier.ValueType(ticket.tier),
        priority=ticket.priority,
        state=_STATES[ticket.state],
        error=ticket.error,
    )
    encoded.adapter.blob.digest = ticket.ref.digest
    encoded.adapter.blob.size_bytes = ticket.ref.size_bytes
    encoded.deadline.FromMilliseconds(round(ticket.deadline_s * 1000))
    return encoded
