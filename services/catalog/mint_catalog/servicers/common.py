"""What every servicer does to requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from google.protobuf.message import Message

from mint_catalog.model.codec import Codec, from_message
from mint_catalog.model.records import Fence
from mint_catalog.storage.changes import Event
from mint_catalog.storage.requests import Request
from mint_core.calls import principal
from mint_core.errors import InvalidArgument

__all__ = ["check_parent", "fence_of", "identity", "min_revision", "watch_responses"]


def identity(request: Any, tenant: str) -> Request | None:
    """What makes this call the same as another one, None without a request id."""
    if not request.request_id:
        return None
    payload: Message = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    return Request.of(
        tenant=tenant,
        principal=principal(),
        method=request.DESCRIPTOR.full_name,
        request_id=request.request_id,
        payload=payload.SerializeToString(deterministic=True),
    )


def fence_of(request: Any) -> Fence | None:
    """The fence of a request that may have one."""
    return from_message(request.fence, Fence) if request.HasField("fence") else None


def min_revision(request: Any) -> int:
    """The oldest catalog revision that may answer. Every read is of the store's head, so ``strong`` asks no more."""
    revision: int = request.consistency.min_catalog_revision
    if revision < 0:
        raise InvalidArgument(
            f"consistency.min_catalog_revision is {revision}: pass a catalog_revision that a write returned",
            field="consistency.min_catalog_revision",
        )
    return revision


def check_parent(value: str, parent: str, *, field: str) -> None:
    """A name inside a resource may be left out, but must not contradict the request's."""
    if value not in ("", parent):
        raise InvalidArgument(f"{field} is {value[:120]!r}: expected {parent}, or leave it out", field=field)


async def watch_responses(
    events: AsyncGenerator[Event[Any], None], response_type: type[Any], field: str, codec: Codec[Any]
) -> AsyncGenerator[Any, None]:
    """The responses of a watch; ``field`` holds the resource."""
    async with contextlib.aclosing(events):
        async for event in events:
            response = response_type(type=int(event.type), catalog_revision=event.catalog_revision)
            if event.record is not None:
                getattr(response, field).CopyFrom(codec.to_message(event.record))
            elif event.name is not None:
                getattr(response, field).name = str(event.name)
            yield response
