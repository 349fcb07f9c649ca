"""Which policies this node serves: those whose publications are worth a prefetch."""

from __future__ import annotations

from collections import OrderedDict

from mint_core import clock
from mint_core.names import PolicyName
from mint_loader.cache import DiskCache

__all__ = ["ServedPolicies"]


class ServedPolicies:
    """Policies that somebody asked this node for, with the latest adapter of each; at most ``max_policies``."""

    def __init__(self, cache: DiskCache, *, recent_s: float = 3600.0, max_policies: int = 65_536) -> None:
        self._cache = cache
        self._recent_s = recent_s
        self._max_policies = max_policies
        self._served: OrderedDict[PolicyName, tuple[float, str]] = OrderedDict()

    def note(self, policy: PolicyName, digest: str) -> None:
        """Somebody asked for an adapter of the policy."""
        self._served[policy] = clock.monotonic_s(), digest
        self._served.move_to_end(policy)
        while len(self._served) > self._max_policies:
            self._served.popitem(last=False)

    def is_recent(self, policy: PolicyName) -> bool:
        """Whether it was asked for lately, or its adapter is used on the disk."""
        at_s, digest = self._served.get(policy, (None, ""))
        if at_s is None:
            return False
        return clock.monotonic_s() - at_s <= self._recent_s or self._cache.used_within(digest, self._recent_s)

    def latest_digest(self, policy: PolicyName) -> str | None:
        """The adapter that was asked for last."""
        served = self._served.get(policy)
        return None if served is None else served[1]
