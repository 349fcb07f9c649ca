"""One node's loader as a whole: what its service asks, answered by the parts."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

from mint_core.errors import MintError
from mint_core.names import RevisionName
from mint_loader.cache import CacheStatus, DiskCache
from mint_loader.gate import FairGate
from mint_loader.loading import Loading, LoadingStatus
from mint_loader.model import AdapterRef, Engine, Loaded, Tier
from mint_loader.pins import Pins
from mint_loader.prefetch import Prefetcher
from mint_loader.served import ServedPolicies
from mint_loader.tickets import Tickets
from mint_loader.waits import TenantWaits

__all__ = ["Node", "NodeStatus", "TenantStatus", "TierStatus"]

_ENGINE_TIMEOUT_S = 2.0
_MAX_TENANTS = 1000


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier, and the way into it. Counts without another word are since the start."""

    tier: Tier
    num_adapters: int
    size_bytes: int
    max_bytes: int
    num_pinned: int
    num_hits: int
    num_misses: int
    num_running: int
    num_places: int
    num_queued: int
    mean_s: float


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """One tenant's work, now and since the start."""

    waits: TenantWaits
    num_queued: int
    num_running: int
    num_open_tickets: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """How the node stands."""

    cache: CacheStatus
    loading: LoadingStatus
    num_queued_tickets: int
    num_pins: int
    num_prefetched: int
    tiers: tuple[TierStatus, ...]
    tenants: tuple[TenantStatus, ...]


class Node:
    """The parts of one loader."""

    def __init__(
        self,
        loading: Loading,
        tickets: Tickets,
        pins: Pins,
        cache: DiskCache,
        engine: Engine,
        served: ServedPolicies,
        prefetcher: Prefetcher | None,
    ) -> None:
        """``prefetcher`` is None where no catalog is known."""
        self.tickets = tickets
        self.pins = pins
        self._loading = loading
        self._cache = cache
        self._engine = engine
        self._served = served
        self._prefetcher = prefetcher

    async def ensure(
        self, ref: AdapterRef, tier: Tier, *, revision: RevisionName | None, priority: int, timeout_s: float
    ) -> Loaded:
        """As :meth:`Loading.ensure`; remembers whose ``revision`` is served here."""
        loaded = await self._loading.ensure(ref, tier, priority=priority, timeout_s=timeout_s)
        if revision is not None and revision.tenant == ref.tenant:
            self._served.note(revision.parent, ref.digest)
        return loaded

    async def status(self) -> NodeStatus:
        """Everything; of the engine nothing if it does not answer."""
        cache, loading = self._cache.status, self._loading.status
        try:
            resident = await self._engine.resident(timeout_s=_ENGINE_TIMEOUT_S)
            num_resident, num_pinned = len(resident.digests), len(resident.pinned)
        except MintError:
            num_resident = num_pinned = 0
        return NodeStatus(
            cache,
            loading,
            self.tickets.num_queued,
            len(self.pins),
            0 if self._prefetcher is None else self._prefetcher.num_prefetched,
            (
                _tier(
                    Tier.DISK,
                    self._loading.fetch_gate,
                    self._loading.fetch_gate.num_queued,
                    (cache.num_entries, cache.used_bytes, cache.max_bytes, cache.num_kept),
                    (loading.num_hits, loading.num_misses),
                ),
                _tier(
                    Tier.HOST,
                    self._loading.load_gate,
                    self._loading.way_gate.num_queued + self._loading.load_gate.num_queued,
                    (num_resident, 0, 0, num_pinned),
                    (loading.num_resident, loading.num_loads),
                ),
            ),
            self._tenants(),
        )

    def _tenants(self) -> tuple[TenantStatus, ...]:
        num_queued: Counter[str] = Counter()
        num_running: Counter[str] = Counter()
        way, fetch, load = self._loading.way_gate, self._loading.fetch_gate, self._loading.load_gate
        for gate in (way, fetch, load):
            for each in gate.tenants():
                num_queued[each.tenant] += each.num_queued
                # Who is on the way is in one of the two others, waiting or inside.
                num_running[each.tenant] += 0 if gate is way else each.num_running
        waits = {each.tenant: each for each in self._loading.waits.tenants()}
        names = waits.keys() | self.tickets.tenants() | {*num_queued, *num_running}
        return tuple(
            TenantStatus(
                waits.get(name, TenantWaits(name, 0, 0, 0, 0.0, 0.0)),
                num_queued[name],
                num_running[name],
                self.tickets.num_open(name),
            )
            for name in heapq.nsmallest(_MAX_TENANTS, names)
        )


def _tier(
    tier: Tier, gate: FairGate, num_queued: int, holds: tuple[int, int, int, int], found: tuple[int, int]
) -> TierStatus:
    return TierStatus(tier, *holds, *found, gate.num_running, gate.num_places, num_queued, gate.mean_s)
