"""How long each tenant waited for its cold adapters lately, and how its loads ended."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["TenantWaits", "Waits", "percentile"]

_MAX_TENANTS = 1024
_MAX_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class TenantWaits:
    """One tenant's loads since the start; percentiles are over its latest waits, in seconds, 0 without any."""

    tenant: str
    num_done: int
    """Loads that had to bring the adapter nearer."""
    num_failed: int
    num_refused: int
    """Not admitted: a queue was full, or the wait would have outlived the deadline."""
    wait_p50_s: float
    wait_p99_s: float


@dataclass(slots=True)
class _Tally:
    samples_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))
    num_done: int = 0
    num_failed: int = 0
    num_refused: int = 0


class Waits:
    """Of the tenants heard of last; at most 1024 of them, 512 waits each."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, _Tally] = OrderedDict()

    def done(self, tenant: str, seconds: float) -> None:
        """A cold adapter reached its tier after ``seconds``."""
        tally = self._of(tenant)
        tally.num_done += 1
        tally.samples_s.append(seconds)

    def failed(self, tenant: str) -> None:
        self._of(tenant).num_failed += 1

    def refused(self, tenant: str) -> None:
        self._of(tenant).num_refused += 1

    def tenants(self) -> Iterator[TenantWaits]:
        """One by one, by name."""
        for tenant, tally in sorted(self._tallies.items()):
            yield TenantWaits(
                tenant,
                tally.num_done,
                tally.num_failed,
                tally.num_refused,
                percentile(tally.samples_s, 0.5),
                percentile(tally.samples_s, 0.99),
            )

    def _of(self, tenant: str) -> _Tally:
        tally = self._tallies.setdefault(tenant, _Tally())
        self._tallies.move_to_end(tenant)
        while len(self._tallies) > _MAX_TENANTS:
            self._tallies.popitem(last=False)
        return tally


def percentile(samples: Iterable[float], share: float) -> float:
    """The smallest sample that at least ``share`` of all do not exceed (nearest rank); 0 without samples."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0
