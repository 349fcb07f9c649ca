"""Following alias moves and publications: to the nodes that serve the policy, and to no others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import MintError, NotFound, Unavailable
from mint_core.names import AliasName, PolicyName, RevisionName
from mint_loader.model import AdapterRef, Tier
from mint_loader.pin_store import PinStore
from mint_loader.pins import Pins
from mint_loader.prefetch import AliasMove, Prefetcher, Publication, Target
from mint_loader.served import ServedPolicies
from mint_loader.tickets import Tickets
from support.loader_room import RoomNode, room_node, until


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RoomNode]:
    async with room_node(tmp_path) as each:
        yield each


class FakeCatalog:
    """Events come out of queues; an error ends the watch."""

    def __init__(self) -> None:
        self.moves: asyncio.Queue[AliasMove | MintError] = asyncio.Queue()
        self.publications: asyncio.Queue[Publication | MintError] = asyncio.Queue()
        self.refs: dict[RevisionName, AdapterRef] = {}
        self.pointed: dict[AliasName, tuple[AdapterRef, ...]] = {}
        self.starts: list[int] = []

    async def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        self.starts.append(after)
        while True:
            move = await self.moves.get()
            if isinstance(move, MintError):
                raise move
            yield move

    async def watch_publications(self, *, after: int) -> AsyncIterator[Publication]:
        while True:
            publication = await self.publications.get()
            if isinstance(publication, MintError):
                raise publication
            yield publication

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        return self.refs[revision]

    async def targets(self, alias: AliasName) -> tuple[AdapterRef, ...]:
        if alias not in self.pointed:
            raise NotFound(f"{alias} does not exist")
        return self.pointed[alias]


@contextlib.asynccontextmanager
async def following(node: RoomNode, catalog: FakeCatalog) -> AsyncIterator[tuple[Prefetcher, ServedPolicies, Pins]]:
    tickets = Tickets(node.loading)
    served = ServedPolicies(node.cache)
    store = PinStore(node.cache.folder / ".pins.json")
    pins = Pins(store, catalog, node.engine, node.cache, tickets, max_bytes=5000, poll_s=0.01)
    prefetcher = Prefetcher(catalog, node.engine, node.cache, tickets, served, pins)
    running = asyncio.ensure_future(prefetcher.run())
    try:
        yield prefetcher, served, pins
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await tickets.close()


async def test_an_alias_that_moves_is_followed_where_its_policy_was_served_and_nowhere_else(node: RoomNode) -> None:
    catalog = FakeCatalog()
    olds = [await node.adapter(data) for data in (b"hot on disk", b"resident only", b"never here")]
    news = [await node.adapter(data) for data in (b"new 1", b"new 2", b"new 3")]
    await node.ensure(olds[0], Tier.DISK)
    node.engine.digests.add(olds[1].digest)
    async with following(node, catalog) as (prefetcher, served, _):
        catalog.moves.put_nowait(Unavailable("catalog restarts"))
        for number, (old, new) in enumerate(zip(olds, news, strict=True)):
            name = AliasName("acme", f"policy-{number}", "live")
            catalog.refs[RevisionName("acme", f"policy-{number}", 2)] = new
            target, before = Target(2, new.digest), Target(1, old.digest)
            catalog.moves.put_nowait(AliasMove(10 + number, name, (target,), (target, before)))
        await until(lambda: news[1].digest in node.cache and news[0].digest in node.cache)
        await asyncio.sleep(0.05)
        assert news[2].digest not in node.cache
        assert prefetcher.num_prefetched == 2
        assert catalog.starts == [0, 0]
        assert served.is_recent(PolicyName("acme", "policy-0"))  # what is followed once counts as served


async def test_a_publication_is_followed_where_its_policy_was_served_is_resident_or_is_pinned(node: RoomNode) -> None:
    catalog = FakeCatalog()
    names = ("served", "hot", "pinned", "strange")
    refs = {name: await node.adapter(name.encode()) for name in names}
    hot = await node.adapter(b"hot before")
    pinned = AliasName("acme", "pinned", "live")
    catalog.pointed[pinned] = (hot,)
    async with following(node, catalog) as (prefetcher, served, pins):
        served.note(PolicyName("acme", "served"), "sha256:" + "0" * 64)
        served.note(PolicyName("acme", "hot"), hot.digest)
        served._served[PolicyName("acme", "hot")] = (-1e9, hot.digest)  # asked for long ago, in the engine ever since
        node.engine.digests.add(hot.digest)
        await pins.pin(pinned, Tier.DISK, start_s=4e9, end_s=None)
        catalog.publications.put_nowait(Publication(7))
        for number, name in enumerate(names):
            catalog.publications.put_nowait(Publication(8 + number, RevisionName("acme", name, 2), refs[name]))
        await until(lambda: all(refs[name].digest in node.cache for name in names[:3]))
        await asyncio.sleep(0.05)
        assert refs["strange"].digest not in node.cache
        assert prefetcher.num_prefetched == 3


def test_served_policies_are_bounded_and_forgotten_in_time(node: RoomNode) -> None:
    served = ServedPolicies(node.cache, recent_s=0.0, max_policies=2)
    for name in ("a", "b", "c"):
        served.note(PolicyName("acme", name), "sha256:" + "0" * 64)
    assert served.latest_digest(PolicyName("acme", "a")) is None
    assert served.latest_digest(PolicyName("acme", "c")) == "sha256:" + "0" * 64
    assert not served.is_recent(PolicyName("acme", "a"))
