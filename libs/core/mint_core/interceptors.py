"""What every served call passes.

Its principal, method and deadline are noted, and its errors leave as documented statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from mint_core import errors
from mint_core.calls import ANONYMOUS, PRINCIPAL_KEY, inbound_call
from mint_core.log import get_logger
from mint_core.status import grpc_status

__all__ = ["ErrorInterceptor"]

_log = get_logger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns :class:`MintError` into its status and anything else into INTERNAL with an error id.

    The stack trace of a bug goes to the log under that id, never to the client. It must be the last interceptor of its
    server: it keeps each method's handler, and asks no further from the second call on.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        # What a method is handled by does not change while a server lives: asking and wrapping are for the first call.
        method = handler_call_details.method
        known = self._handlers.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        self._handlers[method] = wrapped = _wrapped(method, handler)
        return wrapped


def _wrapped(method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    if method.startswith("/grpc."):  # health and reflection have their own manners
        return handler
    if handler.response_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        return make(_streaming(method, inner), handler.request_deserializer, handler.response_serializer)
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
    return make(_unary(method, inner), handler.request_deserializer, handler.response_serializer)


@contextlib.contextmanager
def _caller(method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
    metadata = dict(context.invocation_metadata() or ())
    remaining = context.time_remaining()
    with inbound_call(str(metadata.get(PRINCIPAL_KEY, ANONYMOUS)), remaining, method.removeprefix("/")):
        yield


def _unary(method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with _caller(method, context):
            try:
                return await inner(request, context)
            except Exception as error:  # noqa: BLE001 - the border: whatever it is, the client gets a status
                await context.abort_with_status(_status(method, error))

    return call


def _streaming(method: str, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        with _caller(method, context):
            try:
                async with contextlib.aclosing(inner(request, context)) as responses:  # type: ignore[type-var]
                    async for response in responses:
                        yield response
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except Exception as error:  # noqa: BLE001 - the border: whatever it is, the client gets a status
                await context.abort_with_status(_status(method, error))

    return call


def _status(method: str, error: Exception) -> grpc.Status:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):
        # Raised by the generated base class where a servicer does not override a method.
        error = errors.Unimplemented(f"{method} is part of the contract and not answered by this version of MinT")
    if isinstance(error, TimeoutError):
        error = errors.DeadlineExceeded(f"{method} did not finish before its deadline; retry with a longer one")
    if isinstance(error, errors.MintError) and not isinstance(error, errors.Internal):
        return grpc_status(error)
    error_id = secrets.token_hex(8)
    _log.error("a call failed by a bug", exc_info=error, extra={"fields": {"method": method, "error_id": error_id}})
    return grpc_status(
        errors.Internal(f"internal error {error_id}; the server's log has the rest", metadata={"error_id": error_id})
    )
