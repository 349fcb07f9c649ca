"""The engine, put together; nothing is served before the base is up, proven to be the registered one, and empty of
adapters."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from mint_api.runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from mint_client.registered_base import check_registered_base
from mint_core import channel, clock, log
from mint_core.base_model import digest_of_folder
from mint_core.errors import InvalidArgument
from mint_core.names import BaseModelName, EngineReplicaName
from mint_core.server import Binding, Services
from mint_engine.adapter_folder import AdapterRules
from mint_engine.base_geometry import BaseGeometry
from mint_engine.figures import host_figures
from mint_engine.host import EngineHost, adapter_checker
from mint_engine.prompts import HuggingFacePrompts
from mint_engine.registration import Registration
from mint_engine.replica import Replica
from mint_engine.service import EngineServicer
from mint_engine.settings import EngineSettings
from mint_engine.sglang_engine import SglangEngine

__all__ = ["build"]

_SERVICE = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]

_log = log.get_logger(__name__)


@contextlib.asynccontextmanager
async def build(settings: EngineSettings) -> AsyncIterator[Services]:
    """Everything one engine serves; what was started is ended when the block ends."""
    base_model = str(BaseModelName.parse(settings.base_model, field="base_model"))
    name = str(EngineReplicaName.parse(settings.engine_replica, field="engine_replica"))
    address = _advertised(settings)
    base = await asyncio.to_thread(digest_of_folder, settings.base_model_path)
    if settings.catalog_address:
        await check_registered_base(
            settings.catalog_address,
            settings.base_model,
            settings.base_model_path,
            base.digest,
            timeout_s=settings.catalog_timeout_s,
        )
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
    async with contextlib.AsyncExitStack() as stack:
        started_s = clock.monotonic_s()
        engine = SglangEngine(settings.base_model_path, settings.sglang)
        stack.push_async_callback(engine.close)
        await engine.start()
        prompts = HuggingFacePrompts(settings.base_model_path, vocab_size=engine.limits.vocab_size)
        stack.callback(prompts.close)
        host = EngineHost(
            engine,
            prompts,
            adapter_checker(
                settings.adapter_dir,
                AdapterRules(
                    base_digest=base.digest,
                    geometry=await asyncio.to_thread(BaseGeometry.from_folder, settings.base_model_path),
                    max_lora_rank=engine.limits.max_lora_rank,
                    target_modules=engine.limits.target_modules,
                    spreads_shared_experts=engine.limits.spreads_shared_experts,
                    verify_digest=settings.verify_adapters,
                ),
            ),
            call_timeout_s=settings.sglang.call_timeout_s,
        )
        stack.push_async_callback(host.close)
        replica = Replica(
            host,
            name,
            address,
            base_model,
            base.digest,
            settings.loader_address,
            max_running_requests=settings.sglang.max_running_requests,
        )
        _log.info(
            "engine started",
            extra={"fields": {"base_digest": base.digest, "seconds": round(clock.monotonic_s() - started_s, 1)}},
        )
        if settings.catalog_runtime_address:
            catalog = await stack.enter_async_context(channel.connect(settings.catalog_runtime_address))
            registration = Registration(catalog, replica, ttl_s=settings.lease_ttl_s)
            stack.push_async_callback(_stop, asyncio.create_task(registration.run(), name="registration"))
        servicer = EngineServicer(host, replica, max_generate_s=settings.max_generate_s)
        add = engine_service_pb2_grpc.add_EngineServiceServicer_to_server
        yield Services(
            runtime=[Binding(add, servicer, _SERVICE.full_name)],
            on_drain=host.begin_stop,
            figures=lambda: host_figures(host),
        )


def _advertised(settings: EngineSettings) -> str:
    """The address to register; one that ends in port 0 tells nobody anything."""
    address = settings.advertise_address or settings.runtime_listen
    if settings.catalog_runtime_address and address.rpartition(":")[2] == "0":
        raise InvalidArgument(
            f"runtime_listen is {settings.runtime_listen!r} and advertise_address is empty: give one of them a fixed "
            "port, or the catalog cannot tell others where this engine is",
            field="advertise_address",
        )
    return address


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
