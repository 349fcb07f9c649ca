"""What the loader speaks of, and what it needs from others."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mint_blobs.keys import blob_prefix
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, TenantName, check_digest
from mint_core.signing import Signature

__all__ = [
    "AdapterRef",
    "AdapterWriter",
    "BlobSource",
    "Engine",
    "EngineLoad",
    "Loaded",
    "PinnedTargets",
    "Resident",
    "SignatureCheck",
    "Tier",
]


class Tier(enum.IntEnum):
    """Where an adapter can be, coldest first; the numbers are those of the contract."""

    STORE = 1
    DISK = 2
    HOST = 3
    SLOT = 4


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Everything needed to load one adapter, so that the loader asks nobody."""

    tenant: str
    """Id of the tenant whose copy of the blob is read."""
    digest: str
    size_bytes: int
    """Length of the blob."""
    object_key: str
    base_digest: str
    """Digest of the base model it fits."""
    signature: Signature | None = None
    """Who vouches for it."""

    @classmethod
    def checked(
        cls,
        *,
        tenant: str,
        digest: str,
        size_bytes: int,
        object_key: str,
        base_digest: str,
        signature: Signature | None = None,
    ) -> AdapterRef:
        """A reference out of a request; ``tenant`` is a resource name. Raises :class:`InvalidArgument` naming the
        field.
        """
        tenant_id = TenantName.parse(tenant, field="adapter.tenant").tenant
        check_digest(digest, field="adapter.blob.digest")
        check_digest(base_digest, field="adapter.base_digest")
        if size_bytes <= 0:
            raise InvalidArgument(
                f"adapter.blob.size_bytes is {size_bytes}; send the blob's length as the catalog knows it",
                field="adapter.blob.size_bytes",
            )
        # No key outside of the tenant's own blobs is ever read, whatever the caller believes.
        prefix = blob_prefix(tenant_id, digest)
        if not object_key.startswith(prefix) or len(object_key) == len(prefix):
            raise InvalidArgument(
                f"adapter.object_key is {object_key[:160]!r}; the blob's copies of this tenant lie below {prefix}",
                field="adapter.object_key",
            )
        return cls(tenant_id, digest, size_bytes, object_key, base_digest, signature)


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load went."""

    found_at: Tier
    """The nearest tier that held the adapter before."""
    fetch_ms: float = 0.0
    load_ms: float = 0.0
    bytes_fetched: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine said of a load."""

    already_resident: bool
    load_ms: float


@dataclass(frozen=True, slots=True)
class Resident:
    """What the engine holds."""

    base_digest: str
    digests: frozenset[str]
    to_load: tuple[AdapterRef, ...] = ()
    """What somebody waits for to be held by this engine."""
    pinned: frozenset[str] = frozenset()
    """Those it never evicts."""


class Engine(Protocol):
    """The engine of this node, as far as the loader needs it. Raises the errors of ``EngineService``."""

    async def load(self, digest: str, folder: str, *, into_slot: bool, pinned: bool, timeout_s: float) -> EngineLoad:
        """Load from ``folder``, a name below the shared adapter folder; never evict it again if ``pinned``."""
        ...

    async def unpin(self, digest: str, *, timeout_s: float) -> None:
        """Let the engine evict an adapter again; one it does not hold is none of its business."""
        ...

    async def resident(self, *, timeout_s: float) -> Resident:
        """What it holds now."""
        ...


class BlobSource(Protocol):
    """The reading half of :class:`mint_blobs.ObjectStore`."""

    async def get_file(
        self, key: str, path: Path, *, digest: str, size_bytes: int | None = None, durable: bool = True
    ) -> None: ...


class AdapterWriter(Protocol):
    """Turns a fetched blob into what an engine can load; blocks while it reads and writes."""

    def __call__(self, blob: Path, folder: Path, *, base_digest: str) -> None:
        """Check ``blob`` and complete ``folder`` with a serving folder's files.

        Raises :class:`InvalidArgument` if it is no valid adapter, :class:`BaseModelMismatch` if it fits another base.
        """
        ...


class SignatureCheck(Protocol):
    """:meth:`mint_core.signing.TrustedKeys.check`."""

    def __call__(self, tenant: str, digest: str, base_digest: str, signature: Signature | None) -> None:
        """Raises :class:`SignatureRequired` or :class:`SignatureInvalid`."""
        ...


class PinnedTargets(Protocol):
    """The catalog, as far as pins need it."""

    async def targets(self, alias: AliasName) -> tuple[AdapterRef, ...]:
        """What an alias can answer with: its active revision's adapter and its canary's. Raises
        :class:`NotFound`."""
        ...
