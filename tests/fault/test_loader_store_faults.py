"""An object store that is slow, silent, cut off, busy or away: bounded waits, documented codes, no restart needed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_core.errors import BlobCorrupt, DeadlineExceeded, MintError, ResourceExhausted, Unavailable
from mint_loader.adapters import verify_adapter
from support.fault_proxy import FaultProxy, Faults
from support.loader_node import Materials, Node, running_node
from support.weed import WeedServer

QUICK = {
    "object_store__connect_timeout_s": 0.5,
    "object_store__read_timeout_s": 0.4,
    "object_store__max_attempts": 2,
    "object_store__backoff_s": 0.05,
    "object_store__transfer_timeout_s": 2.5,
}
BOUND_S = 6.0
"""Two silences or one transfer, and what a busy machine takes."""
FAULTS = {
    "too slow to end in time": Faults(bytes_per_s=4_000),
    "silent": Faults(stall_after_bytes=0),
    "silent in the midst": Faults(stall_after_bytes=9_000),
    "cut off at once": Faults(reset_after_bytes=0),
    "cut off in the midst": Faults(reset_after_bytes=9_000),
    "busy": Faults(busy=True),
}


@pytest.fixture
async def node(tmp_path: Path, loader_weed: WeedServer, loader_materials: Materials) -> AsyncIterator[Node]:
    async with running_node(tmp_path, loader_weed, loader_materials) as node:
        yield node


@pytest.fixture
async def proxy(loader_weed: WeedServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(loader_weed.endpoint_url) as proxy:
        yield proxy


async def fails_in_time(node: Node, ref: pb.AdapterRef) -> MintError:
    begun_s = time.monotonic()
    with pytest.raises(MintError) as caught:
        await node.ensure(ref, pb.TIER_DISK)
    assert time.monotonic() - begun_s < BOUND_S
    return caught.value


async def test_every_fault_is_unavailable_in_time_and_heals_without_a_restart(
    node: Node, proxy: FaultProxy, report: Callable[[str], None]
) -> None:
    await node.start(object_store__endpoint_url=proxy.url, **QUICK)
    here, away = await node.adapter(0), await node.adapter(1)
    await node.ensure(here)
    for name, faults in FAULTS.items():
        proxy.faults = faults
        num_before, begun_s = proxy.num_afflicted, time.monotonic()
        error = await fails_in_time(node, away)
        report(f"store {name}: UNAVAILABLE after {time.monotonic() - begun_s:.2f} s")
        assert type(error) is Unavailable, (name, error)
        assert error.retry_after_s is not None, name
        assert away.object_key in str(error) or away.blob.digest in str(error), (name, error)
        assert proxy.num_afflicted > num_before
        # Others are undisturbed, and nothing is left of what failed.
        assert (await node.ensure(here, pb.TIER_DISK)).found_at == pb.TIER_DISK
        await node.holds(here)
        proxy.heal()
    await proxy.down()
    assert type(await fails_in_time(node, away)) is Unavailable
    await proxy.up()
    assert (await node.ensure(away)).found_at == pb.TIER_STORE
    await node.holds(here, away)
    assert set(node.engine.loaded) == {here.blob.digest, away.blob.digest}


async def test_a_fault_that_passes_costs_time_and_nothing_else(node: Node, proxy: FaultProxy) -> None:
    patient = {"max_attempts": 5, "backoff_s": 0.3, "transfer_timeout_s": 20}
    patient = QUICK | {f"object_store__{key}": value for key, value in patient.items()}
    await node.start(object_store__endpoint_url=proxy.url, **patient)
    refs = [await node.adapter(number) for number in range(4)]
    for ref, faults in zip(refs, (Faults(latency_s=0.2), *list(FAULTS.values())[1:]), strict=False):
        proxy.faults = faults
        ensuring = asyncio.create_task(node.ensure(ref, pb.TIER_DISK))
        await asyncio.sleep(0.3)
        proxy.heal()
        assert (await ensuring).found_at == pb.TIER_STORE
    await node.holds(*refs)


async def test_a_slow_blob_delays_nobody_else(node: Node, proxy: FaultProxy) -> None:
    refs = [await node.adapter(number) for number in range(4)]
    proxy.faults = Faults(stall_after_bytes=2_000, only=refs[0].object_key)
    await node.start(
        object_store__endpoint_url=proxy.url,
        object_store__max_concurrency=4,
        object_store__transfer_timeout_s=20,
        object_store__read_timeout_s=20,
    )
    slow = asyncio.create_task(node.ensure(refs[0], pb.TIER_DISK))
    while not proxy.num_afflicted:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    async with asyncio.timeout(BOUND_S):
        await asyncio.gather(*(node.ensure(ref, pb.TIER_DISK) for ref in refs[1:]))
    assert not slow.done()
    # A caller has a deadline of its own, and the others who wait go on.
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await node.ensure(refs[0], pb.TIER_DISK, timeout_s=0.5)
    assert time.monotonic() - begun_s < BOUND_S
    proxy.heal()
    assert (await asyncio.wait_for(slow, BOUND_S)).found_at == pb.TIER_STORE


@pytest.mark.motion
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(2))
async def test_weather(node: Node, proxy: FaultProxy, seed: int, report: Callable[[str], None]) -> None:
    """Two minutes of faults that come and go, a cache that is too small, and callers who do not wait."""
    chance = random.Random(seed)
    refs = [await node.adapter(number) for number in range(6)]
    max_cache_bytes = 3 * refs[0].blob.size_bytes + 40_000
    await node.start(object_store__endpoint_url=proxy.url, max_cache_bytes=max_cache_bytes, **QUICK)
    told: dict[str, int] = {}
    ended = asyncio.Event()

    async def caller() -> None:
        while not ended.is_set():
            tier = chance.choice([pb.TIER_DISK, pb.TIER_HOST])
            begun_s = time.monotonic()
            try:
                await node.ensure(chance.choice(refs), tier, timeout_s=chance.choice([0.3, 4.0]))
                outcome = "OK"
            except (Unavailable, DeadlineExceeded, ResourceExhausted) as error:
                outcome = type(error).__name__
            assert time.monotonic() - begun_s < 4 + BOUND_S
            told[outcome] = told.get(outcome, 0) + 1
            await asyncio.sleep(chance.uniform(0, 0.1))

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(caller())
        end_s = time.monotonic() + 120
        while time.monotonic() < end_s:
            proxy.faults = chance.choice([*FAULTS.values(), Faults(), Faults(), Faults(latency_s=0.1)])
            if chance.random() < 0.2:
                proxy.reset()
            await asyncio.sleep(chance.uniform(0.2, 2.0))
            status = await node.status()
            assert status.cache_bytes <= max_cache_bytes
        proxy.heal()
        ended.set()
    for ref in refs:
        await node.ensure(ref)
    assert set(node.engine.loaded) <= {ref.blob.digest for ref in refs}
    for path in node.cache.glob("[0-9a-f]*"):
        assert verify_adapter(path, f"sha256:{path.name}")
    report(f"weather {seed}: {told}")
    assert told["OK"] > 50


FLIPS = {"length of the header": 0, "header": 40, "last byte": -1}


async def test_one_flipped_bit_is_data_loss_in_the_object_and_nothing_on_the_way(
    node: Node, proxy: FaultProxy, loader_materials: Materials
) -> None:
    await node.start(object_store__endpoint_url=proxy.url)
    good, bad = await node.adapter(0), await node.adapter(1)
    proxy.faults = Faults(flip_at=9_000)
    assert (await node.ensure(good)).found_at == pb.TIER_STORE
    assert proxy.num_requests == 2, "what arrived damaged is read once more"
    proxy.heal()
    content = loader_materials.adapters[1].blob.read_bytes()
    for name, at in FLIPS.items():
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        await node.store.put_bytes(bad.object_key, bytes(flipped), if_absent=False)
        with pytest.raises(BlobCorrupt, match="restore it or upload it again"):
            await node.ensure(bad)
        assert bad.blob.digest not in node.engine.loaded, name
        assert (await node.ensure(good, pb.TIER_DISK)).found_at == pb.TIER_DISK
        await node.holds(good)
    await node.store.put_bytes(bad.object_key, content, if_absent=False)
    assert (await node.ensure(bad)).found_at == pb.TIER_STORE
