"""Transactions decided on what is known from before: never another outcome than after a read, only a read less."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from unit.catalog.catalog_lab import POLICY, Lab
from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.audit_codec import AuditCodec
from mint_catalog.model.records import PolicyState
from mint_catalog.serving.aliases import Aliases
from mint_catalog.storage.recent import FAMILIES, Recent
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Change, KeyValue, prefix_end
from mint_core.errors import EtagMismatch, MintError, NotFound, WrongState
from mint_core.names import AliasName, RevisionName

LIVE = AliasName("acme", "tone", "live")


def kv(key: bytes, revision: int, value: bytes = b"v", lease: int = 0) -> KeyValue:
    return KeyValue(key, value, 1, revision, lease)


class TestRules:
    def setup_method(self) -> None:
        self.recent = Recent(max_records=2)

    def note(self, *values: KeyValue) -> None:
        self.recent.note([(each.key, each) for each in values], max(each.mod_revision for each in values))

    def test_all_or_nothing(self) -> None:
        self.note(kv(b"a", 3))
        assert self.recent.recall([b"a"]) == [kv(b"a", 3)]
        assert self.recent.recall([b"a", b"b"]) is None

    def test_what_is_older_replaces_nothing(self) -> None:
        self.note(kv(b"a", 5))
        self.note(kv(b"a", 4, b"old"))
        self.recent.hear([Change(b"a", b"old", 1, 4)])
        self.recent.note([(b"a", None)], 4)  # absent before it was made
        assert self.recent.recall([b"a"]) == [kv(b"a", 5)]

    def test_what_is_newer_replaces(self) -> None:
        self.note(kv(b"a", 5))
        self.recent.hear([Change(b"a", b"new", 1, 6)])
        assert self.recent.recall([b"a"]) == [kv(b"a", 6, b"new")]
        self.note(kv(b"a", 7))
        assert self.recent.recall([b"a"]) == [kv(b"a", 7)]

    def test_what_went_away_is_not_known(self) -> None:
        self.note(kv(b"a", 5), kv(b"b", 5))
        self.recent.hear([Change(b"a", b"", 0, 6, deleted=True)])
        self.recent.note([(b"b", None)], 6)
        assert len(self.recent) == 0

    def test_the_longest_unused_leaves(self) -> None:
        self.note(kv(b"a", 3), kv(b"b", 3))
        self.recent.recall([b"a"])
        self.note(kv(b"c", 4))
        assert self.recent.recall([b"b"]) is None
        assert self.recent.recall([b"a", b"c"]) is not None

    def test_what_is_large_or_ends_by_itself_is_not_kept(self) -> None:
        self.note(kv(b"a", 3))
        self.note(kv(b"a", 4, bytes(100_000)), kv(b"b", 4, lease=7))
        assert len(self.recent) == 0

    def test_a_hub_that_lost_its_place(self) -> None:
        self.note(kv(b"a", 3))
        self.recent.lost()
        assert len(self.recent) == 0

    def test_none_are_kept(self) -> None:
        recent = Recent(max_records=0)
        recent.note([(b"a", kv(b"a", 3))], 3)
        recent.hear([Change(b"a", b"v", 1, 3)])
        assert len(recent) == 0


class Counted(MemoryStore):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_gets = 0

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> Any:
        self.num_gets += 1
        return await super().get(keys, revision=revision)


async def _lab(num_revisions: int = 3) -> tuple[Lab, Counted, Aliases]:
    """A lab whose aliases know everything, and the aliases of another catalog, which it never hears of."""
    store = Counted()
    lab = Lab(store)
    await lab.policy()
    for number in range(1, num_revisions + 1):
        await lab.publish(f"bytes {number}")
    for number in (*range(1, num_revisions + 1), 1):
        await lab.promote(number)
    store.num_gets = store.num_tried_txns = 0
    return lab, store, Aliases(lab.store, lab.tables)


def _request() -> Request | None:
    return Request.of(tenant="acme", principal="ada", method="Promote", request_id=str(uuid.uuid4()), payload=b"p")


async def _numbers(lab: Lab) -> list[int]:
    return [entry.target.revision_number for entry in (await lab.aliases.get(LIVE)).history if entry.target]


async def test_what_is_known_is_not_read() -> None:
    lab, store, _ = await _lab()
    for number in (2, 1, 3, 1):
        written = await lab.aliases.promote(lab.move(number), _request())
        assert written.record.mod_revision == written.catalog_revision
    assert (store.num_gets, store.num_tried_txns) == (0, 4)
    assert await lab.aliases.get(LIVE) == written.record


async def test_what_another_catalog_wrote_costs_one_refused_transaction() -> None:
    lab, store, others = await _lab()
    await others.promote(lab.move(2))
    store.num_gets = store.num_tried_txns = 0
    await lab.promote(3)
    assert (store.num_gets, store.num_tried_txns) == (1, 2)
    assert (await _numbers(lab))[:3] == [3, 2, 1]
    await lab.promote(1)  # what was read is known now
    assert store.num_tried_txns == 3


async def test_what_the_hub_tells_is_known() -> None:
    lab, store, others = await _lab()
    for family in FAMILIES:
        lab.hub.listen(family, lab.recent)
    running = asyncio.create_task(lab.hub.run())
    while lab.hub.position == 0:  # noqa: ASYNC110 - the hub tells only of revisions
        await asyncio.sleep(0)
    written = await others.promote(lab.move(2))
    while lab.hub.position < written.catalog_revision:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    store.num_gets = store.num_tried_txns = 0
    await lab.promote(3)
    assert (store.num_gets, store.num_tried_txns) == (0, 1)
    running.cancel()
    await asyncio.wait([running])


async def test_nothing_to_write_is_not_believed() -> None:
    lab, _, others = await _lab()
    await others.promote(lab.move(2))
    await lab.promote(1)  # as far as it knows, the alias points there
    assert (await _numbers(lab))[:3] == [1, 2, 1]


async def test_an_error_is_not_believed() -> None:
    lab, _, others = await _lab()
    moved = (await others.promote(lab.move(2))).record
    await lab.promote(3, etag=str(moved.mod_revision))  # as far as it knows, the etag is another one
    with pytest.raises(EtagMismatch):
        await lab.promote(1, etag=str(moved.mod_revision))


async def _retire(lab: Lab) -> None:
    await lab.revisions.retire(RevisionName("acme", "tone", 3))


async def _pause(lab: Lab) -> None:
    head = await lab.policies.get(POLICY)
    await lab.policies.update(POLICY, replace(head, state=PolicyState.PAUSED, mod_revision=0), {"state"})


async def _delete(lab: Lab) -> None:
    await lab.policies.delete(POLICY)


@pytest.mark.parametrize(("change", "error"), [(_retire, WrongState), (_pause, WrongState), (_delete, NotFound)])
async def test_what_forbids_a_move_is_seen(change: Callable[[Lab], Any], error: type[MintError]) -> None:
    lab, store, _ = await _lab()
    await change(lab)
    revision = store.revision
    with pytest.raises(error):
        await lab.promote(3)
    assert store.revision == revision, "nothing was written"


async def test_a_policy_made_anew_is_another_one() -> None:
    lab, _, _ = await _lab()
    await lab.policies.delete(POLICY)
    await lab.policy()
    await lab.publish("bytes 2")
    with pytest.raises(NotFound):
        await lab.promote(2)


async def test_a_request_id_applies_once() -> None:
    lab, store, others = await _lab()
    request = _request()
    first = await lab.aliases.promote(lab.move(2), request)
    await others.promote(lab.move(3))
    revision = store.revision
    assert await lab.aliases.promote(lab.move(2), request) == first
    assert store.revision == revision


async def test_the_trail_tells_what_was_there() -> None:
    """Three catalogs that know nothing of each other: each entry begins with what the one before it left."""
    lab, _, _ = await _lab()
    rng = random.Random(1)
    catalogs = [lab.aliases, *(Aliases(lab.store, lab.tables, recent=Recent(max_records=100)) for _ in range(2))]

    async def work(aliases: Aliases) -> None:
        for _ in range(30):
            await aliases.promote(lab.move(rng.randint(1, 3)))

    await asyncio.gather(*map(work, catalogs))
    codec, key = AuditCodec(lab.keys), lab.keys.alias(LIVE)
    prefix = lab.keys.family("audit", "acme")
    entries = (await lab.store.scan(prefix, prefix_end(prefix), limit=10_000)).values
    changes = [
        change
        for entry in sorted(map(codec.decode, entries), key=lambda entry: entry.catalog_revision)
        for change in entry.changes
        if change.key == key
    ]
    assert len(changes) > 30
    assert changes[0].before is None
    assert all(a.after == b.before for a, b in itertools.pairwise(changes))
    stored = (await lab.store.get([key])).values[0]
    assert stored is not None
    assert changes[-1].after == stored.value
