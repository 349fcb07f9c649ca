"""Clocks by what they are good for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

from mint_core.errors import DeadlineExceeded

__all__ = ["Deadline", "boottime_s", "monotonic_s", "wall_s"]


def monotonic_s() -> float:
    """Seconds for measuring and for deadlines inside one process; stands still while the machine sleeps."""
    return time.monotonic()


def boottime_s() -> float:
    """Seconds that go on while the machine sleeps: for leases, which the other side counts on too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_s() -> float:
    """Seconds since the epoch, for showing to people; may jump."""
    return time.time()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Self:
        return cls(monotonic_s() + timeout_s)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - monotonic_s())

    def check(self, what: str) -> None:
        """Raise :class:`DeadlineExceeded` naming ``what`` if the time is up."""
        if self.remaining_s <= 0:
            raise DeadlineExceeded(f"{what} did not finish before its deadline; retry with a longer one")
