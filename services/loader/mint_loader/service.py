"""``mint.runtime.v1.LoaderService``: decode, one call, encode."""

from __future__ import annotations

import grpc
from google.protobuf import timestamp_pb2

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as pb_grpc
from mint_core import calls, clock
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, LoadTicketName, RevisionName, TenantName
from mint_loader.clients import decode_adapter, encode_adapter
from mint_loader.model import Tier
from mint_loader.node import Node
from mint_loader.pin_store import Pin
from mint_loader.tickets import Ticket, TicketState

__all__ = ["LoaderServicer"]

_DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE = 100, 1000
_STATES = {
    TicketState.QUEUED: pb.LOAD_TICKET_STATE_QUEUED,
    TicketState.LOADING: pb.LOAD_TICKET_STATE_LOADING,
    TicketState.DONE: pb.LOAD_TICKET_STATE_DONE,
    TicketState.FAILED: pb.LOAD_TICKET_STATE_FAILED,
    TicketState.CANCELLED: pb.LOAD_TICKET_STATE_CANCELLED,
}


class LoaderServicer(pb_grpc.LoaderServiceServicer):
    """The RPCs over one node."""

    def __init__(self, node: Node, *, ensure_timeout_s: float) -> None:
        self._node = node
        self._ensure_timeout_s = ensure_timeout_s

    async def EnsureLoaded(
        self, request: pb.EnsureLoadedRequest, _context: grpc.aio.ServicerContext
    ) -> pb.EnsureLoadedResponse:
        remaining_s = calls.remaining_s()
        loaded = await self._node.ensure(
            decode_adapter(request.adapter),
            _decode_tier(request.tier, Tier.HOST),
            revision=RevisionName.parse(request.revision, field="revision") if request.revision else None,
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
        deadline_s = _decode_time(request.deadline) if request.HasField("deadline") else None
        tickets = self._node.tickets.submit(
            [decode_adapter(adapter) for adapter in request.adapters],
            _decode_tier(request.tier, Tier.DISK),
            priority=request.priority,
            timeout_s=None if deadline_s is None else deadline_s - clock.wall_s(),
        )
        return pb.PrefetchResponse(load_tickets=map(_encode_ticket, tickets))

    async def GetLoadTicket(
        self, request: pb.GetLoadTicketRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetLoadTicketResponse:
        ticket = self._node.tickets.get(LoadTicketName.parse(request.name))
        return pb.GetLoadTicketResponse(load_ticket=_encode_ticket(ticket))

    async def CancelLoadTicket(
        self, request: pb.CancelLoadTicketRequest, _context: grpc.aio.ServicerContext
    ) -> pb.CancelLoadTicketResponse:
        ticket = await self._node.tickets.cancel(LoadTicketName.parse(request.name))
        return pb.CancelLoadTicketResponse(load_ticket=_encode_ticket(ticket))

    async def ListLoadTickets(
        self, request: pb.ListLoadTicketsRequest, _context: grpc.aio.ServicerContext
    ) -> pb.ListLoadTicketsResponse:
        tickets = self._node.tickets.listed(
            tenant=TenantName.parse(request.tenant, field="tenant").tenant if request.tenant else "",
            open_only=request.open_only,
            limit=min(request.page_size or _DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE),
        )
        return pb.ListLoadTicketsResponse(load_tickets=map(_encode_ticket, tickets))

    async def PinPolicy(self, request: pb.PinPolicyRequest, _context: grpc.aio.ServicerContext) -> pb.PinPolicyResponse:
        wanted = request.pin
        pin = await self._node.pins.pin(
            AliasName.parse(wanted.alias, field="pin.alias"),
            _decode_tier(wanted.tier, Tier.HOST, field="pin.tier"),
            start_s=_decode_time(wanted.start_time) if wanted.HasField("start_time") else None,
            end_s=_decode_time(wanted.end_time) if wanted.HasField("end_time") else None,
        )
        return pb.PinPolicyResponse(pin=self._encode_pin(pin))

    async def UnpinPolicy(
        self, request: pb.UnpinPolicyRequest, _context: grpc.aio.ServicerContext
    ) -> pb.UnpinPolicyResponse:
        await self._node.pins.unpin(AliasName.parse(request.alias, field="alias"))
        return pb.UnpinPolicyResponse()

    async def ListPins(self, _request: pb.ListPinsRequest, _context: grpc.aio.ServicerContext) -> pb.ListPinsResponse:
        return pb.ListPinsResponse(pins=map(self._encode_pin, self._node.pins.all()))

    async def GetLoaderStatus(
        self, _request: pb.GetLoaderStatusRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetLoaderStatusResponse:
        status = await self._node.status()
        cache, loading = status.cache, status.loading
        response = pb.GetLoaderStatusResponse(
            cache_bytes=cache.used_bytes,
            max_cache_bytes=cache.max_bytes,
            num_cached=cache.num_entries,
            num_queued=status.num_queued_tickets,
            num_loading=loading.num_loading,
            num_hits=loading.num_hits,
            num_misses=loading.num_misses,
            num_evictions=cache.num_evictions,
            bytes_fetched=loading.bytes_fetched,
            num_pins=status.num_pins,
            num_prefetched=status.num_prefetched,
        )
        for tier in status.tiers:
            response.tiers.add(
                tier=pb.Tier.ValueType(tier.tier),
                num_adapters=tier.num_adapters,
                size_bytes=tier.size_bytes,
                max_bytes=tier.max_bytes,
                num_pinned=tier.num_pinned,
                num_hits=tier.num_hits,
                num_misses=tier.num_misses,
                num_running=tier.num_running,
                num_places=tier.num_places,
                num_queued=tier.num_queued,
                mean_ms=tier.mean_s * 1000,
            )
        for tenant in status.tenants:
            response.tenants.add(
                tenant=f"tenants/{tenant.waits.tenant}",
                num_queued=tenant.num_queued,
                num_running=tenant.num_running,
                num_open_tickets=tenant.num_open_tickets,
                num_done=tenant.waits.num_done,
                num_failed=tenant.waits.num_failed,
                num_refused=tenant.waits.num_refused,
                wait_p50_ms=tenant.waits.wait_p50_s * 1000,
                wait_p99_ms=tenant.waits.wait_p99_s * 1000,
            )
        return response

    def _encode_pin(self, pin: Pin) -> pb.Pin:
        pins = self._node.pins
        state = pb.PIN_STATE_HELD if pins.is_held(pin) else pb.PIN_STATE_LOADING
        return pb.Pin(
            alias=str(pin.alias),
            tier=pb.Tier.ValueType(pin.tier),
            start_time=None if pin.start_s is None else _encode_time(pin.start_s),
            end_time=None if pin.end_s is None else _encode_time(pin.end_s),
            create_time=_encode_time(pin.created_s),
            principal=pin.principal,
            state=pb.PIN_STATE_SCHEDULED if pins.is_scheduled(pin) else state,
            adapters=map(encode_adapter, pin.refs),
            error=pin.error,
        )


def _decode_tier(tier: int, default: Tier, *, field: str = "tier") -> Tier:
    if tier == pb.TIER_UNSPECIFIED:
        return default
    try:
        return Tier(tier)
    except ValueError:
        raise InvalidArgument(f"{field} is {tier}: expected 1 (store) to 4 (slot)", field=field) from None


def _decode_time(time: timestamp_pb2.Timestamp) -> float:
    return time.seconds + time.nanos / 1e9


def _encode_time(seconds: float) -> timestamp_pb2.Timestamp:
    time = timestamp_pb2.Timestamp()
    time.FromMilliseconds(round(seconds * 1000))
    return time


def _encode_ticket(ticket: Ticket) -> pb.LoadTicket:
    return pb.LoadTicket(
        name=str(ticket.name),
        adapter=encode_adapter(ticket.ref),
        tier=pb.Tier.ValueType(ticket.tier),
        priority=ticket.priority,
        deadline=_encode_time(ticket.deadline_s),
        state=_STATES[ticket.state],
        error=ticket.error,
    )
