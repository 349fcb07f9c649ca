"""Where adapters are believed to lie. Hints only: an engine that lacks an adapter says so, and it is loaded there."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Set

__all__ = ["Hints"]


class Hints:
    """Digest → names of the replicas believed to hold it; of the least recently noted ones nothing is known beyond
    ``max_hints``."""

    def __init__(self, max_hints: int) -> None:
        self._max_hints = max_hints
        self._holders: OrderedDict[str, dict[str, float]] = OrderedDict()
        """Digest → name → when it was noted."""
        self._held: dict[str, set[str]] = {}
        """Name → digests: the same the other way round."""
        self._loading: Counter[tuple[str, str]] = Counter()
        self._told: set[str] = set()
        """Names of those that said what they hold."""

    def holders(self, digest: str) -> Set[str]:
        """Names of those that hold it, or are about to."""
        return self._holders.get(digest, {}).keys()

    def lacks(self, name: str, digest: str) -> bool:
        """Whether it said what it holds, and the adapter was not among that nor noted since."""
        return name in self._told and name not in self.holders(digest)

    @contextlib.contextmanager
    def loading(self, name: str, digest: str, now_s: float) -> Iterator[None]:
        """A load is under way: who comes meanwhile joins it. What it came to is for :meth:`note` or :meth:`discard`."""
        key = (name, digest)
        self._loading[key] += 1
        self.note(name, digest, now_s)
        try:
            yield
        finally:
            self._loading[key] -= 1
            if not self._loading[key]:
                del self._loading[key]

    def note(self, name: str, digest: str, now_s: float) -> None:
        self._holders.setdefault(digest, {})[name] = now_s
        self._holders.move_to_end(digest)
        self._held.setdefault(name, set()).add(digest)
        while len(self._holders) > self._max_hints:
            oldest, holders = self._holders.popitem(last=False)
            for holder in holders:
                self._drop_held(holder, oldest)

    def discard(self, name: str, digest: str) -> None:
        """It does not hold it."""
        holders = self._holders.get(digest)
        if holders is not None and holders.pop(name, None) is not None:
            self._drop_held(name, digest)
            if not holders:
                del self._holders[digest]

    def forget(self, name: str) -> None:
        """The replica is gone, or began anew and is empty."""
        self._told.discard(name)
        for digest in list(self._held.get(name, ())):
            self.discard(name, digest)

    def replace(self, name: str, digests: Collection[str], asked_at_s: float) -> None:
        """What the replica itself says it holds. What was noted after it was asked stays, as do loads under way."""
        self._told.add(name)
        held = set(digests)
        for digest in self._held.get(name, set()) - held:
            if self._holders[digest][name] < asked_at_s and not self._loading[name, digest]:
                self.discard(name, digest)
        for digest in held:
            if name not in self.holders(digest):
                self.note(name, digest, asked_at_s)

    def _drop_held(self, name: str, digest: str) -> None:
        held = self._held[name]
        held.discard(digest)
        if not held:
            del self._held[name]
