"""How busy replicas are, as far as this process knows: its own streams, and what engines say of everybody's."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mint_inference.model import Replica

__all__ = ["Loads"]

_DEFAULT_CAPACITY = 64
"""Of an engine that does not say how many requests a batch of its has."""


@dataclass(slots=True)
class _Load:
    num_streams: int = 0
    """Our own."""
    digests: Counter[str] = field(default_factory=Counter)
    """Our streams by adapter."""
    num_others: int = 0
    """Streams of other processes, when the engine last told."""
    told_at_s: float = float("-inf")


class Loads:
    """Streams by replica. Of other processes' streams the engine tells with each answer; what it said counts for
    ``memory_s``."""

    def __init__(self, now_s: Callable[[], float], *, memory_s: float = 6.0) -> None:
        self._now_s = now_s
        self._memory_s = memory_s
        self._loads: dict[str, _Load] = {}

    @contextlib.contextmanager
    def using(self, replica: Replica, digest: str) -> Iterator[None]:
        """Count a stream at the replica."""
        load = self._loads.setdefault(replica.name, _Load())
        load.num_streams += 1
        if digest:
            load.digests[digest] += 1
        try:
            yield
        finally:
            load.num_streams -= 1
            if digest:
                load.digests[digest] -= 1
                if not load.digests[digest]:
                    del load.digests[digest]
            if not load.num_streams and self._now_s() - load.told_at_s > self._memory_s:
                self._loads.pop(replica.name, None)

    def told(self, replica: Replica, num_running: int) -> None:
        """The engine said how many streams it runs."""
        load = self._loads.setdefault(replica.name, _Load())
        load.num_others = max(0, num_running - load.num_streams)
        load.told_at_s = self._now_s()

    def forget(self, name: str) -> None:
        """The replica is gone: nothing it said counts. Streams that still end are counted down."""
        load = self._loads.get(name)
        if load is not None:
            load.num_others = 0
            if not load.num_streams:
                del self._loads[name]

    def pressure(self, replica: Replica, digest: str) -> float:
        """Share of the engine's batch that is taken, by requests or by adapters, with one more request for ``digest``
        among the latter; above 1 requests wait."""
        load = self._loads.get(replica.name)
        if load is None:
            return 0.0
        others = load.num_others if self._now_s() - load.told_at_s <= self._memory_s else 0
        taken = (load.num_streams + others) / (replica.max_running_requests or _DEFAULT_CAPACITY)
        if not digest or replica.num_slots < 2:
            return taken
        num_adapters = len(load.digests) + (digest not in load.digests)
        # One slot is the base's. A single adapter takes a slot on every replica alike.
        return max(taken, (num_adapters - 1) / (replica.num_slots - 1))

    def share(self, replica: Replica, digest: str) -> float:
        """Share of an adapter in our streams at the replica."""
        load = self._loads.get(replica.name)
        return load.digests[digest] / load.num_streams if load is not None and load.num_streams else 0.0
