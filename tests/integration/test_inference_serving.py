"""Inference over the whole installation: cold and hot, moving aliases, absent catalogs, lost engines."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_api.runtime.v1 import engine_service_pb2 as engine_pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as engine_grpc
from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as loader_grpc
from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import alias_service_pb2_grpc as alias_grpc
from mint_api.v1 import common_pb2
from mint_api.v1 import inference_service_pb2 as pb
from mint_client import MintClient
from mint_core.channel import call, connect
from mint_core.errors import NotFound, Unavailable
from support.publishing import PROMPT, answer, import_revision, serve_random_adapter
from support.stack import Stack, fresh_id, write_random_adapter

LONG = pb.SamplingParams(max_new_tokens=300, temperature=0, ignore_eos=True)


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[MintClient]:
    async with stack.client() as each:
        yield each


async def loader_status(stack: Stack) -> loader_pb.GetLoaderStatusResponse:
    async with stack.channel("loader") as channel:
        stub = loader_grpc.LoaderServiceStub(channel)
        response: loader_pb.GetLoaderStatusResponse = await call(
            stub.GetLoaderStatus, loader_pb.GetLoaderStatusRequest()
        )
    return response


async def residency(stack: Stack) -> engine_pb.GetResidencyResponse:
    async with stack.channel("engine") as channel:
        stub = engine_grpc.EngineServiceStub(channel)
        response: engine_pb.GetResidencyResponse = await call(stub.GetResidency, engine_pb.GetResidencyRequest())
    return response


async def unload(stack: Stack, digest: str) -> None:
    async with stack.channel("engine") as channel:
        stub = engine_grpc.EngineServiceStub(channel)
        await call(stub.UnloadAdapter, engine_pb.UnloadAdapterRequest(digest=digest))


async def second_revision(stack: Stack, client: MintClient, policy: str, work: Path) -> int:
    folder = write_random_adapter(work / fresh_id("adapter"), stack.base, seed=77, scale=0.08)
    return int((await import_revision(stack, client, policy, folder)).number)


async def test_cold_once_then_hot(stack: Stack, client: MintClient, work: Path) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=101)
    before = await loader_status(stack)
    answers = await asyncio.gather(*(answer(client, f"{policy}/aliases/live") for _ in range(60)))
    assert {each.revision for each in answers} == {revision.name}
    assert {each.digest for each in answers} == {revision.blob.digest}
    assert {each.token_ids for each in answers} == {answers[0].token_ids}
    assert any(each.cold for each in answers)
    after = await loader_status(stack)
    assert after.num_misses - before.num_misses == 1
    assert after.bytes_fetched - before.bytes_fetched == revision.blob.size_bytes
    again = await answer(client, revision.name)
    assert not again.cold
    assert again.token_ids == answers[0].token_ids


async def test_an_adapter_pushed_out_of_the_engine_comes_back_from_disk(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=102)
    first = await answer(client, f"{policy}/aliases/live")
    await unload(stack, revision.blob.digest)
    before = await loader_status(stack)
    second = await answer(client, f"{policy}/aliases/live")
    after = await loader_status(stack)
    assert second.cold
    assert second.token_ids == first.token_ids
    assert (after.num_misses - before.num_misses, after.num_hits - before.num_hits) == (0, 1)


async def test_a_promoted_revision_is_on_the_nodes_disk_before_anybody_asks(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=110)
    alias = f"{policy}/aliases/live"
    await answer(client, alias)
    before = await loader_status(stack)
    number = await second_revision(stack, client, policy, work)  # followed already here, or with the promotion
    await client.aliases.promote(alias, number, reason="test")
    async with asyncio.timeout(20):
        while (now := await loader_status(stack)).num_misses == before.num_misses:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
        while (now := await loader_status(stack)).num_loading:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
    assert now.num_cached == before.num_cached + 1
    seen = await answer(client, alias)
    assert (seen.revision, seen.cold) == (f"{policy}/revisions/{number}", True)
    assert (await loader_status(stack)).num_misses == now.num_misses


async def test_streams_belong_to_the_revision_they_name_while_the_alias_moves(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=103)
    alias = f"{policy}/aliases/live"
    number = await second_revision(stack, client, policy, work)
    texts = {
        name: (await answer(client, name)).token_ids
        for name in (f"{policy}/revisions/1", f"{policy}/revisions/{number}")
    }
    assert len(set(texts.values())) == 2
    is_over = False
    seen: list[str] = []

    async def ask() -> None:
        while not is_over:
            each = await answer(client, alias)
            assert each.token_ids == texts[each.revision]
            seen.append(each.revision)

    asking = [asyncio.ensure_future(ask()) for _ in range(4)]
    for move in (number, 1, number):
        await asyncio.sleep(0.5)
        await client.aliases.promote(alias, move, reason="test")
    await asyncio.sleep(1.0)
    is_over = True
    await asyncio.gather(*asking)
    assert set(seen) == set(texts)
    assert seen[-1] == f"{policy}/revisions/{number}"


async def test_a_write_is_seen_at_once_by_whoever_names_its_revision(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=104)
    alias = f"{policy}/aliases/live"
    number = await second_revision(stack, client, policy, work)
    await answer(client, alias)
    async with connect(stack.address("catalog")) as channel:
        stub = alias_grpc.AliasServiceStub(channel)
        for move in (number, 1, number, 1):
            written = await call(stub.PromoteAlias, alias_pb.PromoteAliasRequest(name=alias, revision_number=move))
            wish = common_pb2.Consistency(min_catalog_revision=written.catalog_revision)
            seen = await client.generate_text(
                alias, PROMPT, sampling=pb.SamplingParams(max_new_tokens=1), consistency=wish
            )
            assert seen.revision == f"{policy}/revisions/{move}"


async def test_a_client_that_leaves_frees_the_engine(stack: Stack, client: MintClient, work: Path) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=105)
    streams = [client.generate(f"{policy}/aliases/live", PROMPT, sampling=LONG) for _ in range(5)]
    for stream in streams:
        header = await anext(stream)
        assert header.header.resolution.blob.digest == revision.blob.digest
        await anext(stream)
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        while (now := await residency(stack)).num_running:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert {adapter.num_references for adapter in now.adapters} == {0}


async def test_score(stack: Stack, client: MintClient, work: Path) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=106)
    generated = await answer(client, f"{policy}/aliases/live")
    ids = [*generated.prompt_token_ids, *generated.token_ids]
    scored = await client.score(f"{policy}/aliases/live", ids)
    assert scored.header.resolution.blob.digest == revision.blob.digest
    assert list(scored.header.prompt_token_ids) == ids
    assert len(scored.logprobs) == len(ids) - 1
    own = scored.logprobs[-len(generated.token_ids) :]
    assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(own, generated.logprobs, strict=True))


async def test_the_base_answers_on_purpose_only(stack: Stack, client: MintClient, work: Path) -> None:
    policy, _ = await serve_random_adapter(stack, client, work, seed=107)
    base = await answer(client, stack.base_model)
    assert (base.revision, base.digest, base.cold) == ("", "", False)
    for unknown in (f"{policy}/aliases/nobody", f"{policy}/revisions/99", "baseModels/nobody"):
        with pytest.raises(NotFound):
            await answer(client, unknown)


async def test_a_catalog_that_stands_still(stack: Stack, client: MintClient, work: Path) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=108)
    alias = f"{policy}/aliases/live"
    fresh = await answer(client, alias)
    await stack.kill("catalog", signal.SIGSTOP)
    try:
        # Within the staleness bound nobody notices, after it the answer says that it is old.
        async with asyncio.timeout(30):
            while not (stale := await answer(client, alias)).stale:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.2)
        assert (stale.digest, stale.token_ids) == (revision.blob.digest, fresh.token_ids)
        begun_s = time.monotonic()
        await answer(client, alias)
        assert time.monotonic() - begun_s < 5
        with pytest.raises(Unavailable, match="the catalog is away"):
            await client.generate_text(alias, PROMPT, consistency=common_pb2.Consistency(strong=True), timeout_s=20)
    finally:
        await stack.kill("catalog", signal.SIGCONT)
    async with asyncio.timeout(30):
        while (await answer(client, alias)).stale:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)
    number = await second_revision(stack, client, policy, work)
    await client.aliases.promote(alias, number, reason="test")
    async with asyncio.timeout(10):
        while (await answer(client, alias)).revision != f"{policy}/revisions/{number}":  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(360)
async def test_an_engine_lost_in_mid_stream_is_told_and_everything_heals(
    stack: Stack, client: MintClient, work: Path
) -> None:
    policy, revision = await serve_random_adapter(stack, client, work, seed=109)
    alias = f"{policy}/aliases/live"
    before = await answer(client, alias)
    stream = client.generate(alias, PROMPT, sampling=LONG)
    assert (await anext(stream)).header.resolution.blob.digest == revision.blob.digest
    await anext(stream)
    pid = await stack.kill("engine")
    with pytest.raises(Unavailable, match=r"was lost after \d+ tokens"):
        async for _ in stream:
            pass
    await stack.wait_healthy(dead={"engine": pid}, timeout_s=240)
    after = None
    async with asyncio.timeout(30):
        while after is None:
            with contextlib.suppress(Unavailable):
                after = await answer(client, alias)
    assert after.token_ids == before.token_ids
    assert after.cold
