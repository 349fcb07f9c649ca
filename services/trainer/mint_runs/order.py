"""Which examples belong to which step: a pure function, so that a resumed run goes on exactly where it was."""

from __future__ import annotations

import functools
import random

__all__ = ["permutation", "step_indices"]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> tuple[int, ...]:
    """Order of all examples in one epoch.

    Built on ``Random.random`` alone, the one method whose sequence Python promises to keep between versions.
    """
    generator = random.Random(f"{seed}/{epoch}")
    keys = [generator.random() for _ in range(num_examples)]
    return tuple(sorted(range(num_examples), key=keys.__getitem__))


def step_indices(seed: int, step: int, batch_size: int, num_examples: int) -> list[int]:
    """Indices of the examples of ``step`` (from 0): the next ``batch_size`` of all epochs' orders, joined."""
    first = step * batch_size
    return [
        permutation(seed, position // num_examples, num_examples)[position % num_examples]
        for position in range(first, first + batch_size)
    ]
