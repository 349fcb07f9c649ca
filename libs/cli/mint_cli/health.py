"""Whether a process does its work: grpc.health.v1 for our services, HTTP for the others."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from mint_core.channel import call, connect
from mint_core.errors import MintError

__all__ = ["is_healthy"]


async def is_healthy(how: str, *, timeout_s: float = 2.0) -> bool:
    """Ask once. ``how`` is ``grpc:ADDRESS`` or a URL; several URLs, joined by spaces, must all be well.

    A URL is well when it answers 2xx without an error in its text, or 403: a server that asks for credentials is up.
    """
    if how.startswith("grpc:"):
        return await _grpc_is_healthy(how.removeprefix("grpc:"), timeout_s)
    answers = await asyncio.gather(*(asyncio.to_thread(_url_is_healthy, url, timeout_s) for url in how.split()))
    return all(answers)


async def _grpc_is_healthy(address: str, timeout_s: float) -> bool:
    channel = connect(address, retry=False)
    try:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = await call(stub.Check, health_pb2.HealthCheckRequest(), timeout_s=timeout_s)
    except MintError:
        return False
    finally:
        await channel.close()
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _url_is_healthy(url: str, timeout_s: float) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            return b'"error"' not in answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 403
    except (OSError, ValueError):
        return False
