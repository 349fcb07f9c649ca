"""One node's loader: what it holds, what it is about to hold, and what it should keep."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any, Self

from mint_api.runtime.v1 import loader_service_pb2, loader_service_pb2_grpc
from mint_api.v1 import alias_service_pb2
from mint_client._calling import Connection
from mint_core.channel import DEFAULT_TIMEOUT_S, call

__all__ = ["LoaderClient", "adapter_of"]


class LoaderClient:
    """A loader at its runtime address."""

    def __init__(self, loader_runtime_address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._connection = Connection("loader", loader_runtime_address)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _stub(self) -> Any:
        return self._connection.stub(loader_service_pb2_grpc.LoaderServiceStub)

    async def status(self) -> loader_service_pb2.GetLoaderStatusResponse:
        """Tiers, queues and counters."""
        request = loader_service_pb2.GetLoaderStatusRequest()
        response: loader_service_pb2.GetLoaderStatusResponse = await call(
            self._stub.GetLoaderStatus, request, timeout_s=self._timeout_s
        )
        return response

    async def ensure_loaded(
        self,
        adapter: loader_service_pb2.AdapterRef,
        *,
        tier: loader_service_pb2.Tier.ValueType = loader_service_pb2.TIER_HOST,
        priority: int = 0,
        revision: str = "",
        timeout_s: float | None = None,
    ) -> loader_service_pb2.EnsureLoadedResponse:
        """Return when the adapter is at the tier."""
        request = loader_service_pb2.EnsureLoadedRequest(
            adapter=adapter, tier=tier, priority=priority, revision=revision
        )
        response: loader_service_pb2.EnsureLoadedResponse = await call(
            self._stub.EnsureLoaded, request, timeout_s=timeout_s or self._timeout_s
        )
        return response

    async def prefetch(
        self,
        adapters: Iterable[loader_service_pb2.AdapterRef],
        *,
        tier: loader_service_pb2.Tier.ValueType = loader_service_pb2.TIER_DISK,
        priority: int = 0,
        deadline: datetime.datetime | None = None,
    ) -> list[loader_service_pb2.LoadTicket]:
        """Queue loads nobody waits for; a ticket for each, in order."""
        request = loader_service_pb2.PrefetchRequest(adapters=adapters, tier=tier, priority=priority)
        if deadline is not None:
            request.deadline.FromDatetime(deadline)
        return list((await call(self._stub.Prefetch, request, timeout_s=self._timeout_s)).load_tickets)

    async def ticket(self, name: str) -> loader_service_pb2.LoadTicket:
        request = loader_service_pb2.GetLoadTicketRequest(name=name)
        return (await call(self._stub.GetLoadTicket, request, timeout_s=self._timeout_s)).load_ticket

    async def tickets(
        self, *, tenant: str = "", open_only: bool = False, limit: int = 1000
    ) -> list[loader_service_pb2.LoadTicket]:
        """Unfinished ones, oldest first, then finished ones, latest first; ``tenant`` is an id."""
        request = loader_service_pb2.ListLoadTicketsRequest(
            tenant=f"tenants/{tenant}" if tenant else "", open_only=open_only, page_size=limit
        )
        return list((await call(self._stub.ListLoadTickets, request, timeout_s=self._timeout_s)).load_tickets)

    async def cancel(self, name: str) -> loader_service_pb2.LoadTicket:
        """Give a ticket up; a load that others wait for goes on."""
        request = loader_service_pb2.CancelLoadTicketRequest(name=name)
        return (await call(self._stub.CancelLoadTicket, request, timeout_s=self._timeout_s)).load_ticket

    async def pin(
        self,
        alias: str,
        *,
        tier: loader_service_pb2.Tier.ValueType = loader_service_pb2.TIER_HOST,
        start: datetime.datetime | None = None,
        end: datetime.datetime | None = None,
    ) -> loader_service_pb2.Pin:
        """Keep what an alias (a resource name) points at on this node, at once or from a time to a time."""
        pin = loader_service_pb2.Pin(alias=alias, tier=tier)
        if start is not None:
            pin.start_time.FromDatetime(start)
        if end is not None:
            pin.end_time.FromDatetime(end)
        request = loader_service_pb2.PinPolicyRequest(pin=pin)
        return (await call(self._stub.PinPolicy, request, timeout_s=self._timeout_s)).pin

    async def unpin(self, alias: str) -> None:
        request = loader_service_pb2.UnpinPolicyRequest(alias=alias)
        await call(self._stub.UnpinPolicy, request, timeout_s=self._timeout_s)

    async def pins(self) -> list[loader_service_pb2.Pin]:
        """By alias."""
        request = loader_service_pb2.ListPinsRequest()
        return list((await call(self._stub.ListPins, request, timeout_s=self._timeout_s)).pins)


def adapter_of(resolution: alias_service_pb2.Resolution) -> loader_service_pb2.AdapterRef:
    """What a loader must be told of what a name resolved to."""
    tenant = "/".join(resolution.revision.split("/")[:2])
    return loader_service_pb2.AdapterRef(
        tenant=tenant,
        blob=resolution.blob,
        object_key=resolution.object_key,
        base_digest=resolution.base_digest,
        signature=resolution.signature if resolution.HasField("signature") else None,
    )
