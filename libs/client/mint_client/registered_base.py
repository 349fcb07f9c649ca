"""What trainer and engine ask before they serve: is the base I hold the one the catalog knows by this name?"""

from __future__ import annotations

import asyncio
from pathlib import Path

from mint_api.v1 import base_model_service_pb2, base_model_service_pb2_grpc
from mint_core import clock
from mint_core.channel import call, connect
from mint_core.errors import BaseModelMismatch, NotFound, Unavailable

__all__ = ["check_registered_base"]

_PAUSE_S = 0.5
_CALL_TIMEOUT_S = 5.0


async def check_registered_base(
    catalog_address: str, base_model: str, folder: Path, digest: str, *, timeout_s: float
) -> None:
    """Refuse a base whose digest is not the one registered under its name; waits for a catalog that is starting.

    Raises :class:`BaseModelMismatch` for another digest, :class:`NotFound` for an unknown name and
    :class:`Unavailable` when no catalog answered within ``timeout_s``.
    """
    waited = clock.Deadline.after(timeout_s)
    async with connect(catalog_address) as catalog:
        stub = base_model_service_pb2_grpc.BaseModelServiceStub(catalog)
        request = base_model_service_pb2.GetBaseModelRequest(name=base_model)
        while True:
            try:
                response = await call(stub.GetBaseModel, request, timeout_s=_CALL_TIMEOUT_S)
                break
            except NotFound:
                raise NotFound(
                    f"{base_model} is not registered in the catalog at {catalog_address}: register it with digest "
                    f"{digest}, or set base_model to a registered one"
                ) from None
            except Unavailable as error:
                if waited.remaining_s <= 0:
                    raise Unavailable(
                        f"the catalog at {catalog_address} did not answer for {timeout_s:g} s ({error.message}): "
                        "start it, or correct catalog_address"
                    ) from None
                await asyncio.sleep(_PAUSE_S)
    registered = response.base_model.digest
    if registered != digest:
        raise BaseModelMismatch(
            f"{str(folder)!r} has the digest {digest}, but {base_model} is registered with {registered}: "
            "point base_model_path at the registered folder, or register this one under another name",
            metadata={"expected": registered, "actual": digest},
        )
