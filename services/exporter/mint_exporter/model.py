"""The words of this room, and what it asks of the catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mint_core.errors import InvalidArgument
from mint_core.names import BlobName, PolicyName, RunName, check_digest
from mint_lora import AdapterConfig

__all__ = [
    "BlobRecord",
    "Catalog",
    "Exported",
    "Fence",
    "Lineage",
    "PolicyBase",
    "Publication",
    "Published",
    "SavedWeights",
    "Timings",
]


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of a policy's training lease."""

    resource: str
    token: int


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """The weights object of a training state."""

    key: str
    digest: str
    size_bytes: int

    def check(self, tenant: str) -> None:
        """Raise :class:`InvalidArgument` unless this can be a state of ``tenant``."""
        field = "training_state.weights"
        # Keys are believed only under the caller's own tenant: the store itself knows no tenants.
        if not self.key.startswith(f"tenants/{tenant}/states/"):
            raise InvalidArgument(
                f"{field}_key is {self.key[:120]!r}: expected the key of a training state of tenant {tenant}",
                field=f"{field}_key",
            )
        check_digest(self.digest, field=f"{field}.digest")
        if self.size_bytes <= 0:
            raise InvalidArgument(
                f"{field}.size_bytes is {self.size_bytes}: must be positive", field=f"{field}.size_bytes"
            )


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a revision comes from; ``run`` and ``step`` also make its publication unique."""

    run: str = ""
    """Name of the run, or empty for a session driven by hand and for imports."""
    step: int = 0
    parent_revision: str = ""
    data_digest: str = ""
    code_version: str = ""

    def check(self, tenant: str) -> None:
        """Raise :class:`InvalidArgument` unless the run, if any, belongs to ``tenant``."""
        if self.run and RunName.parse(self.run, field="training_state.run").tenant != tenant:
            raise InvalidArgument(
                f"training_state.run is {self.run[:120]!r}: expected a run of tenant {tenant}",
                field="training_state.run",
            )
        if self.step < 0:
            raise InvalidArgument(
                f"training_state.step is {self.step}: must not be negative", field="training_state.step"
            )


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """What the catalog knows of stored bytes."""

    name: BlobName
    size_bytes: int
    object_key: str
    is_verified: bool


@dataclass(frozen=True, slots=True)
class PolicyBase:
    """The base model of a policy."""

    base_model: str
    """Id of the base model."""
    base_digest: str


@dataclass(frozen=True, slots=True)
class Publication:
    """A revision to be."""

    blob: BlobName
    size_bytes: int
    num_tensors: int
    config: AdapterConfig
    """As in the packed blob."""
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class Published:
    """The catalog's answer."""

    revision: Any
    """The revision as the catalog stored it, to be handed on unread."""
    catalog_revision: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of an export went."""

    fetch_ms: float = 0.0
    pack_ms: float = 0.0
    upload_ms: float = 0.0
    publish_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished export."""

    published: Published
    timings: Timings


class Catalog(Protocol):
    """What the exporter asks of the catalog; errors are those of ``mint.runtime.v1.PublishService``."""

    async def policy_base(self, policy: PolicyName) -> PolicyBase:
        """The base of a policy. Raises ``NotFound``."""
        ...

    async def holds(self, policy: PolicyName, fence: Fence) -> bool:
        """Whether ``fence`` is the policy's present one."""
        ...

    async def get_blob(self, name: BlobName) -> BlobRecord | None:
        """The record, or None where the catalog has none."""
        ...

    async def stage_blob(self, name: BlobName, size_bytes: int) -> BlobRecord:
        """Give out an object key, or the verified record there is. Raises ``DigestMismatch``."""
        ...

    async def verify_blob(self, name: BlobName, object_key: str) -> BlobRecord:
        """Mark bytes as verified. Raises ``Aborted`` when they were staged anew elsewhere."""
        ...

    async def publish(
        self, policy: PolicyName, publication: Publication, fence: Fence | None, request_id: str
    ) -> Published:
        """Publish; without a fence only where nobody trains. Raises ``LeaseLost``, ``BlobMissing`` and others."""
        ...
