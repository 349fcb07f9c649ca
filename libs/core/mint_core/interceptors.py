"""What every served call passes.

Its principal, method and deadline are noted, and its errors leave as documented statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import grpc

from mint_core import errors
from mint_core.calls import ANONYMOUS, PRINCIPAL_KEY, inbound_call
from mint_core.log import get_logger
from mint_core.status import grpc_status

__all__ = ["AroundCall", "Methods"]

_log = get_logger(__name__)

AroundCall = Callable[[grpc.aio.ServicerContext], AbstractContextManager[object]]
"""Entered at a call's arrival and left at its end, by the error that ended it if one did; its status is then set."""


class Methods(grpc.GenericRpcHandler):
    """All methods of one server: what the generated ``add_…_to_server`` are given instead of it.

    Each is wrapped here, once: its :class:`MintError` leave as their statuses, anything else as INTERNAL with an error
    id; the stack trace of a bug goes to the log under that id, never to the client. An interceptor would be awaited at
    each call.

    The server gets this one table and no "registered" methods, of which it keeps a pending request each and goes over
    all of them whenever one is called: with the catalog's sixty that costs as much as serving the call.
    """

    def __init__(self, around: Callable[[str, grpc.RpcMethodHandler], AroundCall] | None = None) -> None:
        """``around`` makes, for each method, what its calls are to be inside of as well."""
        self._around = around
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def add_registered_method_handlers(self, service_name: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Called by generated code, with all methods of a service."""
        for name, handler in handlers.items():
            method = f"/{service_name}/{name}"
            self._handlers[method] = self._wrapped(method, handler)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Called by generated code as well, with the same methods; :meth:`add_registered_method_handlers` took them."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    def _wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        if method.startswith("/grpc."):  # health and reflection have their own manners
            return handler
        enter: AroundCall = functools.partial(_inbound, method.removeprefix("/"))
        if self._around is not None:
            enter = _inside(enter, self._around(method, handler))
        kind = "_".join(
            "stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming)
        )
        wrap = _streaming if handler.response_streaming else _unary
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(method, getattr(handler, kind), enter), handler.request_deserializer, handler.response_serializer
        )


def _inbound(name: str, context: grpc.aio.ServicerContext) -> inbound_call:
    caller = ANONYMOUS
    for key, value in context.invocation_metadata() or ():
        if key == PRINCIPAL_KEY:
            caller = str(value)
    return inbound_call(caller, context.time_remaining(), name)


def _inside(outer: AroundCall, inner: AroundCall) -> AroundCall:
    @contextlib.contextmanager
    def enter(context: grpc.aio.ServicerContext) -> Iterator[None]:
        with outer(context), inner(context):
            yield

    return enter


def _unary(method: str, inner: Callable[..., Awaitable[Any]], enter: AroundCall) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with enter(context):
            try:
                return await inner(request, context)
            except Exception as error:  # noqa: BLE001 - the border: whatever it is, the client gets a status
                await context.abort_with_status(_status(method, error))

    return call


def _streaming(
    method: str, inner: Callable[..., AsyncIterator[Any]], enter: AroundCall
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        with enter(context):
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
