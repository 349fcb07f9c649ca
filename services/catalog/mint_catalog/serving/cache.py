"""Aliases that were read lately, kept right by the hub's watch. A plain data structure: no I/O, one clock.

Resolve answers from here. Three rules keep that right:

- The hub tells of every change in the order of revisions, whole revisions at a time, and within the same step of the
  event loop in which its position moves. What it tells of is dropped; the next read fills it again.
- A fill carries the revision it was read at. One that is older than the hub's position is refused: the change that
  made it old may have been told before the fill came, and then nothing would ever drop it.
- What this process writes is dropped at once, and no fill from before it is taken: whoever moved an alias through this
  catalog and resolves it here sees the move, without waiting for the watch.
- So an entry is right as of the later of its own revision and the hub's position. Whether that is recent enough is for
  the hub to say: it knows until when on the clock it has told of everything. Beyond the staleness bound, and where the
  hub lost its place in history, the store is asked instead.

There is no serving of the last known alias while etcd is away: whoever generates keeps its own (inference, for
``serve_stale_for``), and a second place for that would double the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mint_catalog.model.keys import Keys
from mint_catalog.model.records import Alias
from mint_catalog.storage.nearby import Told
from mint_catalog.storage.store import Change, DeleteRange, Operation, prefix_end
from mint_core import clock

__all__ = ["AliasCache"]


@dataclass(frozen=True, slots=True)
class _Entry:
    alias: Alias
    read_at: int


class AliasCache:
    """At most ``max_entries`` aliases by name, the least recently used leaves first; 0 keeps none.

    It keeps what an alias resolves to, without its history and gate.
    """

    def __init__(
        self,
        keys: Keys,
        told: Told,
        *,
        max_entries: int,
        staleness_s: float,
        now_s: Callable[[], float] = clock.boottime_s,
    ) -> None:
        self._keys = keys
        self._told = told
        self._max_entries = max_entries
        self._staleness_s = staleness_s
        self._now_s = now_s
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._prefix = keys.family("aliases")
        self._end = prefix_end(self._prefix)
        self._wrote_at = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str, *, min_revision: int = 0) -> tuple[Alias, int] | None:
        """The alias and the revision as of which it is right, if that is recent and new enough to be told."""
        entry = self._entries.get(name)
        if entry is None or self._now_s() - self._told.told_until_s > self._staleness_s:
            return None
        right_at = max(entry.read_at, self._told.position)
        if right_at < min_revision:
            return None
        self._entries.move_to_end(name)
        return entry.alias, right_at

    def fill(self, alias: Alias, read_at: int) -> bool:
        """Keep an alias that was read at a revision of the store; False if the watch may know better."""
        position = self._told.position
        if not self._max_entries or position == 0 or read_at < max(position, self._wrote_at):
            return False
        name = str(alias.name)
        held = self._entries.get(name)
        if held is not None and held.read_at > read_at:
            return False
        slim = Alias(
            alias.name,
            canary=alias.canary,
            canary_resolution=alias.canary_resolution,
            resolution=alias.resolution,
        )
        self._entries[name] = _Entry(slim, read_at)
        self._entries.move_to_end(name)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return True

    def wrote(self, operations: Sequence[Operation], revision: int) -> None:
        """This process has written these, at this revision."""
        for operation in operations:
            if isinstance(operation, DeleteRange):
                if operation.start < self._end and self._prefix < operation.end:
                    self._entries.clear()
                    self._wrote_at = max(self._wrote_at, revision)
            elif operation.key.startswith(self._prefix):
                self._entries.pop(str(self._keys.alias_name(operation.key)), None)
                self._wrote_at = max(self._wrote_at, revision)

    def hear(self, changes: Sequence[Change]) -> None:
        """These aliases changed."""
        if self._entries:
            for change in changes:
                self._entries.pop(str(self._keys.alias_name(change.key)), None)

    def lost(self) -> None:
        """The watch missed changes, nobody knows which; or the store went back in time."""
        self._entries.clear()
        self._wrote_at = 0
