"""Reads that one member of the store answers by itself, where its own revision proves the answer fresh enough.

A linearizable read of etcd asks the leader where the head is, and the leader asks a majority whether it still leads:
two round trips that a read which may be some seconds old can do without. What one member knows may lie any time back,
so each answer is checked:

- A member's answer is whole as of the revision R that it names, which is that of the state it was read from.
- The hub knows a revision P (``position``) and an instant T (``told_until_s``): whatever was written before T lies at
  or below P. It learns T by linearizable reads alone, so a member that was cut off cannot move it.
- Both are taken before the read. When R >= P the answer holds everything that was written before T, so it is no
  staler than now - T, and that is looked at when the answer is here. A member that lags behind P is found out by its R.
- R must not be below any revision that this process was told before the read either. So whoever wrote by this catalog
  reads it back, and no read by it goes back behind an earlier one.
- A key that a member does not know is asked for again: who was told of a record must not hear that there is none.

What fails a check is read again from the store's head, by the caller; then the members are left alone for a while, so
that one that lags costs no more than a second read now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from mint_catalog.storage.store import ReadResult, Store
from mint_core import clock
from mint_core.errors import Unavailable

__all__ = ["NearbyReads", "Told"]

_PAUSE_S: Final = 1.0


class Told(Protocol):
    """How far the watch has told what happened."""

    @property
    def position(self) -> int:
        """Every change up to this revision was told; 0 while nothing is."""
        ...

    @property
    def told_until_s(self) -> float:
        """Everything written before this instant of the boot-time clock was told."""
        ...


class NearbyReads:
    """Reads that are no staler than ``staleness_s``, from one member."""

    def __init__(
        self, store: Store, told: Told, *, staleness_s: float, now_s: Callable[[], float] = clock.boottime_s
    ) -> None:
        self._store = store
        self._told = told
        self._staleness_s = staleness_s
        self._now_s = now_s
        self._paused_until_s = float("-inf")

    async def get(self, keys: Sequence[bytes], min_revision: int = 0) -> ReadResult | None:
        """Values of keys that are all there, at ``min_revision`` or later; None where the head has to be read."""
        position, told_until_s = self._told.position, self._told.told_until_s
        now_s = self._now_s()
        if position == 0 or now_s < self._paused_until_s or now_s - told_until_s > self._staleness_s:
            return None
        at_least = max(position, self._store.seen_revision, min_revision)
        try:
            result = await self._store.get_nearby(keys)
        except Unavailable:
            result = None
        now_s = self._now_s()
        if result is None or result.revision < at_least or now_s - told_until_s > self._staleness_s:
            self._paused_until_s = now_s + _PAUSE_S
            return None
        return None if None in result.values else result
