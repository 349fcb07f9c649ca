"""Who may move bytes now: a bound over all transfers of one client, shared so that none is shut out by another."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

__all__ = ["TransferSlots"]


class TransferSlots:
    """At most ``num_slots`` requests that carry bytes at one time.

    The next slot goes to the transfer that holds fewest. A quarter of them goes only to transfers that hold none yet:
    a transfer that takes all it can get and then stands still leaves the others their turn.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._num_spare = num_slots // 4
        self._held: Counter[object] = Counter()
        self._waiting: dict[object, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def slot(self, transfer: object) -> AsyncIterator[None]:
        """Hold a slot inside the block."""
        await self.acquire(transfer)
        try:
            yield
        finally:
            self.release(transfer)

    async def acquire(self, transfer: object) -> None:
        """Wait for a slot; ``transfer`` is any object that stands for it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(transfer, deque()).append(turn)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted and cancelled in the same moment
                self.release(transfer)
            else:
                self._leave(transfer, turn)
            raise

    def release(self, transfer: object) -> None:
        """Give a slot back."""
        self._held[transfer] -= 1
        if not self._held[transfer]:
            del self._held[transfer]
        self._num_free += 1
        self._grant()

    def _grant(self) -> None:
        while self._num_free and self._waiting:
            transfer = min(self._waiting, key=lambda each: self._held[each])
            if self._held[transfer] and self._num_free <= self._num_spare:
                return
            turn = self._waiting[transfer][0]
            self._leave(transfer, turn)
            if turn.cancelled():
                continue
            self._num_free -= 1
            self._held[transfer] += 1
            turn.set_result(None)

    def _leave(self, transfer: object, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(transfer, deque())
        if turn in queue:
            queue.remove(turn)
        if not queue:
            self._waiting.pop(transfer, None)
