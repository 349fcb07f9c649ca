"""What leaves a full disk first: an order of worth, and three ways to tell worth.

================  ==================================================  ============================================
policy            worth of an adapter                                 source
================  ==================================================  ============================================
:class:`Lru`      the moment of its last use                          the usual
:class:`Lfu`      how often it was used                               the usual, without aging
:class:`Gdsf`     clock + uses × cost of fetching it again / size     Cherkasova, HPL-98-69R1 (GreedyDual-Size
                                                                      with frequency), after Cao & Irani, 1997
================  ==================================================  ============================================

The adapter of least worth leaves; of equals the one whose last use is longest ago. ``bench/eviction.py`` compares the
three on requests like those of a node; what it found best is the default.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from mint_core.errors import InvalidArgument

__all__ = ["POLICIES", "EvictionOrder", "EvictionPolicy", "Facts", "Gdsf", "Lfu", "Lru", "Seen", "make_policy"]

FETCH_OVERHEAD_BYTES: Final = 4 << 20
"""What one fetch costs beyond its bytes, in bytes that could have been moved in that time: round trips, checks, syncs.
``bench/eviction.py`` tells how little the exact number matters."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an adapter at a use of it."""

    size_bytes: int
    num_uses: int
    """With this one."""
    used_at_s: float
    """Seconds since the epoch."""


class EvictionPolicy(Protocol):
    """How much an adapter is worth to keep. Its numbers are compared with each other and with nothing else."""

    @property
    def name(self) -> str:
        """As the settings name it."""
        ...

    def worth(self, facts: Facts) -> float:
        """Worth from this use on, until the next."""
        ...

    def evicted(self, worth: float) -> None:
        """Be told that the adapter of this worth was the least and left."""
        ...


class Lru:
    """Least recently used."""

    name = "lru"

    def worth(self, facts: Facts) -> float:
        return facts.used_at_s

    def evicted(self, worth: float) -> None:
        pass


class Lfu:
    """Least frequently used; what was popular once stays long after."""

    name = "lfu"

    def worth(self, facts: Facts) -> float:
        return float(facts.num_uses)

    def evicted(self, worth: float) -> None:
        pass


class Gdsf:
    """Greedy dual-size with frequency: keeps what saves most fetching time for each byte of disk.

    The clock is the worth of what left last; as it rises, what is not used any more falls behind.
    """

    name = "gdsf"

    def __init__(self, overhead_bytes: int = FETCH_OVERHEAD_BYTES) -> None:
        self._overhead_bytes = overhead_bytes
        self._clock = 0.0

    def worth(self, facts: Facts) -> float:
        size_bytes = max(facts.size_bytes, 1)
        return self._clock + facts.num_uses * (size_bytes + self._overhead_bytes) / size_bytes

    def evicted(self, worth: float) -> None:
        self._clock = max(self._clock, worth)


POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {"gdsf": Gdsf, "lfu": Lfu, "lru": Lru}
"""By the name that the settings use."""


def make_policy(name: str) -> EvictionPolicy:
    """A new policy of that name. Raises :class:`InvalidArgument`."""
    if name not in POLICIES:
        raise InvalidArgument(f"eviction is {name!r}; choose one of {', '.join(sorted(POLICIES))}", field="eviction")
    return POLICIES[name]()


@dataclass(frozen=True, slots=True)
class Seen:
    """An adapter as an earlier process left it."""

    digest: str
    size_bytes: int
    used_at_s: float
    num_uses: int = 1
    worth: float | None = None


@dataclass(slots=True)
class _Place:
    worth: float
    order: int
    num_uses: int


class EvictionOrder:
    """Adapters by worth. A use costs O(log n); so does finding the least, plus those it must not take."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._places: dict[str, _Place] = {}
        self._heap: list[tuple[float, int, str]] = []
        """Worth, order and digest; what no longer agrees with the place of its digest is skipped."""
        self._order = itertools.count()
        self._latest_s = 0.0

    @property
    def policy_name(self) -> str:
        return self._policy.name

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def num_uses(self, digest: str) -> int:
        """Uses of an adapter so far, 0 if it has no place."""
        place = self._places.get(digest)
        return 0 if place is None else place.num_uses

    def use(self, digest: str, size_bytes: int, used_at_s: float) -> None:
        """An adapter is used, or came."""
        num_uses = self.num_uses(digest) + 1
        self._latest_s = max(self._latest_s, used_at_s)  # a clock that is set back does not make this use an old one
        self._put(digest, self._policy.worth(Facts(size_bytes, num_uses, self._latest_s)), num_uses)

    def restore(self, seen: Iterable[Seen]) -> None:
        """Adapters stand where an earlier process saw them; those without worth are judged anew."""
        ordered = sorted(seen, key=lambda each: each.used_at_s)
        known = [each.worth for each in ordered if each.worth is not None]
        if known:
            # A clock is never above the least worth. Begun at zero, it would make all newcomers worthless.
            self._policy.evicted(min(known))
        for each in ordered:
            facts = Facts(each.size_bytes, each.num_uses, each.used_at_s)
            worth = self._policy.worth(facts) if each.worth is None else each.worth
            self._put(each.digest, worth, each.num_uses)

    def discard(self, digest: str) -> None:
        """An adapter is gone for another reason than its worth."""
        self._places.pop(digest, None)

    def take_least(self, may_leave: Callable[[str], bool]) -> str | None:
        """Take out the adapter of least worth among those that may leave; None if there is none."""
        kept: list[tuple[float, int, str]] = []
        found: str | None = None
        while self._heap:
            worth, order, digest = each = heapq.heappop(self._heap)
            place = self._places.get(digest)
            if place is None or place.order != order:
                continue
            if may_leave(digest):
                del self._places[digest]
                self._policy.evicted(worth)
                found = digest
                break
            kept.append(each)
        for each in kept:
            heapq.heappush(self._heap, each)
        return found

    def snapshot(self) -> dict[str, tuple[int, float]]:
        """Uses and worth by digest, to be restored by the next process."""
        return {digest: (place.num_uses, place.worth) for digest, place in self._places.items()}

    def _put(self, digest: str, worth: float, num_uses: int) -> None:
        order = next(self._order)
        self._places[digest] = _Place(worth, order, num_uses)
        heapq.heappush(self._heap, (worth, order, digest))
        # Each use leaves an outdated entry behind; a use in a thousand pays for their removal.
        if len(self._heap) > 64 + 2 * len(self._places):
            self._heap = [(place.worth, place.order, digest) for digest, place in self._places.items()]
            heapq.heapify(self._heap)
