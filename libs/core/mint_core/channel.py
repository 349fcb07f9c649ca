"""Outgoing calls: every one has a deadline, carries the principal, and raises MinT's errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from mint_core import calls, telemetry
from mint_core.errors import DeadlineExceeded
from mint_core.status import from_rpc_error

__all__ = ["DEFAULT_TIMEOUT_S", "call", "connect", "stream"]

DEFAULT_TIMEOUT_S = 30.0
"""Deadline of a call whose caller names none."""

_RETRY_POLICY = {
    # Only UNAVAILABLE, and only while the server has sent nothing: changing calls carry request ids, so a repeated
    # one is answered from the store.
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
        # The calls that stream to a server: their clients know how to go on or begin anew. Repeated by gRPC itself
        # while the connection breaks, they make gRPC 1.85 abort the process ("pending == nullptr").
        {
            "name": [
                {"service": "mint.v1.BlobService", "method": "UploadBlob"},
                {"service": "mint.v1.PolicyService", "method": "ImportPolicies"},
                {"service": "mint.runtime.v1.MaintenanceService", "method": "Restore"},
            ]
        },
    ]
}

T = TypeVar("T")


def connect(address: str, *, max_message_bytes: int = 8 * 1024 * 1024, retry: bool = True) -> grpc.aio.Channel:
    """Open a channel to host:port or unix:PATH. It connects lazily and reconnects by itself; close it when done."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # A server that is back is found before the repeats of a call are used up (0.56 to 0.84 s).
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 400),
            ("grpc.enable_retries", int(retry)),
            ("grpc.service_config", json.dumps(_RETRY_POLICY if retry else {})),
        ],
        interceptors=telemetry.client_interceptors(),
    )


async def call(method: Callable[..., Any], request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """Make a unary (or client-streaming) call: ``await call(stub.GetPolicy, request, timeout_s=5)``."""
    try:
        return await method(request, timeout=_timeout(timeout_s), metadata=_metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def stream(method: Callable[..., Any], request: Any, *, timeout_s: float | None) -> AsyncIterator[Any]:
    """Make a server-streaming call; closing the iterator cancels it. ``timeout_s=None`` is for watches only."""
    running = method(request, timeout=_timeout(timeout_s), metadata=_metadata())
    try:
        async for response in running:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        running.cancel()


def _timeout(timeout_s: float | None) -> float | None:
    inherited = calls.remaining_s()
    if inherited is None:
        return timeout_s
    if inherited <= 0:
        raise DeadlineExceeded("the caller's deadline passed before an outgoing call could be made")
    return inherited if timeout_s is None else min(timeout_s, inherited)


def _metadata() -> tuple[tuple[str, str], ...]:
    return ((calls.PRINCIPAL_KEY, calls.principal()),)
