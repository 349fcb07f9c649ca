"""The one tree of errors MinT raises on purpose.

::

    MintError
    ├── InvalidArgument            a field the caller sent is wrong
    │   └── DigestMismatch         bytes do not have the digest they were announced with
    ├── Unauthenticated            no or unusable credentials
    ├── PermissionDenied           the principal may not do this
    ├── NotFound                   the named resource does not exist
    ├── AlreadyExists              the name is taken
    │   └── RequestIdReused        same request id, other payload
    ├── Aborted                    lost a race; read again and retry
    │   └── EtagMismatch           the resource changed since it was read
    ├── FailedPrecondition         the resource is in the wrong state for this call
    │   ├── WrongState
    │   ├── LeaseLost              the fence was superseded; stop writing
    │   ├── LeaseHeld              somebody else holds the lease
    │   ├── BlobMissing            publish before the blob was verified
    │   ├── BaseModelMismatch      adapter and resident base differ
    │   ├── GateNotMet             an evaluation that an alias's gate asks for is missing or falls short
    │   ├── SignatureRequired      the tenant's adapters must be signed, this one is not
    │   ├── SignatureInvalid       no trusted key vouches for the adapter
    │   ├── AdapterNotResident     the engine does not hold the digest
    │   └── AdapterPinned          the digest is in use and cannot be unloaded
    ├── OutOfRange
    │   └── RevisionCompacted      the asked-for history is gone; list again
    ├── ResourceExhausted          quota, slots or size
    ├── Unavailable                not now; retry after ``retry_after_s``
    ├── DeadlineExceeded
    ├── Cancelled
    ├── Unimplemented              the contract knows the call, this build does not answer it
    ├── DataLoss
    │   └── BlobCorrupt            a stored object no longer has its digest
    └── Internal                   a bug; the client sees an error id and nothing else

Domain code raises these and never sees gRPC; ``status.py`` maps them to codes, in both directions,
by one table. ``reason`` is the machine-readable part, a value of ``mint.v1.ErrorReason`` without its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "Aborted",
    "AdapterNotResident",
    "AdapterPinned",
    "AlreadyExists",
    "BaseModelMismatch",
    "BlobCorrupt",
    "BlobMissing",
    "Cancelled",
    "DataLoss",
    "DeadlineExceeded",
    "DigestMismatch",
    "EtagMismatch",
    "FailedPrecondition",
    "GateNotMet",
    "Internal",
    "InvalidArgument",
    "LeaseHeld",
    "LeaseLost",
    "MintError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "RequestIdReused",
    "ResourceExhausted",
    "RevisionCompacted",
    "SignatureInvalid",
    "SignatureRequired",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "WrongState",
]


class MintError(Exception):
    """Base of every error that may cross a service boundary.

    ``message`` is one sentence for a person: what was wrong, with which value, what to do.
    ``metadata`` are strings for a program (the resource name, the expected digest, ...).
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidArgument(MintError):
    """A field of the request is wrong; ``field`` names it by its path in the request."""

    reason: ClassVar[str] = "INVALID_FIELD"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, metadata=metadata, retry_after_s=retry_after_s)
        self.field = field


class DigestMismatch(InvalidArgument):
    """The bytes received do not have the digest that was announced for them."""

    reason: ClassVar[str] = "DIGEST_MISMATCH"


class Unauthenticated(MintError):
    """The caller could not be identified."""

    reason: ClassVar[str] = "UNAUTHENTICATED"


class PermissionDenied(MintError):
    """The caller is known and may not do this."""

    reason: ClassVar[str] = "PERMISSION_DENIED"


class NotFound(MintError):
    """The named resource does not exist."""

    reason: ClassVar[str] = "RESOURCE_NOT_FOUND"


class AlreadyExists(MintError):
    """A resource with that name exists."""

    reason: ClassVar[str] = "RESOURCE_EXISTS"


