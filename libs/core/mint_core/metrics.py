"""What a service counts, for Prometheus: an HTTP endpoint ``/metrics`` behind one switch, ``telemetry.metrics_listen``.

Every service tells its calls (the names and labels of go-grpc-prometheus, so that dashboards made for those fit) and
its process; a service that has more to tell hands :class:`Figure` to :class:`mint_core.server.Services`. Unset,
nothing is imported, wrapped or counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from mint_core import clock
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_core.interceptors import AroundCall
from mint_core.log import get_logger

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["Figure", "Figures", "MetricsEndpoint", "counter", "gauge"]

_log = get_logger(__name__)

_READ_TIMEOUT_S = 5.0
"""Longest wait of a scrape for the service's figures; Prometheus gives up after ten seconds by default."""
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
"""go-grpc-prometheus' words, by whether requests and responses stream."""


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

    def around(self, method: str, handler: grpc.RpcMethodHandler) -> AroundCall:
        """Counts and times the calls of one method, for :class:`mint_core.interceptors.Methods`."""
        service, _, name = method.removeprefix("/").partition("/")
        labels = (_KINDS[handler.request_streaming, handler.response_streaming], service, name)
        seconds = self._seconds.labels(*labels)

        @contextlib.contextmanager
        def counted(context: grpc.aio.ServicerContext) -> Iterator[None]:
            started_s, given_up = clock.monotonic_s(), False
            try:
                yield
            except (asyncio.CancelledError, GeneratorExit):
                given_up = True
                raise
            finally:
                code = grpc.StatusCode.CANCELLED if given_up else context.code() or grpc.StatusCode.OK
                self._handled.labels(*labels, code.name).inc()
                seconds.observe(clock.monotonic_s() - started_s)

        return counted

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
            server, thread = start_http_server(self._port, self._host.strip("[]"), registry=self._registry)
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


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise InvalidArgument(
            f"telemetry.metrics_listen is {address!r}: expected host:port, e.g. 127.0.0.1:9464",
            field="telemetry.metrics_listen",
        )
    return host, int(port)


def _shut(server: Any, thread: Any) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
