"""Groups over what the catalog keeps account of: the audit trail and usage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from google.protobuf import any_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

# A change's states are of these services' types; what packs them is found by its name among all that are imported.
from mint_api.runtime.v1 import work_service_pb2  # noqa: F401
from mint_api.v1 import (  # noqa: F401
    alias_service_pb2,
    audit_service_pb2,
    audit_service_pb2_grpc,
    evaluation_service_pb2,
    fleet_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    run_service_pb2,
    tenant_service_pb2,
    usage_service_pb2,
    usage_service_pb2_grpc,
)
from mint_client._calling import Connection, pages
from mint_core.channel import call

__all__ = ["Audit", "UsageCounters", "unpack"]


def unpack(state: any_pb2.Any) -> Message | None:
    """The record of a change's ``before`` or ``after``; None for a type that only a newer client knows."""
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(state.TypeName())
    except KeyError:
        return None
    message: Message = message_factory.GetMessageClass(descriptor)()
    return message if state.Unpack(message) else None


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


class Audit:
    """The audit trail: who changed what, when and why."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    def list(
        self,
        tenant: str,
        *,
        resource: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[audit_service_pb2.AuditEntry]:
        """Entries of ``tenant``, newest first, read at one catalog revision.

        ``resource`` (a resource name) leaves those that change it or something below it; ``since`` and ``until``, those
        from one time until before another.
        """
        stub = self._connection.stub(audit_service_pb2_grpc.AuditServiceStub)

        async def read(token: str) -> Any:
            request = audit_service_pb2.ListAuditEntriesRequest(
                parent=f"tenants/{tenant}",
                page_size=page_size,
                page_token=token,
                resource=resource,
                start_time=_timestamp(since),
                end_time=_timestamp(until),
            )
            return await call(stub.ListAuditEntries, request, timeout_s=self._timeout_s)

        return pages(read, "audit_entries")


class UsageCounters:
    """What was used of tenants and policies."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def get(
        self, resource: str, *, since: datetime | None = None, until: datetime | None = None
    ) -> usage_service_pb2.Usage:
        """Usage of a tenant or policy (a resource name), by whole days: of ``since`` and later, before ``until``."""
        stub = self._connection.stub(usage_service_pb2_grpc.UsageServiceStub)
        request = usage_service_pb2.GetUsageRequest(
            resource=resource, start_time=_timestamp(since), end_time=_timestamp(until)
        )
        usage: usage_service_pb2.Usage = (await call(stub.GetUsage, request, timeout_s=self._timeout_s)).usage
        return usage
