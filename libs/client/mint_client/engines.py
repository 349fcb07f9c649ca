"""One engine replica, for operators: over its runtime address, which the catalog's registry tells."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from mint_api.runtime.v1 import engine_service_pb2 as pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as pb_grpc
from mint_client._calling import Connection
from mint_core import clock
from mint_core.channel import call
from mint_core.errors import DeadlineExceeded

__all__ = ["EngineClient"]

_TIMEOUT_S = 5.0
_POLL_S = 0.1


class EngineClient:
    """Looks at one engine, drains it and takes it back."""

    def __init__(self, runtime_address: str) -> None:
        self._address = runtime_address
        self._connection = Connection("engine", runtime_address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _stub(self) -> Any:
        return self._connection.stub(pb_grpc.EngineServiceStub)

    async def residency(self, *, timeout_s: float = _TIMEOUT_S) -> pb.GetResidencyResponse:
        """What it holds and runs."""
        response: pb.GetResidencyResponse = await call(
            self._stub.GetResidency, pb.GetResidencyRequest(), timeout_s=timeout_s
        )
        return response

    async def drain(self, *, timeout_s: float = _TIMEOUT_S) -> pb.DrainResponse:
        """It takes nothing new from now on; what runs goes on."""
        response: pb.DrainResponse = await call(self._stub.Drain, pb.DrainRequest(), timeout_s=timeout_s)
        return response

    async def undrain(self, *, timeout_s: float = _TIMEOUT_S) -> pb.UndrainResponse:
        """It takes requests again."""
        response: pb.UndrainResponse = await call(self._stub.Undrain, pb.UndrainRequest(), timeout_s=timeout_s)
        return response

    async def unload(self, digest: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        """Let it forget an adapter that nobody uses; an absent one is no error."""
        await call(self._stub.UnloadAdapter, pb.UnloadAdapterRequest(digest=digest), timeout_s=timeout_s)

    async def wait_idle(self, *, timeout_s: float) -> None:
        """Return when no stream runs. Raises :class:`DeadlineExceeded`."""
        deadline = clock.Deadline.after(timeout_s)
        while num_running := (await self.residency()).num_running:
            if deadline.remaining_s <= 0:
                raise DeadlineExceeded(
                    f"the engine at {self._address} still runs {num_running} streams after {timeout_s:g} s; it takes "
                    "nothing new: wait again, or stop it"
                )
            await asyncio.sleep(_POLL_S)
