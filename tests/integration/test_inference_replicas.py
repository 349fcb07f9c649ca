"""Two real engine replicas of a tiny base behind one inference: spread, drained, overloaded, churned and lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mint_api.v1 import engine_replica_service_pb2 as replica_pb
from mint_api.v1 import inference_service_pb2 as pb
from mint_client import Generation, MintClient
from mint_client.engines import EngineClient
from mint_core.errors import ResourceExhausted, Unavailable
from support.expected_logprobs import ExpectedLogprobs
from support.publishing import PROMPT, answer, create_policy, import_revision
from support.replicas import LOCAL, SECOND, SecondReplica, running_second_replica, wait_registered
from support.stack import Stack, fresh_id, write_random_adapter

pytestmark = [
    # PEFT warns of options that do not concern us.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

LONG = pb.SamplingParams(max_new_tokens=160, temperature=0, ignore_eos=True)
TOLERANCE = 1e-3
NUM_POLICIES = 8
NUM_TURNS = 3


@pytest.fixture(scope="module")
def second(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondReplica]:
    with running_second_replica(stack, tmp_path_factory.mktemp("second")) as replica:
        yield replica


@dataclass(frozen=True)
class Served:
    """Policies whose ``live`` names a random adapter each."""

    aliases: list[str]
    digests: list[str]
    expected: ExpectedLogprobs


@pytest.fixture(scope="module")
def served(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Served:
    work = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {}
    aliases: list[str] = []

    async def publish() -> None:
        async with stack.client() as client:
            for seed in range(NUM_POLICIES):
                folder = write_random_adapter(work / fresh_id("adapter"), stack.base, seed=300 + seed, scale=0.08)
                policy = await create_policy(stack, client)
                revision = await import_revision(stack, client, policy, folder)
                await client.aliases.promote(f"{policy}/aliases/live", revision.number, reason="test")
                aliases.append(f"{policy}/aliases/live")
                folders[revision.blob.digest] = folder

    asyncio.run(publish())
    return Served(aliases, list(folders), ExpectedLogprobs(stack.base, folders))


@pytest.fixture
async def client(stack: Stack, second: SecondReplica) -> AsyncIterator[MintClient]:
    async with stack.client() as each:
        yield each


@contextlib.asynccontextmanager
async def without_local(stack: Stack, client: MintClient) -> AsyncIterator[None]:
    """The stack's own replica is drained inside the block; after it inference knows that it is back."""
    async with EngineClient(stack.address("engine")) as engine:
        await engine.drain()
        try:
            yield
        finally:
            await engine.undrain()
    await wait_registered(stack, [LOCAL, SECOND])
    async with asyncio.timeout(20):
        while (await answer(client, stack.base_model)).engine_replica != LOCAL:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def only_at_second(stack: Stack, client: MintClient, alias: str) -> None:
    """Bring an adapter that nobody holds to the second replica: what asks for it goes there then."""
    async with without_local(stack, client):
        assert (await answer(client, alias)).engine_replica == SECOND


def check(served: Served, said: Generation) -> None:
    """The text was made by the adapter whose digest it carries, and by no neighbour of it."""
    expected = served.expected.of(said.digest, said.prompt_token_ids, said.token_ids)
    assert said.logprobs == pytest.approx(expected, abs=TOLERANCE)
    neighbour = served.digests[(served.digests.index(said.digest) + 1) % NUM_POLICIES]
    other = served.expected.of(neighbour, said.prompt_token_ids, said.token_ids)
    assert max(abs(a - b) for a, b in zip(said.logprobs, other, strict=True)) > 20 * TOLERANCE


async def test_two_replicas_share_what_comes(stack: Stack, client: MintClient, served: Served) -> None:
    listed = json.loads(stack.run("replica", "list", "--json").stdout)["engine_replicas"]
    assert {each["name"]: (each["state"], each["max_running_requests"]) for each in listed} == {
        LOCAL: ("READY", 64),
        SECOND: ("READY", 8),
    }
    first = await asyncio.gather(*(answer(client, alias) for alias in served.aliases[:3]))
    again = await asyncio.gather(*(answer(client, alias) for alias in served.aliases[:3]))
    for said in (*first, *again):
        check(served, said)
    # Residency decides: nobody is asked for an adapter that another one holds.
    assert [each.engine_replica for each in again] == [each.engine_replica for each in first]
    assert not any(each.cold for each in again)
    base = await asyncio.gather(*(answer(client, stack.base_model) for _ in range(24)))
    assert {each.engine_replica for each in base} == {LOCAL, SECOND}
    assert len({each.token_ids for each in base}) == 1


async def test_a_drained_replica_finishes_what_runs_and_gets_nothing_new(
    stack: Stack, client: MintClient, second: SecondReplica, served: Served
) -> None:
    alias = served.aliases[3]
    await only_at_second(stack, client, alias)
    stream = client.generate(alias, PROMPT, sampling=LONG)
    assert (await anext(stream)).header.engine_replica == SECOND
    async with second.client() as engine:
        await engine.drain()
        try:
            assert (await engine.residency()).num_running == 1
            drained = await asyncio.to_thread(stack.run, "replica", "drain", "second", "--json")
            assert json.loads(drained.stdout)["state"] == "DRAINING"
            assert (await answer(client, alias)).engine_replica == LOCAL
            chunks = [each.chunk async for each in stream]
            assert sum(len(chunk.token_ids) for chunk in chunks) == LONG.max_new_tokens
            assert (await client.engine_replicas.get(SECOND)).state == replica_pb.ENGINE_REPLICA_STATE_DRAINING
            bases = [await answer(client, stack.base_model) for _ in range(6)]
            assert {each.engine_replica for each in bases} == {LOCAL}
            taken_back = await asyncio.to_thread(stack.run, "replica", "undrain", "second", "--json")
            assert json.loads(taken_back.stdout)["state"] == "READY"
        finally:
            await engine.undrain()
    await wait_registered(stack, [LOCAL, SECOND])


