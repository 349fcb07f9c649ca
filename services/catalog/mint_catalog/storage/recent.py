"""Records that were read, written or heard of lately: what a transaction is first decided on, instead of a read.

Nothing here is known to be right. Whoever decides on it compares, in the transaction that he writes by, the revision of
all that he decided on: what is old here costs him a transaction that is refused, never a wrong write. An error, or an
answer without a write, proves nothing and must not come from here.

It is kept as right as it cheaply can be: by each read and write of the drafts that use it, and by the hub, which tells
of the changes of its families whoever made them. A plain data structure: no I/O, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from mint_catalog.storage.store import Change, KeyValue

__all__ = ["FAMILIES", "Recent"]

FAMILIES: Final = ("aliases", "policies", "revisions")
"""Families that the hub must tell of, of keys without a lease."""

_MAX_VALUE: Final = 16 * 1024
"""Larger values are not kept, so that the number of records bounds the memory."""


class Recent:
    """At most ``max_records`` records by key, the longest unused leaves first; 0 keeps none."""

    def __init__(self, *, max_records: int) -> None:
        self._max_records = max_records
        self._records: OrderedDict[bytes, KeyValue] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def recall(self, keys: Sequence[bytes]) -> list[KeyValue] | None:
        """The records under these keys as they were lately, None unless all of them are known."""
        known = [kv for key in keys if (kv := self._records.get(key)) is not None]
        if len(known) < len(keys):
            return None
        for key in keys:
            self._records.move_to_end(key)
        return known

    def note(self, values: Iterable[tuple[bytes, KeyValue | None]], revision: int) -> None:
        """At this revision of the store these keys had these values, or (None) were absent."""
        for key, kv in values:
            held = self._records.get(key)
            if kv is None:
                if held is not None and held.mod_revision <= revision:
                    del self._records[key]
            elif held is None or held.mod_revision < kv.mod_revision:
                self._keep(kv)

    def hear(self, changes: Sequence[Change]) -> None:
        """The hub tells of changes of its families."""
        if self._max_records:
            for change in changes:
                if change.deleted:
                    self._records.pop(change.key, None)
                else:
                    held = self._records.get(change.key)
                    if held is None or held.mod_revision < change.mod_revision:
                        self._keep(KeyValue(change.key, change.value, change.create_revision, change.mod_revision))

    def lost(self) -> None:
        """The hub missed changes, or the store went back in time: revisions may come to mean something else."""
        self._records.clear()

    def _keep(self, kv: KeyValue) -> None:
        if not self._max_records or kv.lease or len(kv.value) > _MAX_VALUE:
            self._records.pop(kv.key, None)
            return
        self._records[kv.key] = kv
        self._records.move_to_end(kv.key)
        if len(self._records) > self._max_records:
            self._records.popitem(last=False)
