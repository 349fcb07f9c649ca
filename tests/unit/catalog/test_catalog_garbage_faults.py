"""Garbage collection killed at every call, and racing with those who publish: no revision ever lacks its bytes."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.catalog.catalog_lab import BASE_DIGEST, POLICY, TENANT, digest_of, rollout
from unit.catalog.garbage_lab import GarbageLab
from unit.catalog.memory_store import MemoryStore

from mint_blobs.memory import MemoryObjectStore
from mint_catalog.model.records import BlobRef, BlobState, LoraConfig, Revision, RevisionState, now
from mint_catalog.model.run_records import Run, SftRecipe
from mint_core.errors import Aborted, BlobMissing, Unavailable, WrongState
from mint_core.names import BlobName, PolicyName, RevisionName, RunName

_STORE_CALLS = ("get", "scan", "scan_each", "txn")
_OBJECT_CALLS = ("delete", "put_bytes")


class Hooked:
    """A store or object store that calls a hook before and after each call."""

    def __init__(self, inner: Any, names: tuple[str, ...], hook: Callable[[str], Awaitable[None]]) -> None:
        self._inner, self._names, self._hook = inner, names, hook

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name == "list":
            return self._list
        if name not in self._names:
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._hook(f"before {name}")
            result = await method(*args, **kwargs)
            await self._hook(f"after {name}")
            return result

        return call

    async def _list(self, prefix: str) -> AsyncIterator[Any]:
        await self._hook("before list")
        async for info in self._inner.list(prefix):
            yield info


class Crash:
    """Raises at the n-th moment at which a process could be killed or a store could go away."""

    def __init__(self) -> None:
        self.left: int | None = None

    async def __call__(self, moment: str) -> None:
        if self.left is None or (moment.startswith("after") and moment not in ("after txn", "after delete")):
            return
        self.left -= 1
        if self.left == 0:
            self.left = None
            raise Unavailable(f"crashed {moment}")


def hooked(hook: Callable[[str], Awaitable[None]]) -> GarbageLab:
    store = Hooked(MemoryStore(), _STORE_CALLS, hook)
    return GarbageLab(store=store, objects=Hooked(MemoryObjectStore(), _OBJECT_CALLS, hook))


async def publish(lab: GarbageLab, text: str, policy: PolicyName = POLICY) -> Revision:
    blob = await lab.put(text)
    wanted = Revision(
        RevisionName("acme", policy.policy, 1),
        blob=BlobRef(blob.digest),
        base_digest=BASE_DIGEST,
        lora=LoraConfig(rank=4),
    )
    return (await lab.revisions.publish(policy, wanted, None, unfenced=True)).record


async def littered(lab: GarbageLab) -> set[str]:
    """Garbage of every kind; returns the keys of the objects that are none."""
    other = PolicyName("acme", "gone")
    await lab.policy()
    await lab.policy(other)
    kept = {(await publish(lab, "a")).object_key, (await publish(lab, "b")).object_key}
    await publish(lab, "b", other)
    await publish(lab, "c", other)
    await lab.put("condemned")
    await lab.collect()
    await lab.put("unreferenced")
    record = await lab.blobs.stage(BlobName("acme", digest_of("half")), 4)
    await lab.objects.put_bytes(record.object_key, b"half")
    await lab.objects.put_bytes(f"tenants/acme/blobs/{'a' * 64}/replaced", b"x")
    fence = await lab.fence()
    for rollout_id, year in (("old", now().year - 1), ("new", now().year + 1)):
        batch = rollout(rollout_id, expire_time=now().replace(year=year))
        await lab.objects.put_bytes(batch.object_key, rollout_id.encode())
        await lab.rollouts.create(batch, fence)
    await lab.policies.delete(other)
    return {*kept, rollout("new").object_key}


async def crash_at(moment: int) -> bool:
    """Let a collection crash at a moment, go on with others; False when it was through before."""
    crash = Crash()
    lab = hooked(crash)
    kept = await littered(lab)
    crash.left = moment
    crashed = False
    try:
        await lab.collect()
    except Unavailable:
        crashed = True
    crash.left = None
    assert await lab.check_revisions_have_blobs() >= 2
    for _ in range(3):
        await lab.collect()
    assert await lab.check_revisions_have_blobs() == 2
    assert await lab.object_keys() == kept
    assert {record.state for record in (await lab.records()).values()} == {BlobState.VERIFIED}
    assert len(await lab.records()) == 2
    return crashed


async def test_killed_at_every_call_the_next_collections_finish() -> None:
    moment = 1
    while await crash_at(moment):
        moment += 1
    assert moment > 50


_actor: contextvars.ContextVar[str] = contextvars.ContextVar("actor", default="")


class Turns:
    """Lets one of several coroutines at a time make one call."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def __call__(self, moment: str) -> None:
        if _actor.get() and moment.startswith("before"):
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append((_actor.get(), turn))
            await turn

    async def run(
        self, jobs: dict[str, Coroutine[Any, Any, None]], choices: list[str], check: Callable[[], Awaitable[object]]
    ) -> None:
        """``choices`` says whose call is next; one who is done is passed over, and at the end the oldest goes."""
        tasks = {}
        for name, job in jobs.items():
            token = _actor.set(name)
            tasks[name] = asyncio.create_task(job)
            _actor.reset(token)
        wanted = iter(choices)
        while not all(task.done() for task in tasks.values()):
            who = next((name for name in wanted if not tasks[name].done()), "")
            for _ in range(
                40 if who else 8
            ):  # between two calls nobody sleeps for longer, but where a lost race backs off
                await asyncio.sleep(0)
                if any(name == who for name, _ in self.waiting):
                    break
            if not self.waiting:
                await asyncio.sleep(0.0005)
                continue
            turn = next((waiting for waiting in self.waiting if waiting[0] == who), self.waiting[0])
            await check()
            self.waiting.remove(turn)
            turn[1].set_result(None)
        for task in tasks.values():
            task.result()


