"""Records of verbs over many policies, and of a tenant's erasure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from mint_core.errors import MintError
from mint_core.names import FleetOperationName, PolicyName, TenantErasureName

__all__ = [
    "FleetOperation",
    "FleetPause",
    "FleetPromote",
    "FleetResult",
    "FleetResume",
    "FleetRollback",
    "FleetState",
    "FleetVerb",
    "TenantErasure",
    "TenantErasureState",
]


class FleetState(IntEnum):
    UNSPECIFIED = 0
    RUNNING = 1
    DONE = 2
    CANCELLED = 3


@dataclass(frozen=True, slots=True)
class FleetPromote:
    alias: str = ""


@dataclass(frozen=True, slots=True)
class FleetRollback:
    alias: str = ""


@dataclass(frozen=True, slots=True)
class FleetPause:
    pass


@dataclass(frozen=True, slots=True)
class FleetResume:
    pass


FleetVerb = FleetPromote | FleetRollback | FleetPause | FleetResume


@dataclass(frozen=True, slots=True)
class FleetOperation:
    name: FleetOperationName
    filter: str = ""
    promote: FleetPromote | None = None
    rollback: FleetRollback | None = None
    pause: FleetPause | None = None
    resume: FleetResume | None = None
    reason: str = ""
    state: FleetState = FleetState.UNSPECIFIED
    num_done: int = 0
    num_failed: int = 0
    principal: str = ""
    create_time: datetime | None = None
    end_time: datetime | None = None
    catalog_revision: int = 0
    mod_revision: int = 0

    @property
    def verb(self) -> FleetVerb | None:
        """What is done to each policy."""
        verbs = (self.promote, self.rollback, self.pause, self.resume)
        return next((verb for verb in verbs if verb is not None), None)


@dataclass(frozen=True, slots=True)
class FleetResult:
    policy: PolicyName
    error: MintError | None = None
    """None is success."""
    revision_number: int = 0
    """What the alias points at since; 0 where none was moved."""


class TenantErasureState(IntEnum):
    UNSPECIFIED = 0
    RUNNING = 1
    DONE = 2


@dataclass(frozen=True, slots=True)
class TenantErasure:
    name: TenantErasureName
    state: TenantErasureState = TenantErasureState.UNSPECIFIED
    num_records_deleted: Mapping[str, int] = field(default_factory=dict)
    num_objects_deleted: int = 0
    num_bytes_deleted: int = 0
    num_records_left: Mapping[str, int] = field(default_factory=dict)
    num_objects_left: int = 0
    deleted_digest: str = ""
    principal: str = ""
    reason: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None
    mod_revision: int = 0
