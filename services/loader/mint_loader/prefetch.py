"""Following moved aliases: what a policy served on this node will be asked for next is brought to the disk at once.

Prefetching is a favour. Whatever goes wrong here costs a colder first request and nothing else: a catalog that is
away, a history that was compacted, events that come faster than they can be looked at (the oldest are dropped then).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from mint_core import clock, log
from mint_core.errors import MintError, RevisionCompacted
from mint_core.names import AliasName, RevisionName
from mint_loader.cache import DiskCache
from mint_loader.model import AdapterRef, Engine, Tier
from mint_loader.tickets import Tickets

__all__ = ["AliasMove", "Catalog", "Prefetcher", "Target"]

_log = log.get_logger(__name__)
_MAX_WAITING = 1024
_MAX_PAUSE_S = 10.0
_RESIDENT_FOR_S = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """A revision an alias points at."""

    number: int
    digest: str


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias as it is now, or (without ``name``) only word that nothing happened up to ``catalog_revision``."""

    catalog_revision: int
    name: AliasName | None = None
    targets: tuple[Target, ...] = ()
    """What it can answer with from now on: the active revision and the canary's."""
    history: tuple[Target, ...] = ()
    """What it pointed at before."""


class Catalog(Protocol):
    """The catalog, as far as prefetching needs it."""

    def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        """Moves of all aliases after a catalog revision; 0 means from now. Raises :class:`RevisionCompacted`."""
        ...

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        """Where the adapter of a revision lies."""
        ...


class Prefetcher:
    """Watches aliases and submits tickets to the disk tier for policies that this node served within ``recent_s``."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        cache: DiskCache,
        tickets: Tickets,
        *,
        recent_s: float = 3600.0,
        priority: int = 0,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._cache = cache
        self._tickets = tickets
        self._recent_s = recent_s
        self._priority = priority
        self._waiting: OrderedDict[AliasName, AliasMove] = OrderedDict()
        self._arrived = asyncio.Event()
        self._resident: frozenset[str] = frozenset()
        self._resident_at_s = float("-inf")
        self.num_prefetched = 0

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._work())

    async def _watch(self) -> None:
        after = 0
        pause_s = 0.5
        while True:
            try:
                async for move in self._catalog.watch_aliases(after=after):
                    after = max(after, move.catalog_revision)
                    pause_s = 0.5
                    if move.name is not None and move.targets:
                        self._take(move.name, move)
            except RevisionCompacted:
                after = 0
            except MintError as error:
                _log.info("alias watch ended, trying again", extra={"fields": {"error": error.message}})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _take(self, name: AliasName, move: AliasMove) -> None:
        self._waiting.pop(name, None)
        self._waiting[name] = move
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popitem(last=False)
        self._arrived.set()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                name, move = self._waiting.popitem(last=False)
                try:
                    await self._follow(name, move)
                except MintError as error:
                    fields = {"alias": str(name), "error": error.message}
                    _log.info("prefetch given up", extra={"fields": fields})

    async def _follow(self, name: AliasName, move: AliasMove) -> None:
        if not await self._was_served_here(move):
            return
        for target in move.targets:
            if target.digest in self._cache:
                continue
            ref = await self._catalog.adapter(RevisionName(name.tenant, name.policy, target.number))
            if (
                ref.digest != target.digest
            ):  # revision numbers never change their digest: somebody is confused, keep out of it
                _log.error(
                    "alias and revision disagree", extra={"fields": {"alias": str(name), "digest": target.digest}}
                )
                continue
            self._tickets.submit([ref], Tier.DISK, priority=self._priority)
            self.num_prefetched += 1

    async def _was_served_here(self, move: AliasMove) -> bool:
        known = {target.digest for target in (*move.history, *move.targets)}
        if any(self._cache.used_within(digest, self._recent_s) for digest in known):
            return True
        # What is served hot for hours was loaded once, long ago, and may have left the disk since.
        if clock.monotonic_s() - self._resident_at_s > _RESIDENT_FOR_S:
            with contextlib.suppress(MintError):
                self._resident = (await self._engine.resident(timeout_s=2.0)).digests
            self._resident_at_s = clock.monotonic_s()
        return not known.isdisjoint(self._resident)
