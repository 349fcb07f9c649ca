"""What the audit trail tells."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from mint_core.names import AuditEntryName

__all__ = ["AuditChange", "AuditChangeType", "AuditEntry"]


class AuditChangeType(IntEnum):
    UNSPECIFIED = 0
    CREATED = 1
    CHANGED = 2
    DELETED = 3


@dataclass(frozen=True, slots=True)
class AuditChange:
    """One record's change."""

    key: bytes
    type: AuditChangeType
    before: bytes | None
    """The record's stored bytes; None when it was created, or where they were too large to keep."""
    after: bytes | None
    """The record's stored bytes since; None when it was deleted, or where they were too large to keep."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One transaction."""

    name: AuditEntryName
    time: datetime
    catalog_revision: int
    principal: str
    method: str
    request_id: str
    reason: str
    changes: tuple[AuditChange, ...]