async def test_a_hot_adapter_is_served_by_both(stack: Stack, client: MintClient, served: Served) -> None:
    alias, digest = served.aliases[7], served.digests[7]
    async with without_local(stack, client):
        assert (await answer(client, alias)).engine_replica == SECOND
    sampling = pb.SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)

    async def ask() -> Generation:
        return await client.generate_text(alias, PROMPT, sampling=sampling, return_logprobs=True)

    answers = await asyncio.gather(*(ask() for _ in range(24)))
    used = Counter(each.engine_replica for each in answers)
    assert min(used[SECOND], used[LOCAL]) >= 1
    assert len({each.token_ids for each in answers}) == 1
    check(served, answers[0])
    async with EngineClient(stack.address("engine")) as local:
        assert digest in {each.digest for each in (await local.residency()).adapters}


async def test_eviction_under_streams_aborts_and_groups_of_samples_leaves_nothing_behind(
    stack: Stack, client: MintClient, second: SecondReplica, served: Served
) -> None:
    """Eight adapters on three places, everybody streaming: each text is checked against torch + PEFT."""
    dice = random.Random(5)
    answers: list[Generation] = []
    counts: Counter[str] = Counter()

    async def patiently(alias: str, sampling: pb.SamplingParams) -> None:
        prompt = [dice.randrange(3, 300) for _ in range(dice.randint(4, 40))]
        for _ in range(30):
            try:
                said = await client.generate_text(alias, prompt, sampling=sampling, return_logprobs=True)
            except (Unavailable, ResourceExhausted) as error:
                counts["refused"] += 1
                await asyncio.sleep(error.retry_after_s or 0.1)
                continue
            answers.append(said)
            counts["cold"] += said.cold
            return
        raise AssertionError(f"{alias} was never answered")

    async def abort(alias: str) -> None:
        stream = client.generate(alias, PROMPT, sampling=LONG)
        with contextlib.suppress(Unavailable, ResourceExhausted):
            for _ in range(dice.randint(1, 6)):
                await anext(stream)
            counts["aborted"] += 1
        await stream.aclose()  # type: ignore[attr-defined]

    async def work(number: int) -> None:
        for turn in range(NUM_TURNS):
            alias = dice.choice(served.aliases)
            kind = (number + turn) % 3
            if kind == 0:
                await abort(alias)
            elif kind == 1:
                sample = pb.SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
                await asyncio.gather(*(patiently(alias, sample) for _ in range(4)))
            else:
                greedy = pb.SamplingParams(max_new_tokens=dice.randint(1, 24), temperature=0, ignore_eos=True)
                await patiently(alias, greedy)

    async with without_local(stack, client):
        await asyncio.gather(*(work(number) for number in range(6)))
    assert {each.engine_replica for each in answers} == {SECOND}
    assert counts["aborted"] >= NUM_TURNS
    assert counts["cold"] >= NUM_TURNS
    assert len({each.digest for each in answers}) > 3
    by_alias = dict(zip([alias.rpartition("/aliases/")[0] for alias in served.aliases], served.digests, strict=True))
    for said in answers:
        assert said.digest == by_alias[said.revision.rpartition("/revisions/")[0]]
        check(served, said)
    async with second.client() as engine:
        await engine.wait_idle(timeout_s=10)
        held = (await engine.residency()).adapters
        assert 1 <= len(held) <= 3
        assert {each.num_references for each in held} == {0}
        # A count that leaked inside SGLang would hold up the unload, and make the replica sick.
        begun_s = time.monotonic()
        for each in held:
            await engine.unload(each.digest)
        assert time.monotonic() - begun_s < 5
        assert not (await engine.residency()).adapters


async def test_a_replica_killed_in_mid_stream_is_told_and_left_out_at_once(
    stack: Stack, client: MintClient, second: SecondReplica, served: Served
) -> None:
    alias = served.aliases[4]
    await only_at_second(stack, client, alias)
    stream = client.generate(alias, PROMPT, sampling=LONG)
    assert (await anext(stream)).header.engine_replica == SECOND
    await anext(stream)
    second.send(signal.SIGKILL)
    with pytest.raises(Unavailable, match=r"engineReplicas/second was lost after \d+ tokens: ") as lost:
        async for _ in stream:
            pass
    assert lost.value.metadata["engine_replica"] == SECOND
    assert lost.value.retry_after_s is not None
    killed_s = time.monotonic()
    answers = await asyncio.gather(*(answer(client, alias) for alias in served.aliases for _ in range(3)))
    assert {each.engine_replica for each in answers} == {LOCAL}
    assert time.monotonic() - killed_s < 10
    for said in answers:
        check(served, said)
    await wait_registered(stack, [LOCAL])
