"""Each process dies by SIGKILL in turn; once it is back, the same policies serve the same answers."""

import asyncio
from pathlib import Path

import pytest

from mint_client import Generation, MintClient
from mint_core import errors
from support.invariants import Invariants
from support.publishing import answer, serve_random_adapter
from support.stack import Stack

PROCESSES = ["etcd", "weed", "catalog", "trainer", "runs", "exporter", "loader", "engine", "inference"]


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_killed_process_comes_back_and_answers_are_the_same(stack: Stack, work: Path, name: str) -> None:
    invariants = Invariants(stack)
    async with stack.client() as client:
        served = [await serve_random_adapter(stack, client, work, seed=seed) for seed in (1, 2)]
        policies = [policy for policy, _ in served]
        aliases = [f"{policy}/aliases/live" for policy in policies]
        before = [await answer(client, alias) for alias in aliases]
        await invariants.check(client, policies)

        pid = await stack.kill(name)
        await stack.wait_healthy(dead={name: pid})

    async with stack.client() as client:
        after = [await answer_patiently(client, alias) for alias in aliases]
        for old, new in zip(before, after, strict=True):
            assert (new.revision, new.digest, new.token_ids) == (old.revision, old.digest, old.token_ids)
            assert new.logprobs == pytest.approx(old.logprobs, abs=1e-5)
        await invariants.check(client, policies)
        # and the life goes on: something new can be published and served
        await serve_random_adapter(stack, client, work, seed=9)


async def answer_patiently(client: MintClient, alias: str) -> Generation:
    """What a well-behaved client does: retries UNAVAILABLE while a dead process comes back."""
    for _ in range(60):
        try:
            return await answer(client, alias)
        except errors.Unavailable as error:
            await asyncio.sleep(min(error.retry_after_s or 0.5, 1.0))
    return await answer(client, alias)


async def test_resident_revisions_keep_serving_while_the_catalog_is_away(stack: Stack, work: Path) -> None:
    async with stack.client() as client:
        policy, revision = await serve_random_adapter(stack, client, work, seed=4)
        alias = f"{policy}/aliases/live"
        before = await answer(client, alias)
        pid = await stack.kill("catalog")
        during = await answer(client, alias)
        assert (during.digest, during.token_ids) == (revision.blob.digest, before.token_ids)
        await stack.wait_healthy(dead={"catalog": pid})
        assert (await answer_patiently(client, alias)).token_ids == before.token_ids
