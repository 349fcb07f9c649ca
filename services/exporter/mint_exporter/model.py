"""The words of this room, and what it asks of the catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mint_blobs import blob_prefix
from mint_core.errors import InvalidArgument
from mint_core.names import BlobName, PolicyName, RevisionName, RunName, check_digest
from mint_core.signing import Signature
from mint_lora import AdapterConfig

__all__ = [
    "BlobRecord",
    "Catalog",
    "Exported",
    "Fence",
    "ImportSource",
    "Limits",
    "Lineage",
    "PolicyBase",
    "Publication",
    "Published",
    "RevisionBlob",
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
        if not self.key.startswith((f"tenants/{tenant}/states/", blob_prefix(tenant))):
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
    recipe: str = ""
    """Name of the recipe the run followed."""

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
class ImportSource:
    """Where an adapter comes from: exactly one of weights, archive and object."""

    weights_digest: str = ""
    """Of an uploaded ``adapter_model.safetensors``."""
    adapter_config_json: str = ""
    """Text of ``adapter_config.json``; with an object, empty means the one beside it."""
    archive_digest: str = ""
    """Of an uploaded archive of a PEFT folder."""
    object_key: str = ""
    """Of weights or an archive in the object store, below ``tenants/{tenant}/imports/``."""
    object_digest: str = ""
    """Of that object; empty where the store has it recorded."""

    def check(self) -> None:
        """Raise :class:`InvalidArgument` unless exactly one source is named, with the configuration it needs."""
        given = [
            field
            for field, value in (
                ("weights", self.weights_digest),
                ("archive", self.archive_digest),
                ("object", self.object_key),
            )
            if value
        ]
        if len(given) != 1:
            raise InvalidArgument(
                f"{' and '.join(given) or 'nothing'} is given: name one of weights, archive and object", field="weights"
            )
        if self.archive_digest and self.adapter_config_json:
            raise InvalidArgument(
                "adapter_config_json is given beside an archive, which has its own: leave it out",
                field="adapter_config_json",
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one exporter."""

    max_adapter_bytes: int
    max_rank: int
    max_exports: int
    """Exports worked on at one time."""
    max_archive_bytes: int = 8 << 30
    """Largest archive that is opened."""


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
class RevisionBlob:
    """Where the bytes of a published revision are."""

    name: RevisionName
    digest: str
    size_bytes: int
    object_key: str


@dataclass(frozen=True, slots=True)
class Publication:
    """A revision to be."""

    blob: BlobName
    size_bytes: int
    num_tensors: int
    config: AdapterConfig
    """As in the packed blob."""
    lineage: Lineage
    signature: Signature | None = None


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

    async def architecture(self, base_model: str) -> str:
        """The class of a base in transformers, by its id; empty where the catalog was not told. Raises ``NotFound``."""
        ...

    async def revision_blob(self, name: RevisionName) -> RevisionBlob:
        """The blob of a revision. Raises ``NotFound``."""
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
