"""A gate with a bounded queue: so many flights inside at one time, the others wait for a fair turn.

Larger priority first. Inside one priority the tenants take turns by start-time fair queueing (Goyal, Vin & Cheng 1996):
each has a virtual time that advances by cost / weight with every turn it gets, and the lowest is served next, so a
tenant with 500 adapters in the queue delays another one's single adapter by one turn and not by 500. A tenant that was
idle comes back with a credit of up to ``burst`` (borrowed virtual time: Duda & Cheriton 1999), so those who ask for
little, now and then, go ahead of those who ask all the time.

A place held for longer than ``slow_after_s`` is lent to the next one in the queue: a blob that does not arrive blocks
nobody but itself. How many places may be lent is bounded, for each tenant and for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from mint_core import clock
from mint_core.errors import ResourceExhausted

__all__ = ["FairGate", "GateLimits", "TenantQueue", "Turn"]

_MAX_IDLE_TENANTS = 4096
_NUM_LENT = 4
"""Places that may be lent, as a multiple of the gate's; a tenant holds at most twice the gate's, lent ones included."""
_LEAST_SAMPLES = 3
_SMOOTHING = 0.2
_MAX_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Bounds of one gate."""

    num_places: int
    max_queued: int = 4096
    """Of all tenants together."""
    max_queued_per_tenant: int = 4096
    slow_after_s: float | None = None
    """Lend a place that is held for longer; None never does."""
    burst: float = 4.0
    """Largest credit of a tenant that was idle, in units of cost."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of a tenant; 1 where nothing is said."""


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """How one tenant stands at a gate."""

    tenant: str
    num_queued: int
    num_running: int
    num_refused: int
    """Since its last idle time that was long enough to be forgotten."""


class Turn:
    """A place in the queue, then a place inside. Several tenants may wait for one turn: the best placed one gets it."""

    def __init__(self, claims: Mapping[str, int], cost: float) -> None:
        self.claims = dict(claims)
        """Priority by tenant."""
        self.cost = cost
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tenant = ""
        """Who pays; set when it is granted."""
        self.since_s = 0.0
        self.is_lent = False
        self.is_queued = True
        self.timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Share:
    weight: float
    virtual: float
    num_queued: int = 0
    num_running: int = 0
    num_refused: int = 0


@dataclass(slots=True)
class _Class:
    """The queues of one priority."""

    queues: dict[str, dict[Turn, None]] = field(default_factory=dict)
    """By tenant, in order of arrival; never empty."""
    heap: list[tuple[float, int, str]] = field(default_factory=list)
    """(virtual time when it was put there, order, tenant): one entry for each of ``listed``."""
    listed: set[str] = field(default_factory=set)
    num_queued: int = 0