class RequestIdReused(AlreadyExists):
    """The request id was used before with another payload."""

    reason: ClassVar[str] = "REQUEST_ID_REUSED"


class Aborted(MintError):
    """The write lost a race and changed nothing; read again and retry."""

    reason: ClassVar[str] = "CONFLICT"


class EtagMismatch(Aborted):
    """The resource changed since the etag was read."""

    reason: ClassVar[str] = "ETAG_MISMATCH"


class FailedPrecondition(MintError):
    """The system is not in the state this call needs."""

    reason: ClassVar[str] = "PRECONDITION_FAILED"


class WrongState(FailedPrecondition):
    """The resource's state does not allow this call."""

    reason: ClassVar[str] = "WRONG_STATE"


class LeaseLost(FailedPrecondition):
    """The fence token was superseded: the holder must stop writing."""

    reason: ClassVar[str] = "LEASE_LOST"


class LeaseHeld(FailedPrecondition):
    """Another holder has the lease."""

    reason: ClassVar[str] = "LEASE_HELD"


class BlobMissing(FailedPrecondition):
    """The blob a revision would name is absent or not verified."""

    reason: ClassVar[str] = "BLOB_MISSING"


class BaseModelMismatch(FailedPrecondition):
    """Adapter, policy or service belong to different base models."""

    reason: ClassVar[str] = "BASE_MODEL_MISMATCH"


class GateNotMet(FailedPrecondition):
    """An evaluation that an alias's gate asks for is missing or falls short."""

    reason: ClassVar[str] = "GATE_NOT_MET"


class SignatureRequired(FailedPrecondition):
    """The tenant's adapters must be signed on this node, and this one is not."""

    reason: ClassVar[str] = "SIGNATURE_REQUIRED"


class SignatureInvalid(FailedPrecondition):
    """The adapter is signed, but not by a key that this node trusts for the tenant, or not this adapter."""

    reason: ClassVar[str] = "SIGNATURE_INVALID"


class AdapterNotResident(FailedPrecondition):
    """The engine does not hold the adapter; load it, then retry. Nothing was generated."""

    reason: ClassVar[str] = "ADAPTER_NOT_RESIDENT"


class AdapterPinned(FailedPrecondition):
    """The adapter is in use and cannot be unloaded."""

    reason: ClassVar[str] = "ADAPTER_PINNED"


class OutOfRange(MintError):
    """The asked-for position is outside what exists."""

    reason: ClassVar[str] = "OUT_OF_RANGE"


class RevisionCompacted(OutOfRange):
    """The catalog revision asked for was compacted away; list again and watch from there."""

    reason: ClassVar[str] = "REVISION_COMPACTED"


class ResourceExhausted(MintError):
    """A quota, slot count or size limit was reached."""

    reason: ClassVar[str] = "LIMIT_EXCEEDED"


class Unavailable(MintError):
    """Cannot be served now; the same call may succeed after ``retry_after_s``."""

    reason: ClassVar[str] = "TEMPORARILY_UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = 1.0,
    ) -> None:
        super().__init__(message, metadata=metadata, retry_after_s=retry_after_s)


class DeadlineExceeded(MintError):
    """The caller's deadline passed first."""

    reason: ClassVar[str] = "DEADLINE_EXCEEDED"


class Cancelled(MintError):
    """The caller, or an operator, cancelled the work."""

    reason: ClassVar[str] = "CANCELLED"


class Unimplemented(MintError):
    """The contract names this call; this build does not answer it yet."""

    reason: ClassVar[str] = "UNIMPLEMENTED"


class DataLoss(MintError):
    """Stored data is damaged."""

    reason: ClassVar[str] = "DATA_LOSS"


class BlobCorrupt(DataLoss):
    """A stored object does not have the digest it is named by."""

    reason: ClassVar[str] = "BLOB_CORRUPT"


class Internal(MintError):
    """A bug. The client sees ``error_id``; the log has the rest."""

    reason: ClassVar[str] = "INTERNAL"
