"""What a service counts, for Prometheus: an HTTP endpoint ``/metrics`` behind one switch, ``telemetry.metrics_listen``.

Every service tells its calls (the names and labels of go-grpc-prometheus, so that dashboards made for those fit) and
its process; a service that has more to tell hands :class:`Figure` to :class:`mint_core.server.Services`. Unset,
nothing is imported, wrapped or counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_core.log import get_logger

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["Figure", "Figures", "MetricsEndpoint", "counter", "gauge"]

_log = get_logger(__name__)

_READ_TIMEOUT_S = 5.0
"""Longest wait of a scrape for the service's figures; Prometheus gives up after ten seconds by default."""
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_CODES: dict[Any, str] = {code.value[0]: code.name for code in grpc.StatusCode} | {
    code: code.name for code in grpc.StatusCode
}
"""Names by number too: a context of ``grpc.aio`` says either."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number as it is now."""

    name: str
    """``mint_ROOM_WHAT_UNIT``, in base units; of what only grows, without the ``_total`` that is added to it."""
    description: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    """Figures of one name have the same labels."""
    grows: bool = False
    """Counted since the start of the process, rather than how it stands."""


Figures = Callable[[], Awaitable[Iterable[Figure]]]
"""Reads a service's figures, on its event loop; called at each scrape."""


def gauge(name: str, description: str, value: float, **labels: str) -> Figure:
    """How something stands."""
    return Figure(name, description, value, labels)


def counter(name: str, description: str, value: float, **labels: str) -> Figure:
    """How often something happened since the start."""
    return Figure(name, description, value, labels, grows=True)


class MetricsEndpoint:
    """What one process tells, and where. :meth:`listening` serves it."""

    def __init__(self, address: str) -> None:
        """``address`` is host:port, port 0 takes a free one.

        Raises :class:`InvalidArgument` for anything else and :class:`FailedPrecondition` if prometheus-client is not
        installed.
        """
        self._host, self._port = _host_and_port(address)
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
        except ImportError as error:
            raise FailedPrecondition(
                f"telemetry.metrics_listen is {address!r} but {error.name} is not installed; "
                "install mint-lora[telemetry] or clear the setting"
            ) from error
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._handled = Counter(
            "grpc_server_handled", "Calls that ended.", (*labels, "grpc_code"), registry=self._registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds from a call's arrival to its end, a stream's last message included.",
            labels,
            buckets=_BUCKETS_S,
            registry=self._registry,
        )

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """For each ``grpc.aio`` server of the process."""
        return [_Calls(self._note)]

    @contextlib.asynccontextmanager
    async def listening(self, figures: Figures | None) -> AsyncIterator[str]:
        """Answer scrapes inside the block, from a thread, at the yielded address.

        ``figures`` is called on the loop that enters the block. A scrape that cannot have them is answered with 500,
        so that Prometheus counts the target as down instead of believing half of it. Raises
        :class:`FailedPrecondition` if the address is taken.
        """
        from prometheus_client import start_http_server

        if figures is not None:
            self._registry.register(_Read(figures, asyncio.get_running_loop()))
        try:
            server, thread = start_http_server(self._port, self._host, registry=self._registry)
        except OSError as error:
            raise FailedPrecondition(
                f"telemetry.metrics_listen is '{self._host}:{self._port}': cannot listen there: {error.strerror}; "
                "choose a free address"
            ) from error
        try:
            yield f"{self._host}:{server.server_port}"
        finally:
            # In a thread, for it waits for the server's, which may be reading figures on this loop.
            await asyncio.to_thread(_shut, server, thread)

    def _note(self, kind: str, method: str, code: str, seconds: float) -> None:
        service, _, name = method.removeprefix("/").partition("/")
        self._handled.labels(kind, service, name, code).inc()
        self._seconds.labels(kind, service, name).observe(seconds)


class _Read:
    """A service's figures, as Prometheus' client collects them: from its own thread, asked of the service's loop."""

    def __init__(self, figures: Figures, loop: asyncio.AbstractEventLoop) -> None:
        self._figures = figures
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Nothing before the first scrape, so that registering reads nothing."""
        return ()

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for each in self._read():
            if each.name not in families:
                make = CounterMetricFamily if each.grows else GaugeMetricFamily
                families[each.name] = make(each.name, each.description, labels=tuple(each.labels))
            families[each.name].add_metric(tuple(each.labels.values()), each.value)
        yield from families.values()

    def _read(self) -> list[Figure]:
        async def read() -> list[Figure]:
            return list(await self._figures())

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        try:
            return reading.result(_READ_TIMEOUT_S)
        except Exception as error:
            reading.cancel()
            _log.warning("a scrape could not read the figures", extra={"fields": {"error": repr(error)}})
            raise


class _Calls(grpc.aio.ServerInterceptor):
    """Notes how each call ended and how long it took; health and reflection are left out."""

    def __init__(self, note: Callable[[str, str, str, float], None]) -> None:
        self._note = note
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        # Of an unknown method there is no handler, so what a caller makes up never becomes a label.
        if handler is None or method.startswith("/grpc."):
            return handler
        self._handlers[method] = self._wrapped(method, handler)
        return self._handlers[method]

    def _wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        kind = {
            (False, False): "unary",
            (True, False): "client_stream",
            (False, True): "server_stream",
            (True, True): "bidi_stream",
        }[handler.request_streaming, handler.response_streaming]
        attribute = "_".join(
            "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
        )
        inner = getattr(handler, attribute)

        @contextlib.contextmanager
        def noted(context: grpc.aio.ServicerContext) -> Iterator[None]:
            started_s, code = time.perf_counter(), "UNKNOWN"
            try:
                yield
                code = _CODES.get(context.code() or 0, code)
            except (asyncio.CancelledError, GeneratorExit):
                code = "CANCELLED"
                raise
            except BaseException:
                code = _CODES.get(context.code() or grpc.StatusCode.UNKNOWN, code)
                raise
            finally:
                self._note(kind, method, code, time.perf_counter() - started_s)

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with noted(context):
                return await inner(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            with noted(context):
                async with contextlib.aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

        make = getattr(grpc, f"{attribute}_rpc_method_handler")
        return make(
            stream if handler.response_streaming else answer, handler.request_deserializer, handler.response_serializer
        )


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise InvalidArgument(
            f"telemetry.metrics_listen is {address!r}: expected host:port, e.g. 127.0.0.1:9464",
            field="telemetry.metrics_listen",
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _shut(server: Any, thread: Any) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
