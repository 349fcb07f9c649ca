"""Who sees a canary: a pure function of the alias's salt and the request's sticky key.

The catalog and whoever caches its answers compute it alike, so a request is split the same way wherever that happens.
A key's position does not depend on the weight: a key that sees the canary at a weight of 0.1 sees it at 0.2 as well.
"""

from __future__ import annotations

import hashlib

__all__ = ["position_of", "sees_canary"]

_POSITIONS = 2**53
"""As many as a float tells apart in [0, 1)."""


def position_of(salt: str, sticky_key: str) -> float:
    """Where a sticky key lies in [0, 1): uniform over keys, and another order of keys for each salt."""
    # The lengths keep ("ab", "c") and ("a", "bc") apart.
    text = f"{len(salt)}\0{salt}{sticky_key}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return (number >> 11) / _POSITIONS


def sees_canary(weight: float, salt: str, sticky_key: str) -> bool:
    """Whether a request with this sticky key gets the canary; one without a key never does."""
    return bool(sticky_key) and position_of(salt, sticky_key) < weight
