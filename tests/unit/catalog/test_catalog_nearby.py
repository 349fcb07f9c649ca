"""Reads from one member: taken only where its own revision proves them fresh enough."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from unit.catalog.memory_store import MemoryStore

from mint_catalog.storage.gather import GatheredReads
from mint_catalog.storage.nearby import NearbyReads
from mint_catalog.storage.store import Put, ReadResult
from mint_core.errors import Unavailable

KEY = b"/mint/v1/aliases/a"
OTHER = b"/mint/v1/aliases/b"
STALENESS_S = 5.0


class Lagging(MemoryStore):
    """A store with one member that stands still at ``member_at``."""

    def __init__(self) -> None:
        super().__init__()
        self.member_at = 0
        self.takes_s = 0.0
        self.is_away = False
        self.seen = 0
        self.num_nearby = 0
        self.now_s = 100.0

    @property
    def seen_revision(self) -> int:
        return self.seen

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        result = await super().get(keys, revision=revision)
        self.seen = max(self.seen, result.revision)
        return result

    async def get_nearby(self, keys: Sequence[bytes]) -> ReadResult:
        self.num_nearby += 1
        await asyncio.sleep(0)
        self.now_s += self.takes_s
        if self.is_away:
            raise Unavailable("etcd did not answer a read; retry")
        self.seen = max(self.seen, self.member_at)
        return ReadResult(tuple(self._at(key, self.member_at) for key in keys), self.member_at)


class Told:
    position = 0
    told_until_s = 100.0


class TestNearby:
    async def _start(self) -> None:
        self.store, self.told = Lagging(), Told()
        self.nearby = NearbyReads(self.store, self.told, staleness_s=STALENESS_S, now_s=lambda: self.store.now_s)
        self.reads = GatheredReads(self.store, self.nearby)
        await self.put(b"old")
        self.told.position = self.store.member_at = self.store.revision

    async def put(self, value: bytes) -> None:
        await self.store.txn([], [Put(KEY, value)])

    async def read(self, *keys: bytes, bounded_from: int | None = 0) -> list[bytes | None]:
        result = await self.reads.get(keys or (KEY,), bounded_from=bounded_from)
        return [kv.value if kv else None for kv in result.values]

    async def test_a_member_answers_as_long_as_it_is_where_the_hub_is(self) -> None:
        await self._start()
        await self.put(b"new")  # by another catalog, and the hub was not told yet
        assert await self.read() == [b"old"]
        self.told.position = self.store.revision
        assert await self.read() == [b"new"]
        assert self.store.num_nearby == 2

    async def test_what_is_wanted_from_the_head_is_read_there(self) -> None:
        await self._start()
        await self.put(b"new")
        assert await self.read(bounded_from=None) == [b"new"]
        assert self.store.num_nearby == 0

    async def test_a_member_behind_the_revision_asked_for_is_not_believed(self) -> None:
        await self._start()
        await self.put(b"new")
        assert await self.read(bounded_from=self.store.revision) == [b"new"]

    async def test_who_was_told_of_a_revision_is_not_taken_back_behind_it(self) -> None:
        await self._start()
        await self.put(b"new")
        assert await self.read(bounded_from=None) == [b"new"]
        assert await self.read() == [b"new"]
        assert self.store.num_nearby == 1

    async def test_without_a_hub_that_is_told_lately_the_head_is_read(self) -> None:
        await self._start()
        await self.put(b"new")
        self.store.now_s += STALENESS_S + 0.1
        assert await self.read() == [b"new"]
        self.store.now_s, self.told.position = 100.0, 0
        assert await self.read() == [b"new"]
        assert self.store.num_nearby == 0

    async def test_an_answer_that_became_too_old_on_its_way_is_not_taken(self) -> None:
        await self._start()
        await self.put(b"new")
        self.store.takes_s = STALENESS_S + 0.1
        assert await self.read() == [b"new"]
        assert self.store.num_nearby == 1

    async def test_a_key_that_a_member_does_not_know_is_asked_for_again(self) -> None:
        await self._start()
        await self.store.txn([], [Put(OTHER, b"made")])
        assert await self.read(OTHER) == [b"made"]
        assert await self.read(KEY, OTHER) == [b"old", b"made"]

    @pytest.mark.parametrize("is_away", [False, True])
    async def test_a_member_that_fails_is_left_alone_for_a_second(self, is_away: bool) -> None:
        await self._start()
        await self.put(b"new")
        self.told.position, self.store.is_away = self.store.revision, is_away
        for _ in range(3):
            assert await self.read() == [b"new"]
        assert self.store.num_nearby == 1
        self.store.now_s += 1.1
        self.store.is_away, self.store.member_at = False, self.store.revision
        assert await self.read() == [b"new"]
        assert self.store.num_nearby == 2
