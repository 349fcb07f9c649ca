"""On which of several replicas an adapter lies first: a pure function of its digest and their names.

The catalog, which picks replicas for a promotion that waits, and inference, which picks them for requests, compute it
alike, so an adapter is asked for where it was put, and processes that know nothing of each other put it in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["placement_order"]


def placement_order(digest: str, names: Iterable[str]) -> list[str]:
    """The names by preference for a digest (rendezvous hashing): a name more or less moves no other ones."""

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{digest}/{name}".encode(), digest_size=8).digest()

    return sorted(names, key=weight)
