"""What a garbage collection did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

__all__ = ["Progress", "Report"]

_MAX_EXAMPLES: Final = 1000


@dataclass(slots=True)
class Report:
    """Counts of one collection, with the field names of the public message."""

    num_blobs: int = 0
    num_blobs_condemned: int = 0
    num_bytes_condemned: int = 0
    num_blobs_deleted: int = 0
    num_uploads_deleted: int = 0
    num_rollouts_deleted: int = 0
    num_request_ids_deleted: int = 0
    num_policies_purged: int = 0
    num_audit_entries_deleted: int = 0
    num_races_lost: int = 0
    examples: tuple[str, ...] = ()
    num_objects_deleted: int = 0
    num_part_uploads_aborted: int = 0
    num_usage_counts_deleted: int = 0

    def example(self, name: object) -> None:
        """Remember something that was or would be deleted; the first thousand are kept."""
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples = (*self.examples, str(name))

    def copy(self) -> Report:
        """The counts as they are now."""
        return replace(self)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a collection is."""

    step: str
    """What is being done, one line; "done" at the end."""
    report: Report
