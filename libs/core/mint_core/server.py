"""Running a service: two endpoints, health, reflection, metrics where asked for, graceful drain.

Public services (``mint.v1``) listen on ``settings.listen``; services between our own processes
(``mint.runtime.v1``) on ``settings.runtime_listen``, so that a network policy or a socket's mode can keep
clients away from them. Both know ``grpc.health.v1`` and reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from mint_core import log, telemetry
from mint_core.config import ServiceSettings
from mint_core.errors import FailedPrecondition, MintError
from mint_core.interceptors import Methods
from mint_core.metrics import Figures, MetricsEndpoint

__all__ = ["Addresses", "Binding", "Services", "run", "running"]

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Binding:
    """One servicer and how to add it."""

    add: Callable[[Any, Any], None]
    """The generated ``add_…_to_server``."""
    servicer: object
    service_name: str
    """Full name, e.g. ``mint.v1.PolicyService``."""


@dataclass(frozen=True, slots=True)
class Services:
    """What one process serves."""

    public: Sequence[Binding] = ()
    runtime: Sequence[Binding] = ()
    on_drain: Callable[[], None] = lambda: None
    """Called when draining begins: ends what would never end by itself, such as watches and waiting claims."""
    figures: Figures | None = None
    """What it tells Prometheus beside its calls; read only where ``telemetry.metrics_listen`` is set."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where it listens, with the real port where port 0 was asked for; empty when there is no such endpoint."""

    public: str
    runtime: str
    metrics: str = ""


class _Endpoint:
    """One listening server with health and reflection."""

    def __init__(
        self, address: str, bindings: Sequence[Binding], settings: ServiceSettings, metrics: MetricsEndpoint | None
    ) -> None:
        self._server = grpc.aio.server(
            interceptors=telemetry.server_interceptors(),
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),  # two processes on one port would each get half of the calls
            ],
        )
        self._health = health.aio.HealthServicer()
        methods = Methods(metrics.around if metrics else None)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, methods)
        self._names = [binding.service_name for binding in bindings]
        for binding in bindings:
            binding.add(binding.servicer, methods)
        reflected = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(reflected), methods
        )
        self._server.add_generic_rpc_handlers((methods,))
        self.address = _bind(self._server, address)

    async def start(self) -> None:
        await self._server.start()
        for name in ["", *self._names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _bind(server: grpc.aio.Server, address: str) -> str:
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # left by a killed predecessor; nobody listens on it any more
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot listen on {address!r}: {error}; choose a free address") from error
    host, colon, _ = address.rpartition(":")
    return address if address.startswith("unix:") or not colon else f"{host}:{port}"


@contextlib.asynccontextmanager
async def running(
    name: str, settings: ServiceSettings, build: Callable[[], AbstractAsyncContextManager[Services]]
) -> AsyncIterator[Addresses]:
    """Serve inside the block; leaving it drains and stops. For tests, and the inside of :func:`run`."""
    telemetry.configure(name, settings.telemetry)
    metrics = MetricsEndpoint(settings.telemetry.metrics_listen) if settings.telemetry.metrics_listen else None
    async with build() as services, contextlib.AsyncExitStack() as stack:
        endpoints = [_Endpoint(settings.listen, services.public, settings, metrics)]
        if services.runtime:
            endpoints.append(_Endpoint(settings.runtime_listen, services.runtime, settings, metrics))
        metrics_address = await stack.enter_async_context(metrics.listening(services.figures)) if metrics else ""
        for endpoint in endpoints:
            await endpoint.start()
        addresses = Addresses(endpoints[0].address, endpoints[1].address if services.runtime else "", metrics_address)
        _log.info("serving", extra={"fields": asdict(addresses)})
        try:
            yield addresses
        finally:
            _log.info("draining", extra={"fields": {"grace_s": settings.grace_s}})
            services.on_drain()
            await asyncio.gather(*(endpoint.stop(settings.grace_s) for endpoint in endpoints))


def run(
    name: str,
    settings: ServiceSettings,
    build: Callable[[], AbstractAsyncContextManager[Services]],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run a service until SIGTERM or SIGINT. A :class:`MintError` at start ends it with one clear line.

    ``loop_factory`` makes its event loop, None asyncio's own kind.
    """
    log.configure(name, settings.log_level)

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        serving = asyncio.ensure_future(_serve_until(name, settings, build, stop))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await serving

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(serve())
    except MintError as error:
        _log.critical(error.message, extra={"fields": {"reason": error.reason}})
        raise SystemExit(f"mint-{name}: {error.reason}: {error.message}") from None
    _log.info("stopped")


async def _serve_until(
    name: str,
    settings: ServiceSettings,
    build: Callable[[], AbstractAsyncContextManager[Services]],
    stop: asyncio.Event,
) -> None:
    async with running(name, settings, build):
        await stop.wait()
