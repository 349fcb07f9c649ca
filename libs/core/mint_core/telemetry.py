"""OpenTelemetry tracing behind one switch: ``telemetry.otlp_endpoint``. Unset, nothing is imported or wrapped.

Its settings are all of a service's telemetry, the metrics' too.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mint_core.errors import FailedPrecondition

__all__ = ["TelemetrySettings", "client_interceptors", "configure", "server_interceptors"]


class TelemetrySettings(BaseModel):
    """The switches."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    otlp_endpoint: str = ""
    """OTLP/gRPC endpoint that spans are sent to, e.g. http://127.0.0.1:4317; empty turns tracing off."""
    metrics_listen: str = ""
    """Address host:port of the HTTP endpoint for Prometheus, see :mod:`mint_core.metrics`; empty turns it off."""


_enabled = False


def configure(service: str, settings: TelemetrySettings) -> None:
    """Set the process's tracer up, once, if the switch is on."""
    global _enabled
    if not settings.otlp_endpoint or _enabled:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.grpc import aio_server_interceptor  # noqa: F401 - is it installed?
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise FailedPrecondition(
            f"telemetry.otlp_endpoint is {settings.otlp_endpoint!r} but {error.name} is not installed; "
            "install mint-lora[telemetry] or clear the setting"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"mint-{service}"}))
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=settings.otlp_endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    _enabled = True


def server_interceptors() -> list[Any]:
    """Interceptors for a ``grpc.aio`` server: one when tracing is on, none otherwise."""
    if not _enabled:
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    return [aio_server_interceptor()]


def client_interceptors() -> list[Any]:
    """Interceptors for a ``grpc.aio`` channel."""
    if not _enabled:
        return []
    from opentelemetry.instrumentation.grpc import aio_client_interceptors

    return list(aio_client_interceptors())
