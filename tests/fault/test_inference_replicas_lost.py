"""Two replicas under load while one of them is killed, stopped or drained: nobody gets a wrong answer, and what is lost
says so."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from mint_api.v1 import inference_service_pb2 as pb
from mint_client import MintClient
from mint_client.engines import EngineClient
from mint_core.errors import Unavailable
from support.invariants import Invariants
from support.publishing import PROMPT, answer, serve_random_adapter
from support.replicas import LOCAL, wait_registered
from support.stack import Stack, running_stack

pytestmark = [pytest.mark.motion, pytest.mark.timeout(600)]

OTHER = "engineReplicas/local-2"
NUM_POLICIES = 6
NUM_CLIENTS = 6


@pytest.fixture(scope="module")
def two_replicas(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """``mint up --replicas 2``."""
    with running_stack(tmp_path_factory.mktemp("replicas"), base, "--replicas", "2") as running:
        yield running


@pytest.fixture
async def client(two_replicas: Stack) -> AsyncIterator[MintClient]:
    async with two_replicas.client() as each:
        yield each


async def kill(stack: Stack) -> None:
    before = await registered_at(stack)
    pid = await stack.kill("engine-2")
    await stack.wait_restarted("engine-2", pid)
    # Its registration outlives it; the next life has one of its own.
    async with asyncio.timeout(90):
        while await registered_at(stack) in (None, before):  # noqa: ASYNC110 - the catalog knows
            await asyncio.sleep(0.25)


async def stop(stack: Stack) -> None:
    """It answers nothing for longer than its lease lives, and then goes on as if nothing had been."""
    await stack.kill("engine-2", signal.SIGSTOP)
    await wait_registered(stack, [LOCAL])
    await stack.kill("engine-2", signal.SIGCONT)


async def registered_at(stack: Stack) -> int | None:
    """Nanoseconds since 1970; None while the other replica is not registered."""
    async with stack.client() as client:
        times = {each.name: each.register_time.ToNanoseconds() for each in await client.engine_replicas.list()}
    return times.get(OTHER)


async def drain(stack: Stack) -> None:
    async with EngineClient(stack.address("engine-2")) as engine:
        await engine.drain()
        await engine.wait_idle(timeout_s=60)
        await asyncio.sleep(2)
        await engine.undrain()


FIRST_SEEDS = {kill: 100, stop: 200, drain: 300}
"""Each fault has adapters that no replica has seen before."""


@pytest.mark.parametrize("fault", FIRST_SEEDS)
async def test_every_answer_is_right_or_lost(
    two_replicas: Stack, client: MintClient, work: Path, fault: Callable[[Stack], Awaitable[None]]
) -> None:
    seeds = itertools.count(FIRST_SEEDS[fault])
    sampling = pb.SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
    policies: list[str] = []
    expected: dict[str, list[int]] = {}
    holders: set[str] = set()
    while len(policies) < NUM_POLICIES or holders != {LOCAL, OTHER}:
        policy, _ = await serve_random_adapter(two_replicas, client, work, seed=next(seeds))
        said = await client.generate_text(f"{policy}/aliases/live", PROMPT, sampling=sampling)
        policies.append(policy)
        expected[said.digest] = list(said.token_ids)
        holders.add(said.engine_replica)
    aliases = [f"{policy}/aliases/live" for policy in policies]
    counts: Counter[str] = Counter()
    slowest_s = 0.0
    is_over = False

    async def ask(seed: int) -> None:
        nonlocal slowest_s
        dice = random.Random(seed)
        while not is_over:
            begun_s = time.monotonic()
            try:
                said = await client.generate_text(dice.choice(aliases), PROMPT, sampling=sampling)
            except Unavailable as error:
                is_clear = "was lost after" in error.message and error.retry_after_s is not None
                counts["lost in mid-stream" if is_clear else error.message] += 1
            else:
                assert list(said.token_ids) == expected[said.digest]
                counts[said.engine_replica] += 1
            slowest_s = max(slowest_s, time.monotonic() - begun_s)

    clients = [asyncio.create_task(ask(seed)) for seed in range(NUM_CLIENTS)]
    await asyncio.sleep(3)
    assert counts[OTHER]
    await fault(two_replicas)
    await wait_registered(two_replicas, [LOCAL, OTHER], timeout_s=90)
    # What the other one holds it goes on answering alone while it has room. What nobody holds goes to the idle one.
    # Inference looks who is there once a second.
    async with asyncio.timeout(20):
        while said.engine_replica != OTHER or said.digest in expected:
            policy, _ = await serve_random_adapter(two_replicas, client, work, seed=next(seeds))
            said = await client.generate_text(f"{policy}/aliases/live", PROMPT, sampling=sampling)
    is_over = True
    await asyncio.gather(*clients)
    # What ran at the replica may be lost, each stream once; what comes after it goes to the other one.
    num_lost = counts.total() - counts[LOCAL] - counts[OTHER]
    assert num_lost <= (0 if fault is drain else NUM_CLIENTS), counts
    assert num_lost == counts["lost in mid-stream"], counts
    assert slowest_s < 25, counts
    await Invariants(two_replicas).check(client, policies)
    async with EngineClient(two_replicas.address("engine-2")) as engine:
        await engine.wait_idle(timeout_s=10)
        assert {each.num_references for each in (await engine.residency()).adapters} <= {0}


async def test_the_same_answers_come_from_either_replica(two_replicas: Stack, client: MintClient, work: Path) -> None:
    policy, revision = await serve_random_adapter(two_replicas, client, work, seed=77)
    said = []
    for drained in ("engine", "engine-2"):
        async with EngineClient(two_replicas.address(drained)) as engine:
            await engine.drain()
            said.append(await answer(client, f"{policy}/aliases/live"))
            await engine.undrain()
        await wait_registered(two_replicas, [LOCAL, OTHER])
    assert [each.engine_replica for each in said] == [OTHER, LOCAL]
    assert {each.digest for each in said} == {revision.blob.digest}
    assert said[0].token_ids == said[1].token_ids
    assert said[0].logprobs == pytest.approx(said[1].logprobs, abs=1e-5)
