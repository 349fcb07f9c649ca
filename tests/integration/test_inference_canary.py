"""Canaries and promotions that wait, over the whole installation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_api.runtime.v1 import engine_service_pb2 as engine_pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as engine_grpc
from mint_client import MintClient
from mint_core.channel import call
from mint_core.errors import DeadlineExceeded
from mint_core.split import sees_canary
from support.publishing import answer, import_revision, serve_random_adapter
from support.stack import Stack, fresh_id, write_random_adapter


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[MintClient]:
    async with stack.client() as each:
        yield each


async def _second_revision(stack: Stack, client: MintClient, policy: str, work: Path, *, seed: int) -> int:
    folder = write_random_adapter(work / fresh_id("adapter"), stack.base, seed=seed, scale=0.08)
    return int((await import_revision(stack, client, policy, folder)).number)


async def _resident(stack: Stack) -> set[str]:
    async with stack.channel("engine") as channel:
        stub = engine_grpc.EngineServiceStub(channel)
        response: engine_pb.GetResidencyResponse = await call(stub.GetResidency, engine_pb.GetResidencyRequest())
    return {adapter.digest for adapter in response.adapters}


async def test_requests_are_split_by_their_sticky_key_and_say_so(stack: Stack, client: MintClient, work: Path) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=120)
    name = f"{policy}/aliases/live"
    number = await _second_revision(stack, client, policy, work, seed=780)
    one = (await answer(client, f"{policy}/revisions/1")).token_ids
    two = (await answer(client, f"{policy}/revisions/{number}")).token_ids
    assert one != two
    await client.aliases.set_canary(name, number, 0.5)
    seen = set()
    for key in [f"user-{place}" for place in range(12)] + [""]:
        got = await answer(client, name, sticky_key=key)
        assert got.canary == sees_canary(0.5, name, key)
        assert got.revision == f"{policy}/revisions/{number if got.canary else 1}"
        assert got.token_ids == (two if got.canary else one)
        seen.add(got.canary)
    assert seen == {True, False}
    promoted = await client.aliases.promote(name, number, reason="it is better")
    assert not promoted.HasField("canary")


async def test_a_promotion_waits_and_its_wish_alone_brings_the_adapter(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=121)
    name = f"{policy}/aliases/live"
    number = await _second_revision(stack, client, policy, work, seed=781)
    revision = await client.revisions.get(f"{policy}/revisions/{number}")
    assert revision.blob.digest not in await _resident(stack)
    with pytest.raises(DeadlineExceeded):
        await client.aliases.promote(name, number, min_resident_replicas=2, residency_timeout_s=0.2)
    assert (await client.aliases.get(name)).active.revision_number == 1
    await client.aliases.promote(name, number, min_resident_replicas=1, residency_timeout_s=60)
    assert revision.blob.digest in await _resident(stack)
    got = await answer(client, name)
    assert (got.revision, got.cold) == (revision.name, False)
