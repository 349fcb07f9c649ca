"""Following moved aliases and publications: what a policy of this node will be asked for next is brought to the disk at
once. A policy is of this node if it was served here lately, or if one of its aliases is pinned here or will be.

Prefetching is a favour. Whatever goes wrong here costs a colder first request and nothing else: a catalog that is
away, a history that was compacted, events that come faster than they can be looked at (the oldest are dropped then).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from mint_core import clock, log
from mint_core.errors import MintError, RevisionCompacted
from mint_core.names import AliasName, PolicyName, RevisionName
from mint_loader.cache import DiskCache
from mint_loader.model import AdapterRef, Engine, Tier
from mint_loader.pins import Pins
from mint_loader.served import ServedPolicies
from mint_loader.tickets import Tickets

__all__ = ["AliasMove", "Catalog", "Prefetcher", "Publication", "Target"]

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


@dataclass(frozen=True, slots=True)
class Publication:
    """A revision as it was published, or (without ``name``) only word that nothing was up to ``catalog_revision``."""

    catalog_revision: int
    name: RevisionName | None = None
    ref: AdapterRef | None = None


class Catalog(Protocol):
    """The catalog, as far as prefetching needs it."""

    def watch_aliases(self, *, after: int) -> AsyncIterator[AliasMove]:
        """Moves of all aliases after a catalog revision; 0 means from now. Raises :class:`RevisionCompacted`."""
        ...

    def watch_publications(self, *, after: int) -> AsyncIterator[Publication]:
        """Publications of all policies after a catalog revision; 0 means from now. Raises as the other watch."""
        ...

    async def adapter(self, revision: RevisionName) -> AdapterRef:
        """Where the adapter of a revision lies."""
        ...


class Prefetcher:
    """Watches the catalog and submits tickets to the disk tier."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        cache: DiskCache,
        tickets: Tickets,
        served: ServedPolicies,
        pins: Pins,
        *,
        recent_s: float = 3600.0,
        priority: int = 0,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._cache = cache
        self._tickets = tickets
        self._served = served
        self._pins = pins
        self._recent_s = recent_s
        self._priority = priority
        self._waiting: OrderedDict[AliasName | PolicyName, AliasMove | Publication] = OrderedDict()
        self._arrived = asyncio.Event()
        self._resident: frozenset[str] = frozenset()
        self._resident_at_s = float("-inf")
        self.num_prefetched = 0

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(self._catalog.watch_aliases))
            group.create_task(self._watch(self._catalog.watch_publications))
            group.create_task(self._work())

    async def _watch(self, watch: Callable[..., AsyncIterator[AliasMove] | AsyncIterator[Publication]]) -> None:
        after = 0
        pause_s = 0.5
        while True:
            try:
                async for event in watch(after=after):
                    after = max(after, event.catalog_revision)
                    pause_s = 0.5
                    if isinstance(event, AliasMove):
                        if event.name is not None:
                            self._pins.moved(event.name)
                            if event.targets:
                                self._take(event.name, event)
                    elif event.name is not None:
                        self._take(event.name.parent, event)
            except RevisionCompacted:
                after = 0
            except MintError as error:
                _log.info("watch ended, trying again", extra={"fields": {"error": error.message}})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _take(self, name: AliasName | PolicyName, event: AliasMove | Publication) -> None:
        self._waiting.pop(name, None)
        self._waiting[name] = event
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popitem(last=False)
        self._arrived.set()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                name, event = self._waiting.popitem(last=False)
                try:
                    if isinstance(event, AliasMove):
                        await self._follow(event)
                    else:
                        await self._follow_publication(event)
                except MintError as error:
                    fields = {"name": str(name), "error": error.message}
                    _log.info("prefetch given up", extra={"fields": fields})

    async def _follow(self, move: AliasMove) -> None:
        name = move.name
        assert name is not None
        # A pinned alias is followed by its pin.
        if not (self._served.is_recent(name.parent) or await self._was_served_here(move)):
            return
        for target in move.targets:
            self._served.note(name.parent, target.digest)
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
            self._fetch(ref)

    async def _follow_publication(self, publication: Publication) -> None:
        name, ref = publication.name, publication.ref
        assert name is not None
        assert ref is not None
        if ref.digest in self._cache:
            return
        policy = name.parent
        latest = self._served.latest_digest(policy)
        is_wanted = (
            self._pins.concerns(policy)
            or self._served.is_recent(policy)
            or (latest is not None and await self._is_resident({latest}))
        )
        if is_wanted:
            self._fetch(ref)

    def _fetch(self, ref: AdapterRef) -> None:
        self._tickets.submit([ref], Tier.DISK, priority=self._priority)
        self.num_prefetched += 1

    async def _was_served_here(self, move: AliasMove) -> bool:
        known = {target.digest for target in (*move.history, *move.targets)}
        if any(self._cache.used_within(digest, self._recent_s) for digest in known):
            return True
        return await self._is_resident(known)

    async def _is_resident(self, digests: set[str]) -> bool:
        # What is served hot for hours was loaded once, long ago, and may have left the disk since.
        if clock.monotonic_s() - self._resident_at_s > _RESIDENT_FOR_S:
            with contextlib.suppress(MintError):
                self._resident = (await self._engine.resident(timeout_s=2.0)).digests
            self._resident_at_s = clock.monotonic_s()
        return not digests.isdisjoint(self._resident)
