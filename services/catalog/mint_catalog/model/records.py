"""The catalog's records: frozen dataclasses with the field names of the public messages.

Two fields differ from the wire: ``name`` is a parsed name, and ``mod_revision``, the revision of etcd that last wrote
the record, stands for the ``etag``. A record read from the store always has it; 0 means "not stored yet".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum

from mint_core.errors import EtagMismatch, InvalidArgument
from mint_core.names import (
    AliasName,
    BaseModelName,
    BlobName,
    EngineReplicaName,
    EvaluationName,
    PolicyName,
    RevisionName,
    RolloutName,
)

__all__ = [
    "AdapterSignature",
    "Alias",
    "AliasHistoryEntry",
    "AliasSplit",
    "AliasTarget",
    "Attribution",
    "BaseModel",
    "BlobRecord",
    "BlobRef",
    "BlobState",
    "Canary",
    "EngineReplica",
    "EngineReplicaState",
    "Evaluation",
    "Fence",
    "Gate",
    "GateCondition",
    "Holder",
    "Lineage",
    "LoraConfig",
    "Numerics",
    "Policy",
    "PolicyQuota",
    "PolicyState",
    "Published",
    "Resolution",
    "Revision",
    "RevisionState",
    "Rollout",
    "SplitSide",
    "TrainingState",
    "check_etag",
    "etag_of",
    "now",
]


def now() -> datetime:
    """The wall clock, for timestamps that people read; nothing is ordered by it."""
    return datetime.now(UTC)


def etag_of(mod_revision: int) -> str:
    """The etag of a record; empty for one that is not stored."""
    return str(mod_revision) if mod_revision else ""


def check_etag(etag: str, mod_revision: int, *, resource: object) -> None:
    """Raise :class:`EtagMismatch` unless ``etag`` is empty or names the present version."""
    if not etag:
        return
    if not etag.isascii() or not etag.isdigit():
        raise InvalidArgument(f"etag is {etag[:40]!r}: pass one that was read from the resource", field="etag")
    if int(etag) != mod_revision:
        raise EtagMismatch(
            f"{resource} changed since etag {etag} was read, it is at {mod_revision} now; read it again and retry",
            metadata={"resource": str(resource), "etag": etag_of(mod_revision)},
        )


class PolicyState(IntEnum):
    UNSPECIFIED = 0
    ACTIVE = 1
    PAUSED = 2
    DELETED = 3


class RevisionState(IntEnum):
    UNSPECIFIED = 0
    READY = 1
    RETIRED = 2
    DELETED = 3


class BlobState(IntEnum):
    UNSPECIFIED = 0
    STAGED = 1
    VERIFIED = 2
    CONDEMNED = 3


class EngineReplicaState(IntEnum):
    UNSPECIFIED = 0
    READY = 1
    DRAINING = 2
    SICK = 3


@dataclass(frozen=True, slots=True)
class LoraConfig:
    rank: int = 0
    alpha: float = 0.0
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False
    dropout: float = 0.0
    init_seed: int = 0


@dataclass(frozen=True, slots=True)
class Numerics:
    base_digest: str = ""
    dtype: str = ""
    quantization: str = ""
    engine_version: str = ""


@dataclass(frozen=True, slots=True)
class BlobRef:
    digest: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TrainingState:
    run: str = ""
    step: int = 0
    fence: int = 0
    weights_key: str = ""
    weights: BlobRef | None = None
    optimizer_key: str = ""
    optimizer: BlobRef | None = None
    save_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Fence:
    resource: str = ""
    token: int = 0


@dataclass(frozen=True, slots=True)
class Attribution:
    principal: str = ""
    time: datetime | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BaseModel:
    name: BaseModelName
    digest: str = ""
    size_bytes: int = 0
    architecture: str = ""
    num_parameters: int = 0
    create_time: datetime | None = None
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class PolicyQuota:
    """Bounds of one policy; 0 means none."""

    max_revisions: int = 0
    max_open_runs: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """The head of a policy record."""

    name: PolicyName
    uid: str = ""
    base_model: str = ""
    base_digest: str = ""
    lora: LoraConfig | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    description: str = ""
    state: PolicyState = PolicyState.UNSPECIFIED
    latest_training_state: TrainingState | None = None
    next_revision_number: int = 0
    create_time: datetime | None = None
    update_time: datetime | None = None
    delete_time: datetime | None = None
    quota: PolicyQuota | None = None
    undelete_state: PolicyState = PolicyState.UNSPECIFIED
    """What an undelete brings back; set while deleted."""
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Lineage:
    parent_revision: str = ""
    run: str = ""
    step: int = 0
    data_digest: str = ""
    code_version: str = ""
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class AdapterSignature:
    """Who vouches for an adapter. The catalog keeps it and never judges it: nodes do, with keys of their own."""

    key_id: str = ""
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Revision:
    name: RevisionName
    number: int = 0
    policy_uid: str = ""
    blob: BlobRef | None = None
    base_digest: str = ""
    lora: LoraConfig | None = None
    num_tensors: int = 0
    layout: str = ""
    lineage: Lineage | None = None
    state: RevisionState = RevisionState.UNSPECIFIED
    publish_time: datetime | None = None
    object_key: str = ""
    signature: AdapterSignature | None = None
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class AliasTarget:
    revision_number: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Canary:
    target: AliasTarget | None = None
    weight: float = 0.0
    salt: str = ""


@dataclass(frozen=True, slots=True)
class GateCondition:
    scorer: str = ""
    metric: str = ""
    data_digest: str = ""
    min_value: float | None = None
    max_regression: float | None = None
    min_examples: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    conditions: tuple[GateCondition, ...] = ()


@dataclass(frozen=True, slots=True)
class AliasHistoryEntry:
    target: AliasTarget | None = None
    attribution: Attribution | None = None
    rolled_back_canary: bool = False


@dataclass(frozen=True, slots=True)
class SplitSide:
    """A resolution without what belongs to one answer."""

    revision: str = ""
    blob: BlobRef | None = None
    object_key: str = ""
    base_model: str = ""
    base_digest: str = ""
    signature: AdapterSignature | None = None


@dataclass(frozen=True, slots=True)
class AliasSplit:
    weight: float = 0.0
    salt: str = ""
    active: SplitSide | None = None
    canary: SplitSide | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    revision: str = ""
    blob: BlobRef | None = None
    object_key: str = ""
    base_model: str = ""
    base_digest: str = ""
    canary: bool = False
    stale: bool = False
    catalog_revision: int = 0
    split: AliasSplit | None = None
    """Only in answers, never stored."""
    signature: AdapterSignature | None = None

    def at(self, revision: int) -> Resolution:
        """The same as the answer of a catalog revision. (Written out: ``replace`` takes ten times as long.)"""
        return Resolution(
            self.revision,
            self.blob,
            self.object_key,
            self.base_model,
            self.base_digest,
            self.canary,
            self.stale,
            revision,
            self.split,
            self.signature,
        )


@dataclass(frozen=True, slots=True)
class Alias:
    name: AliasName
    active: AliasTarget | None = None
    history: tuple[AliasHistoryEntry, ...] = ()
    policy_uid: str = ""
    update_time: datetime | None = None
    resolution: Resolution | None = None
    canary: Canary | None = None
    canary_resolution: Resolution | None = None
    gate: Gate | None = None
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class BlobRecord:
    name: BlobName
    blob: BlobRef | None = None
    object_key: str = ""
    state: BlobState = BlobState.UNSPECIFIED
    update_time: datetime | None = None
    """Its age counts from here; None in a record that was written before there was garbage collection."""
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """What (policy, run, step) was published as."""

    number: int = 0
    blob: BlobRef | None = None
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """The value of a lease's key: who holds it. The key's create-revision is the fence token."""

    holder: str = ""
    ttl_s: int = 0
    token: int = 0
    lease: int = 0
    """etcd's id of the lease that the key is bound to."""


@dataclass(frozen=True, slots=True)
class EngineReplica:
    name: EngineReplicaName
    address: str = ""
    base_model: str = ""
    numerics: Numerics | None = None
    max_loaded_adapters: int = 0
    num_slots: int = 0
    max_lora_rank: int = 0
    context_length: int = 0
    state: EngineReplicaState = EngineReplicaState.UNSPECIFIED
    register_time: datetime | None = None
    loader_address: str = ""
    max_running_requests: int = 0
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    name: EvaluationName
    revision: str = ""
    revision_digest: str = ""
    scorer: str = ""
    data_digest: str = ""
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    run: str = ""
    create_time: datetime | None = None
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    name: RolloutName
    revision: str = ""
    revision_digest: str = ""
    run: str = ""
    step: int = 0
    object_key: str = ""
    blob: BlobRef | None = None
    numerics: Numerics | None = None
    num_samples: int = 0
    reward_mean: float = 0.0
    create_time: datetime | None = None
    expire_time: datetime | None = None
    num_tokens: int = 0
    num_unscored: int = 0
    mod_revision: int = 0
