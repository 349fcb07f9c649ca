"""A store whose user is killed at a chosen transaction: what a crash leaves behind, without a process to crash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unit.catalog.memory_store import MemoryStore

from mint_catalog.storage.store import Compare, Operation, TxnResult

__all__ = ["Killed", "MortalStore"]


class Killed(BaseException):
    """The process is gone: no handler of errors may catch it."""


class MortalStore:
    """Passes everything on; after the fatal transaction nothing is written until ``revive``."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._left = -1
        self._applied = False
        self._dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def kill_at(self, number: int, *, applied: bool) -> None:
        """Kill at the ``number``-th transaction from now, before or after it is ``applied``."""
        self._left, self._applied = number, applied

    def revive(self) -> None:
        self._left, self._dead = -1, False

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        if self._dead:
            raise Killed
        self._left -= 1
        if self._left:
            return await self.store.txn(compares, operations)
        self._dead = True
        if self._applied:
            await self.store.txn(compares, operations)
        raise Killed