class FairGate:
    """At most ``num_places`` inside. All methods belong to one event loop."""

    def __init__(self, limits: GateLimits, *, what: str) -> None:
        self._limits = limits
        self._what = what
        self._num_busy = 0
        self._num_lent = 0
        self._num_queued = 0
        self._classes: dict[int, _Class] = {}
        self._shares: dict[str, _Share] = {}
        self._virtual = 0.0
        """The latest virtual time at which a turn was granted."""
        self._order = itertools.count()
        self._mean_s = 0.0
        self._num_done = 0

    @property
    def num_queued(self) -> int:
        return self._num_queued

    @property
    def num_running(self) -> int:
        """Inside now, those with a lent place included."""
        return self._num_busy + self._num_lent

    @property
    def num_places(self) -> int:
        return self._limits.num_places

    @property
    def mean_s(self) -> float:
        """How long a flight stays inside, smoothed; 0 while too few did to say."""
        return self._mean_s if self._num_done >= _LEAST_SAMPLES else 0.0

    def tenants(self) -> list[TenantQueue]:
        """Tenants with somebody in the queue or inside, or refused lately, by name."""
        return [
            TenantQueue(tenant, share.num_queued, share.num_running, share.num_refused)
            for tenant, share in sorted(self._shares.items())
            if share.num_queued or share.num_running or share.num_refused
        ]

    def expected_wait_s(self, tenant: str, priority: int) -> float:
        """How long a flight that came now would wait for its turn, judged by the turns before."""
        if not self._num_queued and self._num_busy < self._limits.num_places:
            return 0.0
        num_ahead = 1.0 + sum(each.num_queued for level, each in self._classes.items() if level > priority)
        same = self._classes.get(priority)
        if same is not None:
            share = self._shares.get(tenant)
            weight = self._weight(tenant)
            num_mine = len(same.queues.get(tenant, ()))
            credit = self._limits.burst if share is None else max(0.0, self._virtual - share.virtual) * weight
            num_others = sum(
                min(len(queue), (num_mine + 1) * self._weight(other) / weight)
                for other, queue in same.queues.items()
                if other != tenant
            )
            num_ahead += num_mine + max(0.0, num_others - credit)
        return num_ahead * self.mean_s / self._limits.num_places

    def queue(self, claims: Mapping[str, int], *, cost: float = 1.0) -> Turn:
        """Take a place in the queue, or inside; to be followed by :meth:`inside` at once.

        Raises :class:`ResourceExhausted` if the queue, or what the tenant may have of it, is full.
        """
        turn = Turn(claims, cost)
        if self._num_busy >= self._limits.num_places or self._num_queued:
            self._check_room(turn.claims)
        self._num_queued += 1
        for tenant, priority in turn.claims.items():
            self._enlist(turn, tenant, priority)
        self._grant()
        return turn

    @contextlib.asynccontextmanager
    async def inside(self, turn: Turn) -> AsyncIterator[None]:
        """Wait until the turn is granted, and give its place back at the end of the block."""
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                self._leave(turn)  # granted and cancelled in the same moment: hand the place on
            else:
                self._withdraw(turn)
            raise
        try:
            yield
        finally:
            self._measure(clock.monotonic_s() - turn.since_s)
            self._leave(turn)

    def claim(self, turn: Turn, tenant: str, priority: int) -> None:
        """Let another tenant wait for the turn too, or the same one with more urgency."""
        known = turn.claims.get(tenant)
        if turn.granted.done() or (known is not None and known >= priority):
            return
        if known is not None:
            self._strike(turn, tenant, known)
        turn.claims[tenant] = priority
        self._enlist(turn, tenant, priority)
        self._grant()

    def _check_room(self, claims: Mapping[str, int]) -> None:
        limits = self._limits
        for tenant in claims:
            share = self._share(tenant)
            num_mine = share.num_queued
            is_mine_full = num_mine >= limits.max_queued_per_tenant
            if not is_mine_full and self._num_queued < limits.max_queued:
                continue
            share.num_refused += 1
            who, num_waiting = (f" of tenant {tenant!r}", num_mine) if is_mine_full else ("", self._num_queued)
            raise ResourceExhausted(
                f"{num_waiting} {self._what}{who} wait already, which is the limit; retry later",
                metadata={"tenant": tenant, "num_queued": str(num_waiting)},
                retry_after_s=min(max(1.0, num_waiting * self.mean_s / limits.num_places / 2), _MAX_RETRY_S),
            )

    def _weight(self, tenant: str) -> float:
        return self._limits.weights.get(tenant, 1.0)

    def _share(self, tenant: str) -> _Share:
        share = self._shares.get(tenant)
        if share is None:
            self._forget_idle()
            share = self._shares[tenant] = _Share(self._weight(tenant), float("-inf"))
        return share

    def _forget_idle(self) -> None:
        """Drop tenants that would come back with full credit anyway."""
        if len(self._shares) < _MAX_IDLE_TENANTS:
            return
        for tenant, share in list(self._shares.items()):
            is_idle = not (share.num_queued or share.num_running)
            if is_idle and share.virtual <= self._virtual - self._limits.burst / share.weight:
                del self._shares[tenant]

    def _enlist(self, turn: Turn, tenant: str, priority: int) -> None:
        share = self._share(tenant)
        if not (share.num_queued or share.num_running):
            share.virtual = max(share.virtual, self._virtual - self._limits.burst / share.weight)
        share.num_queued += 1
        level = self._classes.setdefault(priority, _Class())
        level.queues.setdefault(tenant, {})[turn] = None
        level.num_queued += 1
        self._list(level, tenant, share)

    def _list(self, level: _Class, tenant: str, share: _Share) -> None:
        if tenant not in level.listed:
            level.listed.add(tenant)
            heapq.heappush(level.heap, (share.virtual, next(self._order), tenant))

    def _strike(self, turn: Turn, tenant: str, priority: int) -> None:
        level = self._classes[priority]
        queue = level.queues[tenant]
        del queue[turn]
        if not queue:
            del level.queues[tenant]
        level.num_queued -= 1
        self._shares[tenant].num_queued -= 1
        if not level.queues:
            del self._classes[priority]

    def _withdraw(self, turn: Turn) -> None:
        if not turn.is_queued:
            return
        turn.is_queued = False
        self._num_queued -= 1
        for tenant, priority in turn.claims.items():
            self._strike(turn, tenant, priority)

    def _grant(self) -> None:
        while self._num_busy < self._limits.num_places and self._num_queued:
            chosen = self._next()
            if chosen is None:
                return
            turn, tenant = chosen
            self._withdraw(turn)
            share = self._shares[tenant]
            self._virtual = max(self._virtual, share.virtual)
            share.virtual += turn.cost / share.weight
            share.num_running += 1
            self._num_busy += 1
            turn.tenant = tenant
            turn.since_s = clock.monotonic_s()
            self._watch(turn)
            turn.granted.set_result(None)

    def _next(self) -> tuple[Turn, str] | None:
        """Whose turn it is; None if everybody in the queue holds as much as one may."""
        for priority in sorted(self._classes, reverse=True):
            level = self._classes[priority]
            skipped: list[str] = []
            chosen: tuple[Turn, str] | None = None
            while level.heap and chosen is None:
                seen, _, tenant = heapq.heappop(level.heap)
                level.listed.discard(tenant)
                queue = level.queues.get(tenant, {})
                while queue and (first := next(iter(queue))).granted.done():
                    self._withdraw(first)  # its waiter was cancelled and has not run since
                if not queue:
                    continue
                share = self._shares[tenant]
                if seen < share.virtual:  # it had turns since, maybe in another class
                    self._list(level, tenant, share)
                elif share.num_running >= 2 * self._limits.num_places:
                    skipped.append(tenant)
                else:
                    chosen = next(iter(queue)), tenant
                    # Its place in the heap is put right when it comes up again.
                    self._list(level, tenant, share)
            for tenant in skipped:
                self._list(level, tenant, self._shares[tenant])
            if chosen is not None:
                return chosen
        return None

    def _watch(self, turn: Turn) -> None:
        if self._limits.slow_after_s is not None:
            loop = asyncio.get_running_loop()
            turn.timer = loop.call_later(self._limits.slow_after_s, self._lend, turn)

    def _lend(self, turn: Turn) -> None:
        if self._num_lent >= _NUM_LENT * self._limits.num_places:
            self._watch(turn)  # later, perhaps
            return
        turn.timer = None
        turn.is_lent = True
        self._num_lent += 1
        self._num_busy -= 1
        self._grant()

    def _leave(self, turn: Turn) -> None:
        if turn.timer is not None:
            turn.timer.cancel()
        if turn.is_lent:
            self._num_lent -= 1
        else:
            self._num_busy -= 1
        self._shares[turn.tenant].num_running -= 1
        self._grant()

    def _measure(self, seconds: float) -> None:
        if self._limits.slow_after_s is not None:
            seconds = min(seconds, self._limits.slow_after_s)  # from then on others had the place
        self._num_done += 1
        share = max(_SMOOTHING, 1 / self._num_done)
        self._mean_s += share * (seconds - self._mean_s)
