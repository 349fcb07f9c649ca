"""Residency and host where an engine misbehaves; what a good engine does is asked by the contract."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import AdapterNotResident, InvalidArgument, ResourceExhausted, Unavailable
from mint_engine.adapter_engine import Sampling
from mint_engine.adapter_folder import AdapterFolder
from mint_engine.host import EngineHost, Generation, HostState
from mint_engine.prompts import TokenPrompt
from support.engine_contract import until
from support.fake_engine import FakeEngine, FakePrompts

DIGESTS = ["sha256:" + f"{number:064x}" for number in range(6)]


def check(folder: str, digest: str) -> AdapterFolder:
    return AdapterFolder(Path(folder), rank=4, num_tensors=2, size_bytes=10)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def host(engine: FakeEngine) -> AsyncIterator[EngineHost]:
    host = EngineHost(engine, FakePrompts(), check, call_timeout_s=0.2)
    yield host
    engine.gate.set()
    await host.close()


def request(digest: str = "", **sampling: object) -> Generation:
    return Generation(
        prompt=TokenPrompt((1, 2, 3)),
        tenant="tenants/a",
        digest=digest,
        base=not digest,
        sampling=Sampling(**sampling),
    )


async def test_stuck_unload_makes_the_replica_sick(engine: FakeEngine, host: EngineHost) -> None:
    await host.load(DIGESTS[0], "a")
    engine.gate.clear()
    with pytest.raises(Unavailable, match="unloading adapter"):
        await host.unload(DIGESTS[0])
    assert host.state is HostState.SICK
    for call in (
        host.load(DIGESTS[1], "b"),
        host.unload(DIGESTS[0]),
        anext(host.generate(request(), timeout_s=1)),
        host.score(request(), timeout_s=1),
        host.flush_prefix_cache(),
    ):
        with pytest.raises(Unavailable, match="sick"):
            await call


async def test_stuck_load_makes_the_replica_sick_and_is_not_resident(engine: FakeEngine, host: EngineHost) -> None:
    engine.gate.clear()
    with pytest.raises(Unavailable, match="loading adapter"):
        await host.load(DIGESTS[0], "a")
    assert (host.state, host.residents()) == (HostState.SICK, [])


async def test_refused_load_leaves_the_host_well(engine: FakeEngine, host: EngineHost) -> None:
    engine.refused.add(DIGESTS[0])
    with pytest.raises(InvalidArgument):
        await host.load(DIGESTS[0], "a")
    assert (host.state, host.residents()) == (HostState.READY, [])
    engine.refused.clear()
    assert not (await host.load(DIGESTS[0], "a")).already_resident


async def test_impatient_caller_does_not_break_a_load_that_others_wait_for(
    engine: FakeEngine, host: EngineHost
) -> None:
    engine.gate.clear()
    impatient = asyncio.create_task(host.load(DIGESTS[0], "a"))
    patient = asyncio.create_task(host.load(DIGESTS[0], "a"))
    await asyncio.sleep(0.02)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    engine.gate.set()
    assert not (await patient).already_resident
    assert engine.calls == [f"load {DIGESTS[0]}"]


async def test_load_completes_even_if_nobody_waits_any_more(engine: FakeEngine, host: EngineHost) -> None:
    engine.gate.clear()
    only = asyncio.create_task(host.load(DIGESTS[0], "a"))
    await asyncio.sleep(0.02)
    only.cancel()
    engine.gate.set()
    await asyncio.wait([only])
    await asyncio.sleep(0.02)
    assert [resident.digest for resident in host.residents()] == [DIGESTS[0]]


async def test_running_streams_keep_their_adapters_through_a_storm_of_loads(
    engine: FakeEngine, host: EngineHost
) -> None:
    await host.load(DIGESTS[0], "a")
    engine.token_gate.clear()
    stream = host.generate(request(DIGESTS[0], max_new_tokens=5), timeout_s=5)
    await anext(stream)
    for digest in DIGESTS[1:]:
        await host.load(digest, "x")
    await until(lambda: len(engine.loaded) == 3)
    assert DIGESTS[0] in engine.loaded
    engine.token_gate.set()
    assert len([item async for item in stream]) == 5
    await host.load(DIGESTS[1], "x")
    await host.load(DIGESTS[2], "x")
    await host.load(DIGESTS[3], "x")
    await until(lambda: DIGESTS[0] not in engine.loaded)


async def test_every_place_in_use_is_resource_exhausted_until_a_stream_ends(
    engine: FakeEngine, host: EngineHost
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for digest in DIGESTS[:3]:
            await host.load(digest, "x")
            stream = await stack.enter_async_context(
                contextlib.aclosing(host.generate(request(digest, max_new_tokens=50), timeout_s=5))
            )
            await anext(stream)
        with pytest.raises(ResourceExhausted, match="max_loaded_adapters"):
            await host.load(DIGESTS[3], "x")
    assert not (await host.load(DIGESTS[3], "x")).already_resident


async def test_no_stream_starts_on_an_adapter_that_is_leaving(engine: FakeEngine, host: EngineHost) -> None:
    await host.load(DIGESTS[0], "a")
    engine.gate.clear()
    unload = asyncio.create_task(host.unload(DIGESTS[0]))
    await asyncio.sleep(0.02)
    with pytest.raises(AdapterNotResident):
        await anext(host.generate(request(DIGESTS[0]), timeout_s=1))
    engine.gate.set()
    assert await unload


async def test_unload_then_load_at_once_loads_anew(engine: FakeEngine, host: EngineHost) -> None:
    await host.load(DIGESTS[0], "a")
    removed, loaded = await asyncio.gather(host.unload(DIGESTS[0]), _soon(host.load(DIGESTS[0], "a")))
    assert (removed, loaded.already_resident) == (True, False)
    assert engine.calls == [f"{verb} {DIGESTS[0]}" for verb in ("load", "unload", "load")]


async def test_load_does_not_wait_for_the_adapter_that_makes_place(engine: FakeEngine, host: EngineHost) -> None:
    for digest in DIGESTS[:3]:
        await host.load(digest, "x")
    engine.unload_gate.clear()
    await host.load(DIGESTS[3], "x")
    assert [resident.digest for resident in host.residents()] == [DIGESTS[3], DIGESTS[2], DIGESTS[1]]
    assert DIGESTS[0] in engine.loaded
    # Who wants it back waits until it is gone, and then until another one is.
    back = asyncio.create_task(host.load(DIGESTS[0], "x"))
    await asyncio.sleep(0.02)
    assert not back.done()
    engine.unload_gate.set()
    assert not (await back).already_resident
    await until(lambda: set(engine.loaded) == {DIGESTS[0], DIGESTS[2], DIGESTS[3]})


async def test_load_that_fails_costs_nobody_their_place(engine: FakeEngine, host: EngineHost) -> None:
    for digest in DIGESTS[:3]:
        await host.load(digest, "x")
    engine.refused.add(DIGESTS[3])
    with pytest.raises(InvalidArgument):
        await host.load(DIGESTS[3], "x")
    assert {resident.digest for resident in host.residents()} == set(engine.loaded) == set(DIGESTS[:3])
    assert (await host.load(DIGESTS[0], "x")).already_resident


async def test_eviction_that_gets_stuck_makes_the_replica_sick(engine: FakeEngine, host: EngineHost) -> None:
    for digest in DIGESTS[:3]:
        await host.load(digest, "x")
    engine.unload_gate.clear()
    await host.load(DIGESTS[3], "x")
    await until(lambda: host.state is HostState.SICK)


async def _soon(call):
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return await call


async def test_draining_takes_nothing_new_and_finishes_what_runs(engine: FakeEngine, host: EngineHost) -> None:
    await host.load(DIGESTS[0], "a")
    stream = host.generate(request(DIGESTS[0], max_new_tokens=3), timeout_s=5)
    await anext(stream)
    host.begin_drain()
    assert host.state is HostState.DRAINING
    with pytest.raises(Unavailable, match="draining"):
        await anext(host.generate(request(), timeout_s=1))
    with pytest.raises(Unavailable, match="draining"):
        await host.load(DIGESTS[1], "b")
    assert len([item async for item in stream]) == 3


async def test_failed_engine_is_sick(engine: FakeEngine, host: EngineHost) -> None:
    engine.failure = "the scheduler died"
    assert host.state is HostState.SICK
    with pytest.raises(Unavailable, match="scheduler died"):
        await anext(host.generate(request(), timeout_s=1))


async def test_slot_is_asked_for_at_load_and_later(engine: FakeEngine, host: EngineHost) -> None:
    await host.load(DIGESTS[0], "a", into_slot=True)
    await host.load(DIGESTS[0], "a")
    assert engine.warmed == [DIGESTS[0]]
    await host.load(DIGESTS[0], "a", into_slot=True)
    assert engine.warmed == [DIGESTS[0]] * 2
