"""Resolutions by alias, kept right by a watch. A plain data structure: no I/O, one clock.

Two things reach it in any order: answers the catalog gave when asked (fills), and words of the watch. The rules that
keep it right:

- A fill carries the catalog revision it was read at. One older than the latest word is dropped: the word may have been
  about that alias, and then the fill would undo it.
- A word about an alias replaces everything older about it, and nothing newer.
- An entry may be used without asking while the watch is live (its last word is younger than the staleness bound) and
  has told everything since the entry was read. After a gap in the watch that holds for later entries only; after a
  reconnection without a gap, once the watch has caught up with what the catalog answers elsewhere.
- The others are still the last that is known, for when the catalog is away.

An entry holds for every sticky key: what the catalog says of an alias with a canary tells both sides of the split.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mint_core import clock
from mint_core.names import AliasName
from mint_inference.model import AliasWord, Consistency, Resolution

__all__ = ["AliasCache"]

_NEVER_S = float("-inf")


@dataclass(slots=True)
class _Entry:
    resolution: Resolution
    read_at: int
    """Catalog revision it was read at."""
    known_at_s: float
    """When it was last known to be right, apart from what the watch has told since."""


class AliasCache:
    """At most ``max_entries`` aliases, the least recently used one leaves first."""

    def __init__(self, *, max_entries: int, staleness_s: float, now_s: Callable[[], float] = clock.monotonic_s) -> None:
        self._max_entries = max_entries
        self._staleness_s = staleness_s
        self._now_s = now_s
        self._entries: OrderedDict[AliasName, _Entry] = OrderedDict()
        self._word_at_s = _NEVER_S
        self._latest = 0
        """Catalog revision of the latest word."""
        self._complete = 0
        """Catalog revision up to which nothing can come any more; a word about an alias may have siblings."""
        self._covered_since: int | None = None
        """Entries read at this catalog revision or later missed no word; None until a new watch has spoken."""
        self._resumed_at_s: float | None = None
        """Set while the watch, having resumed in the past, may still be telling old news."""
        self._catch_up_to: int | None = None
        """Catalog revision that was the present after that; once the watch is there it tells the present again."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def latest(self) -> int:
        """Fills older than this are dropped."""
        return self._latest

    @property
    def is_live(self) -> bool:
        """Whether the watch said something of the present within the staleness bound."""
        is_told = self._covered_since is not None and self._resumed_at_s is None
        return is_told and self._now_s() - self._word_at_s <= self._staleness_s

    def begin_watch(self) -> None:
        """A watch starts that will not tell what happened before: nothing cached so far is covered by it."""
        for entry in self._entries.values():
            entry.known_at_s = self._known_at_s(entry)
        self._covered_since = None
        self._latest = self._complete = 0
        self._resumed_at_s = self._catch_up_to = None

    def resume_watch(self) -> None:
        """The watch was cut and goes on where it was: it tells what happened meanwhile before it tells the present."""
        if self._covered_since is not None:
            self._resumed_at_s, self._catch_up_to = self._now_s(), None

    def hear(self, word: AliasWord) -> None:
        """Take a word of the watch."""
        revision = word.catalog_revision
        self._latest = max(self._latest, revision)
        self._complete = max(self._complete, revision if word.name is None else revision - 1)
        if self._covered_since is None:
            self._covered_since = revision
        self._note_progress()
        if word.name is not None:
            self._move(word.name, word)

    def _note_progress(self) -> None:
        if self._resumed_at_s is not None:
            if self._catch_up_to is None or self._complete < self._catch_up_to:
                return
            self._resumed_at_s = self._catch_up_to = None
        self._word_at_s = self._now_s()

    def _move(self, name: AliasName, word: AliasWord) -> None:
        # What clients ask for is kept up to date; aliases nobody asked for would only push those out.
        entry = self._entries.get(name)
        if entry is None or entry.read_at >= word.catalog_revision:
            return
        if word.resolution is None:
            del self._entries[name]
        else:
            self._entries[name] = _Entry(word.resolution, word.catalog_revision, self._now_s())

    def fill(self, name: AliasName, resolution: Resolution, *, asked_at_s: float) -> bool:
        """Take the answer of the catalog to what was asked at ``asked_at_s``; False if the watch knows better."""
        read_at = resolution.catalog_revision
        if self._resumed_at_s is not None and self._catch_up_to is None and asked_at_s >= self._resumed_at_s:
            self._catch_up_to = read_at
            self._note_progress()
        if read_at < self._latest:
            return False
        held = self._entries.get(name)
        if held is not None and held.read_at > read_at:
            return False
        self._entries[name] = _Entry(resolution, read_at, self._now_s())
        self._entries.move_to_end(name)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return True

    def forget(self, name: AliasName) -> None:
        """The catalog says there is no such alias."""
        self._entries.pop(name, None)

    def get(self, name: AliasName, consistency: Consistency) -> Resolution | None:
        """What the alias means, if that can be told without asking and is as fresh as it must be."""
        entry = self._entries.get(name)
        if entry is None or consistency.strong or not self.is_live:
            return None
        assert self._covered_since is not None
        if entry.read_at < self._covered_since:
            return None
        if consistency.min_revision > max(entry.read_at, self._complete):
            return None
        self._entries.move_to_end(name)
        return entry.resolution

    def last_known(self, name: AliasName, *, within_s: float) -> Resolution | None:
        """What the alias meant when that was last known, if it was known within ``within_s``."""
        entry = self._entries.get(name)
        if entry is None or self._now_s() - self._known_at_s(entry) > within_s:
            return None
        return entry.resolution

    def _known_at_s(self, entry: _Entry) -> float:
        if self._covered_since is not None and entry.read_at >= self._covered_since:
            return max(entry.known_at_s, self._word_at_s)
        return entry.known_at_s
