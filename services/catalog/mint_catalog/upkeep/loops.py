"""What a catalog does by itself: the tick, taking back lost claims, compaction.

Several catalogs over one etcd may all do it: every write is a compare-and-set that only one of them wins.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from mint_catalog.model.keys import Keys
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.store import Compare, Field, Put, Store, prefix_end
from mint_catalog.storage.watch import Hub
from mint_catalog.work.queue import RunQueue
from mint_core.clock import monotonic_s, wall_s
from mint_core.errors import MintError, ResourceExhausted, RevisionCompacted, Unavailable
from mint_core.log import get_logger

__all__ = ["compact_history", "follow", "keep_reaping", "keep_ticking"]

_logger = get_logger(__name__)
_COMPACTION_INTERVAL_S: Final = 60.0


async def keep_ticking(store: Store, keys: Keys, hub: Hub, interval_s: float) -> None:
    """Write the tick key once an interval, unless another catalog has done so."""
    last = 0
    while True:
        if hub.tick_revision > last > 0:
            last = hub.tick_revision
        else:
            with contextlib.suppress(Unavailable, ResourceExhausted):
                known = (await store.get([keys.tick])).values[0]
                compare = Compare(keys.tick, Field.MOD, known.mod_revision if known else 0)
                result = await store.txn([compare], [Put(keys.tick, str(int(wall_s())).encode())])
                last = result.revision
        await asyncio.sleep(interval_s)


async def keep_reaping(queue: RunQueue, signal: Signal, interval_s: float) -> None:
    """Take back claims whose lease is gone: when a lease's key goes, and every ``interval_s`` in any case."""
    while True:
        seen = signal.count
        try:
            if await queue.reap():
                signal.notify()
        except Unavailable:
            pass
        except MintError as error:
            _logger.warning("reaping failed", extra={"fields": {"reason": error.reason, "error": error.message}})
        await signal.wait(seen, timeout_s=interval_s)


async def follow(hub: Hub, keys: Keys, families: tuple[str, ...], notify: Callable[[], None]) -> None:
    """Call ``notify`` whenever something in one of the families changes."""

    async def one(family: str) -> None:
        prefix = keys.family(family)
        while not hub.closed:
            with contextlib.suppress(RevisionCompacted, Unavailable):
                feed = hub.subscribe(prefix, prefix_end(prefix), after=None)
                async with contextlib.aclosing(feed):
                    async for revision in feed:
                        if revision.changes:
                            notify()
            notify()

    async with asyncio.TaskGroup() as group:
        for family in families:
            group.create_task(one(family))


async def compact_history(
    store: Store,
    hub: Hub,
    keep_s: float,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    *,
    held: Callable[[], Awaitable[int | None]] | None = None,
) -> None:
    """Compact what is older than ``keep_s``. A fresh catalog knows no times and waits that long.

    ``held`` tells the oldest revision that somebody still reads at, from which on everything stays.
    """
    marks: deque[tuple[float, int]] = deque()
    while True:
        await sleep(min(_COMPACTION_INTERVAL_S, keep_s))
        time = monotonic_s()
        marks.append((time, hub.position))
        revision = 0
        while marks and marks[0][0] <= time - keep_s:
            revision = marks.popleft()[1]
        if revision:
            with contextlib.suppress(Unavailable):
                kept = await held() if held is not None else None
                await store.compact(revision if kept is None else min(revision, kept))
