"""Every service of a whole installation, scraped as Prometheus does, beside what its own RPCs say."""

from __future__ import annotations

from pathlib import Path

from mint_api.runtime.v1 import engine_service_pb2 as engine_pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as engine_grpc
from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as loader_grpc
from mint_cli.installation import SERVICES
from mint_core.channel import call
from support.prometheus import Samples, handled, scraped
from support.publishing import answer, serve_random_adapter
from support.stack import Stack


async def scrape_all(stack: Stack) -> dict[str, Samples]:
    addresses = {name: each["metrics_address"] for name, each in stack.services().items()}
    assert {name for name, address in addresses.items() if address} == {*SERVICES}
    return {name: await scraped(addresses[name]) for name in SERVICES}


async def test_what_prometheus_reads_is_what_the_rpcs_say(stack: Stack, work: Path) -> None:
    before = await scrape_all(stack)
    async with stack.client() as client:
        policy, _ = await serve_random_adapter(stack, client, work, seed=130)
        assert (await answer(client, f"{policy}/aliases/live")).cold
        assert not (await answer(client, f"{policy}/aliases/live")).cold
    after = await scrape_all(stack)

    for samples in after.values():
        assert samples.of("process_resident_memory_bytes") > 1e6
    assert handled(after["inference"], "Generate")["OK"] == handled(before["inference"], "Generate").get("OK", 0) + 2

    async with stack.channel("loader") as channel:
        stub = loader_grpc.LoaderServiceStub(channel)
        status = await call(stub.GetLoaderStatus, loader_pb.GetLoaderStatusRequest())
    loader = after["loader"]
    disk, host = status.tiers
    tenant = next(each for each in status.tenants if policy.startswith(f"{each.tenant}/"))
    tenant_id = tenant.tenant.removeprefix("tenants/")
    assert loader.of("mint_loader_tier_adapters", tier="disk") == disk.num_adapters > 0
    assert loader.of("mint_loader_tier_bytes", tier="disk") == disk.size_bytes > 0
    assert loader.of("mint_loader_tier_max_bytes", tier="disk") == disk.max_bytes
    assert loader.of("mint_loader_tier_adapters", tier="host") == host.num_adapters > 0
    assert loader.of("mint_loader_tier_misses_total", tier="disk") == disk.num_misses
    assert loader.of("mint_loader_tier_misses_total", tier="host") == host.num_misses
    assert loader.of("mint_loader_tier_places", tier="host") == host.num_places
    assert loader.of("mint_loader_tier_queued", tier="disk") == disk.num_queued == 0
    assert loader.of("mint_loader_fetched_bytes_total") == status.bytes_fetched
    assert loader.of("mint_loader_tenant_done_total", tenant=tenant_id) == tenant.num_done > 0
    wait_s = loader.of("mint_loader_tenant_wait_seconds", tenant=tenant_id, quantile="0.99")
    assert abs(wait_s * 1000 - tenant.wait_p99_ms) < 1e-3
    grown = loader.of("mint_loader_tier_misses_total", tier="disk")
    assert grown == before["loader"].of("mint_loader_tier_misses_total", tier="disk") + 1

    async with stack.channel("engine") as channel:
        engine_stub = engine_grpc.EngineServiceStub(channel)
        residency = await call(engine_stub.GetResidency, engine_pb.GetResidencyRequest())
    engine = after["engine"]
    assert engine.of("mint_engine_adapters") == len(residency.adapters) > 0
    assert engine.of("mint_engine_slots") > 0
    assert engine.of("mint_engine_requests") == engine.of("mint_engine_used_adapters") == 0
    assert [engine.of("mint_engine_state", state=each) for each in ("ready", "draining", "sick")] == [1, 0, 0]

    assert after["inference"].of("mint_inference_streams") == 0
    assert after["inference"].of("mint_inference_replicas", state="ready") == 1
