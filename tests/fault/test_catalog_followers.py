"""Somebody keeps a copy of all aliases by list and watch while etcd dies and history is compacted under the watch."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest

from mint_api.v1 import alias_service_pb2, common_pb2
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.store import Put
from mint_core import errors
from support.catalog_rig import Rig, running_catalog
from support.etcd import EtcdServer, running_etcd

NUM_MOVES = 500
NUM_ALIASES = 20


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd("--heartbeat-interval=100", "--election-timeout=500", in_memory=True) as server:
        yield server


class Follower:
    """Lists, then watches; lists again when it is told that history is gone, and only then."""

    def __init__(self, rig: Rig, policy: str, seed: int, *, revision: int = 0) -> None:
        self._rig = rig
        self._policy = policy
        self._rng = random.Random(seed)
        self.aliases: dict[str, int] = {}
        self.revision = self.listed_at = revision
        self.seen: list[int] = []
        """Revisions of events since the last listing."""
        self.num_lists = 0
        self.num_resumes = 0

    async def run(self) -> None:
        while True:
            try:
                if not self.revision:
                    await self._list()
                await self._watch()
            except errors.RevisionCompacted:
                self.revision = 0
            except errors.Unavailable:
                self.num_resumes += 1
                await asyncio.sleep(0.05)

    async def _list(self) -> None:
        request = alias_service_pb2.ListAliasesRequest(parent=self._policy)
        listed = await self._rig.call(self._rig.aliases.ListAliases, request)
        self.aliases = {alias.name: alias.active.revision_number for alias in listed.aliases}
        self.revision = self.listed_at = listed.catalog_revision
        self.seen = []
        self.num_lists += 1

    async def _watch(self) -> None:
        request = alias_service_pb2.WatchAliasesRequest(parent=self._policy, start_after_catalog_revision=self.revision)
        stream = self._rig.stream(self._rig.aliases.WatchAliases, request)
        async with contextlib.aclosing(stream):
            async for event in stream:
                assert event.catalog_revision >= self.revision, "never back"
                self.revision = event.catalog_revision
                if event.type == common_pb2.WATCH_EVENT_TYPE_PUT:
                    self.aliases[event.alias.name] = event.alias.active.revision_number
                    self.seen.append(event.catalog_revision)
                if self._rng.random() < 0.01:  # a connection that breaks, and a reader that is slow
                    await asyncio.sleep(self._rng.random() * 1.5)
                    return


async def _compact(etcd: EtcdServer) -> None:
    """At the very head, and at once: whoever was away has missed something."""
    async with EtcdStore(etcd.settings()) as store:
        head = (await store.txn([], [Put(b"/elsewhere", b"")])).revision
        await store.compact(head)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_copy_is_right_through_kills_and_compactions(etcd: EtcdServer, seed: int) -> None:
    rng = random.Random(seed)
    faults = dict(
        zip(
            rng.sample(range(50, NUM_MOVES - 50), 8),
            ["kill", "compact", "kill and compact", "compact"] * 2,
            strict=True,
        )
    )
    settings = etcd.settings(call_timeout_s=1.0)
    async with running_catalog(etcd, etcd=settings, watch_queue_events=100) as rig:
        policy = await rig.policy()
        for text in ("one", "two", "three"):
            await rig.revision(policy, text)
        followers = [Follower(rig, policy, each) for each in range(4)]
        tasks = [asyncio.create_task(follower.run()) for follower in followers]
        moves: list[int] = []
        for number in range(NUM_MOVES):
            with contextlib.suppress(errors.Unavailable):
                alias = f"a{rng.randrange(NUM_ALIASES)}"
                answer = await rig.promote(policy, rng.randint(1, 3), alias=alias)
                if answer.alias.etag == str(answer.catalog_revision):  # else it pointed there already
                    moves.append(answer.catalog_revision)
            fault = faults.get(number, "")
            if "kill" in fault:
                etcd.kill()
                await asyncio.to_thread(etcd.start)
            if "compact" in fault:
                await _compact(etcd)
        assert len(moves) > NUM_MOVES / 3
        followers.append(Follower(rig, policy, 4, revision=moves[0]))
        tasks.append(asyncio.create_task(followers[-1].run()))
        listed = await rig.call(rig.aliases.ListAliases, alias_service_pb2.ListAliasesRequest(parent=policy))
        async with asyncio.timeout(20):
            while any(follower.revision < listed.catalog_revision for follower in followers):
                assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
                await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    expected = {alias.name: alias.active.revision_number for alias in listed.aliases}
    for follower in followers:
        assert follower.aliases == expected
        assert follower.seen == sorted(set(follower.seen)), "each event once and in order"
        assert {move for move in moves if move > follower.listed_at} <= set(follower.seen), "no event is lost"
    assert followers[-1].num_lists > 0, "what it wanted to start from was gone"
