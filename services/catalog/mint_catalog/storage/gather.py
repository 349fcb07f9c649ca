"""Reads that are wanted at the same time share transactions: each costs etcd and this process about as much as one.

A read goes out at once while few are under way. Beyond that, reads wait until one of those has ended and then go
together, at most 128 keys in a transaction; the same keys wanted twice are read once. No read joins one that was under
way before it was asked for, so each sees whatever was written before it was asked for.

A read that need not be of the store's head, and goes out at once, asks one member first (``nearby``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from mint_catalog.storage.nearby import NearbyReads
from mint_catalog.storage.store import ReadResult, Store
from mint_core import calls
from mint_core.errors import MintError

__all__ = ["GatheredReads"]

_MAX_KEYS: Final = 128
_MAX_DIRECT: Final = 2
_MAX_WAIT_S: Final = 0.02
"""A read that hangs, at a member of etcd that went silent, must not hold up the others."""

_Group: TypeAlias = tuple[bytes, ...]
_Answer: TypeAlias = ReadResult | MintError


class GatheredReads:
    """Reads groups of keys from the store's head; one group's values are of one revision."""

    def __init__(self, store: Store, nearby: NearbyReads | None = None) -> None:
        self._store = store
        self._nearby = nearby
        self._num_direct = 0
        self._waiting: dict[_Group, asyncio.Future[_Answer]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, keys: Sequence[bytes], *, bounded_from: int | None = None) -> ReadResult:
        """Values of at most 128 keys. Raises ``Unavailable``.

        With ``bounded_from`` they may be as old as ``nearby`` lets them be, but not older than this revision.
        """
        if self._num_direct >= _MAX_DIRECT:
            return await self._join(tuple(keys))
        self._num_direct += 1
        try:
            if bounded_from is not None and self._nearby is not None:
                known = await self._nearby.get(keys, bounded_from)
                if known is not None:
                    return known
            return await self._store.get(keys)
        finally:
            self._num_direct -= 1
            self._flush()

    async def get_each(self, groups: Sequence[Sequence[bytes]]) -> list[_Answer]:
        """The values of each group, or why they could not be read."""
        chunks = _chunks(dict.fromkeys(map(tuple, groups)))
        read = await asyncio.gather(*map(self._read, chunks))
        answers: dict[_Group, _Answer] = {}
        for chunk, each in zip(chunks, read, strict=True):
            answers.update(zip(chunk, each, strict=True))
        return [answers[tuple(group)] for group in groups]

    async def _join(self, group: _Group) -> ReadResult:
        loop = asyncio.get_running_loop()
        future = self._waiting.get(group)
        if future is None:
            future = self._waiting[group] = loop.create_future()
            if self._timer is None:
                self._timer = loop.call_later(_MAX_WAIT_S, self._flush)
        answer = await asyncio.shield(future)  # others may wait for the same
        if isinstance(answer, MintError):
            raise answer.with_traceback(None)  # one object for all: its traceback must not grow with each of them
        return answer

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        # What many wait for ends by the store's own deadline, not by that of the caller who happened to be first.
        with calls.inbound_call(calls.principal(), None):
            for chunk in _chunks(waiting):
                task = asyncio.create_task(self._answer({group: waiting[group] for group in chunk}))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, waiting: dict[_Group, asyncio.Future[_Answer]]) -> None:
        try:
            answers = await self._read(list(waiting))
        except Exception as error:  # noqa: BLE001 - a bug must reach those who wait, and nobody awaits this task
            for future in waiting.values():
                future.set_exception(error)
            return
        for future, answer in zip(waiting.values(), answers, strict=True):
            future.set_result(answer)

    async def _read(self, groups: Sequence[_Group]) -> Sequence[_Answer]:
        try:
            result = await self._store.get([key for group in groups for key in group])
        except MintError as error:
            return [error] * len(groups)
        values = iter(result.values)
        return [ReadResult(tuple(next(values) for _ in group), result.revision) for group in groups]


def _chunks(groups: Iterable[_Group]) -> list[list[_Group]]:
    chunks: list[list[_Group]] = []
    num_keys = 0
    for group in groups:
        if not chunks or num_keys + len(group) > _MAX_KEYS:
            chunks.append([])
            num_keys = 0
        chunks[-1].append(group)
        num_keys += len(group)
    return chunks
