"""Keeps a stop text out of a stream when it arrives in pieces.

A stop text may span tokens: by the time the engine sees the last of them, the first have been streamed. This filter
holds back the shortest tail that could still become a stop text, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopTextFilter"]


class StopTextFilter:
    """Feeds text through piece by piece; what comes out never holds a stop text nor the start of one that was met."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._met = False

    def feed(self, text: str) -> str:
        """The part of all text so far that is certain and was not returned before."""
        if self._met:
            return ""
        self._held += text
        begins = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if begins:
            self._met = True
            certain, self._held = self._held[: min(begins)], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def close(self) -> str:
        """What was held back, once it is known that no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
