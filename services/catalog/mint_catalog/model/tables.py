"""What lies under which key: a reference ties a key to the codec of its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mint_catalog.model.fleet_records import FleetOperation, FleetResult, TenantErasure
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import (
    Alias,
    BaseModel,
    BlobRecord,
    EngineReplica,
    Evaluation,
    Holder,
    Policy,
    Published,
    Revision,
    Rollout,
)
from mint_catalog.model.run_records import Run, RunStep
from mint_catalog.storage.store import KeyValue
from mint_core.names import (
    AliasName,
    BaseModelName,
    BlobName,
    EngineReplicaName,
    EvaluationName,
    FleetOperationName,
    PolicyName,
    RevisionName,
    RolloutName,
    RunName,
)

__all__ = ["Codecs", "RecordCodec", "Ref", "Tables"]

R = TypeVar("R")


class RecordCodec(Protocol[R]):
    """Converts one kind of record to and from its stored bytes."""

    def encode(self, record: R) -> bytes:
        """The value; what the key tells is left out."""
        ...

    def decode(self, kv: KeyValue) -> R:
        """The record, with its name from the key and its mod_revision."""
        ...


@dataclass(frozen=True)
class Ref(Generic[R]):
    """One record's place."""

    key: bytes
    codec: RecordCodec[R]


@dataclass(frozen=True, slots=True)
class Codecs:
    """The codec of every kind of record."""

    alias: RecordCodec[Alias]
    alias_answer: Callable[[bytes, AliasName], Alias]
    """Decodes an alias's value as far as resolving it takes: without its moves and its gate."""

    base_model: RecordCodec[BaseModel]
    blob: RecordCodec[BlobRecord]
    engine: RecordCodec[EngineReplica]
    erasure: RecordCodec[TenantErasure]
    evaluation: RecordCodec[Evaluation]
    fleet_operation: RecordCodec[FleetOperation]
    fleet_result: RecordCodec[FleetResult]
    holder: RecordCodec[Holder]
    policy: RecordCodec[Policy]
    published: RecordCodec[Published]
    revision: RecordCodec[Revision]
    rollout: RecordCodec[Rollout]
    run: RecordCodec[Run]
    run_step: RecordCodec[RunStep]


class _BytesCodec:
    """Keys that hold no record."""

    def encode(self, record: bytes) -> bytes:
        return record

    def decode(self, kv: KeyValue) -> bytes:
        return kv.value


_BYTES = _BytesCodec()


class Tables:
    """References to every kind of record."""

    def __init__(self, keys: Keys, codecs: Codecs) -> None:
        self.keys = keys
        self.codecs = codecs

    def alias(self, name: AliasName) -> Ref[Alias]:
        return Ref(self.keys.alias(name), self.codecs.alias)

    def base_model(self, name: BaseModelName) -> Ref[BaseModel]:
        return Ref(self.keys.base_model(name), self.codecs.base_model)

    def blob(self, name: BlobName) -> Ref[BlobRecord]:
        return Ref(self.keys.blob(name), self.codecs.blob)

    def engine(self, name: EngineReplicaName) -> Ref[EngineReplica]:
        return Ref(self.keys.engine(name), self.codecs.engine)

    def engine_holder(self, name: EngineReplicaName) -> Ref[Holder]:
        return Ref(self.keys.engine_holder(name), self.codecs.holder)

    def evaluation(self, name: EvaluationName, uid: str) -> Ref[Evaluation]:
        return Ref(self.keys.evaluation(name, uid), self.codecs.evaluation)

    def erasure(self, tenant: str) -> Ref[TenantErasure]:
        return Ref(self.keys.erasure(tenant), self.codecs.erasure)

    def fleet_operation(self, name: FleetOperationName) -> Ref[FleetOperation]:
        return Ref(self.keys.fleet_operation(name), self.codecs.fleet_operation)

    def fleet_result(self, name: FleetOperationName, policy: str) -> Ref[FleetResult]:
        return Ref(self.keys.fleet_result(name, policy), self.codecs.fleet_result)

    def grave(self, name: AliasName, uid: str) -> Ref[Alias]:
        return Ref(self.keys.grave(name, uid), self.codecs.alias)

    def lease(self, resource: PolicyName | RunName) -> Ref[Holder]:
        return Ref(self.keys.lease(resource), self.codecs.holder)

    def policy(self, name: PolicyName) -> Ref[Policy]:
        return Ref(self.keys.policy(name), self.codecs.policy)

    def published(self, policy: PolicyName, run: str, step: int) -> Ref[Published]:
        return Ref(self.keys.published(policy, run, step), self.codecs.published)

    def revision(self, name: RevisionName) -> Ref[Revision]:
        return Ref(self.keys.revision(name), self.codecs.revision)

    def rollout(self, name: RolloutName, uid: str) -> Ref[Rollout]:
        return Ref(self.keys.rollout(name, uid), self.codecs.rollout)

    def run(self, name: RunName) -> Ref[Run]:
        return Ref(self.keys.run(name), self.codecs.run)

    def run_step(self, run: RunName, step: int) -> Ref[RunStep]:
        return Ref(self.keys.run_step(run, step), self.codecs.run_step)

    def claim(self, run: RunName) -> Ref[bytes]:
        return Ref(self.keys.claim(run), _BYTES)

    def raw(self, key: bytes) -> Ref[bytes]:
        """A key that holds no record."""
        return Ref(key, _BYTES)