ACTORS = ("gc", "publisher", "runner", "deleter")


async def race(choices: list[str]) -> None:
    """A collector against others who use blobs that nothing refers to, or that lose their last reference."""
    turns = Turns()
    lab = hooked(turns)
    other = PolicyName("acme", "other")
    await lab.policy()
    await lab.policy(other)
    await publish(lab, "shared", other)
    await lab.revisions.retire(RevisionName("acme", "other", 1))
    await lab.put("weights")
    await lab.put("data")

    async def collecting() -> None:
        for _ in range(2):
            await lab.collect()

    async def publishing() -> None:
        for text in ("weights", "shared"):
            await insist(lambda text=text: publish(lab, text))  # type: ignore[misc]

    async def running() -> None:
        async def create() -> None:
            data = await lab.put("data")
            recipe = SftRecipe(BlobRef(data.digest), num_steps=1)
            await lab.runs.create(TENANT, "r1", Run(RunName("acme", "x"), str(POLICY), sft=recipe))

        await insist(create)

    async def deleting() -> None:
        await lab.revisions.delete(RevisionName("acme", "other", 1))

    async def check() -> None:
        await lab.check_revisions_have_blobs()
        if (await lab.store.get([lab.keys.run(RunName("acme", "r1"))])).values[0] is not None:
            data = await lab.blobs.get(BlobName("acme", digest_of("data")))
            assert data.state is BlobState.VERIFIED
            assert data.object_key in await lab.object_keys()

    jobs = dict(zip(ACTORS, (collecting(), publishing(), running(), deleting()), strict=True))
    await turns.run(jobs, choices, check)
    for _ in range(3):
        await check()
        assert await lab.check_revisions_have_blobs() == 2
        await lab.collect()
    assert await lab.object_keys() == {record.object_key for record in (await lab.records()).values()}
    assert len(await lab.records()) == 3


async def insist(job: Callable[[], Awaitable[object]]) -> None:
    """What the exporter and a client do when a blob was condemned under them: put it again."""
    for _ in range(20):
        with suppress(BlobMissing, Aborted):
            await job()
            return
    raise AssertionError("lost twenty races")


@settings(max_examples=25, deadline=None)
@given(choices=st.lists(st.sampled_from(ACTORS), max_size=120))
def test_no_interleaving_takes_a_blob_from_under_a_reference(choices: list[str]) -> None:
    asyncio.run(race(choices))


@pytest.mark.parametrize("actor", ["publisher", "runner"])
async def test_each_writer_at_each_point_of_a_collection(actor: str) -> None:
    # Of the calls of two collections these are the ones around marking, condemning and deleting.
    for point in (*range(16, 42, 2), *range(73, 79)):
        await race(["gc"] * point + [actor] * 12 + ["gc"] * 50)


async def test_deleted_revision_releases_its_blob_and_keeps_its_number() -> None:
    lab = GarbageLab()
    await lab.policy()
    await publish(lab, "a")
    await publish(lab, "b")
    name = RevisionName("acme", "tone", 2)
    with pytest.raises(WrongState, match="is READY: retire it"):
        await lab.revisions.delete(name)
    await lab.revisions.retire(name)
    await lab.revisions.delete(name)
    stored = lab.codecs.revision.decode((await lab.store.get([lab.keys.revision(name)])).values[0])
    assert (stored.state, stored.number, stored.blob) == (RevisionState.DELETED, 2, BlobRef(digest_of("b"), 1))
    assert (await lab.collect()).num_blobs_condemned == 1
    assert await lab.check_revisions_have_blobs() == 1
    assert (await publish(lab, "c")).number == 3
