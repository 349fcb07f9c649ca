"""The codec of every kind of record. Servicers and store use the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from google.rpc import status_pb2

from mint_api.runtime.v1 import publish_service_pb2, work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    base_model_service_pb2,
    engine_replica_service_pb2,
    evaluation_service_pb2,
    fleet_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    rollout_service_pb2,
    run_service_pb2,
    tenant_service_pb2,
)
from mint_catalog.model.alias_answer import decode_alias_answer
from mint_catalog.model.codec import Codec
from mint_catalog.model.fleet_records import FleetOperation, FleetResult, TenantErasure
from mint_catalog.model.folding import fold_alias, fold_blob, fold_policy, fold_revision
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
from mint_catalog.model.tables import Codecs
from mint_catalog.storage.store import KeyValue
from mint_core.names import BaseModelName, BlobName, EngineReplicaName, PolicyName, RunName, TenantErasureName
from mint_core.status import error_from_status, to_status

__all__ = ["FleetResultCodec", "HolderCodec", "MessageCodecs"]


class HolderCodec:
    """A lease's key holds its holder and time to live; the fence is the key's create-revision."""

    def encode(self, record: Holder) -> bytes:
        message = work_service_pb2.Lease(holder=record.holder)
        message.ttl.FromSeconds(record.ttl_s)
        value: bytes = message.SerializeToString(deterministic=True)
        return value

    def decode(self, kv: KeyValue) -> Holder:
        message = work_service_pb2.Lease.FromString(kv.value)
        return Holder(message.holder, message.ttl.ToSeconds(), kv.create_revision, kv.lease)

    def to_message(self, resource: PolicyName | RunName, record: Holder) -> Any:
        """The public message."""
        message = work_service_pb2.Lease(resource=str(resource), holder=record.holder)
        message.fence.resource, message.fence.token = str(resource), record.token
        message.ttl.FromSeconds(record.ttl_s)
        return message


class FleetResultCodec:
    """A result's error is a status, with the details that a call would have been answered with."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def encode(self, record: FleetResult) -> bytes:
        message = self.to_message(record)
        message.ClearField("policy")
        value: bytes = message.SerializeToString(deterministic=True)
        return value

    def decode(self, kv: KeyValue) -> FleetResult:
        message = fleet_service_pb2.FleetResult.FromString(kv.value)
        error = error_from_status(message.status) if message.status.code else None
        return FleetResult(self._keys.fleet_policy(kv.key), error, message.revision_number)

    def to_message(self, record: FleetResult) -> Any:
        """The public message."""
        status = status_pb2.Status() if record.error is None else to_status(record.error)
        return fleet_service_pb2.FleetResult(
            policy=str(record.policy), status=status, revision_number=record.revision_number
        )


@dataclass(frozen=True, slots=True)
class MessageCodecs:
    """All codecs, typed with their conversions to messages."""

    alias: Codec[Alias]
    base_model: Codec[BaseModel]
    blob: Codec[BlobRecord]
    engine: Codec[EngineReplica]
    erasure: Codec[TenantErasure]
    evaluation: Codec[Evaluation]
    fleet_operation: Codec[FleetOperation]
    fleet_result: FleetResultCodec
    holder: HolderCodec
    policy: Codec[Policy]
    published: Codec[Published]
    revision: Codec[Revision]
    rollout: Codec[Rollout]
    run: Codec[Run]
    run_step: Codec[RunStep]

    @classmethod
    def over(cls, keys: Keys) -> MessageCodecs:
        """The codecs for one key layout."""

        def blob_name(key: bytes) -> BlobName:
            _, tenant, digest = keys.parts(key)
            return BlobName(tenant, f"sha256:{digest}")

        return cls(
            alias=Codec(Alias, alias_service_pb2.Alias, keys.alias_name, fold_alias),
            base_model=Codec(
                BaseModel, base_model_service_pb2.BaseModel, lambda key: BaseModelName(keys.parts(key)[-1])
            ),
            blob=Codec(BlobRecord, publish_service_pb2.BlobRecord, blob_name, fold_blob),
            engine=Codec(
                EngineReplica,
                engine_replica_service_pb2.EngineReplica,
                lambda key: EngineReplicaName(keys.parts(key)[-1]),
            ),
            erasure=Codec(
                TenantErasure,
                tenant_service_pb2.TenantErasure,
                lambda key: TenantErasureName(keys.parts(key)[-1]),
            ),
            evaluation=Codec(Evaluation, evaluation_service_pb2.Evaluation, keys.evaluation_name),
            fleet_operation=Codec(FleetOperation, fleet_service_pb2.FleetOperation, keys.fleet_operation_name),
            fleet_result=FleetResultCodec(keys),
            holder=HolderCodec(),
            policy=Codec(Policy, policy_service_pb2.Policy, keys.policy_name, fold_policy),
            published=Codec(Published, revision_service_pb2.Revision),
            revision=Codec(Revision, revision_service_pb2.Revision, keys.revision_name, fold_revision),
            rollout=Codec(Rollout, rollout_service_pb2.Rollout, keys.rollout_name),
            run=Codec(Run, run_service_pb2.Run, keys.run_name),
            run_step=Codec(RunStep, run_service_pb2.RunStep),
        )

    def for_store(self) -> Codecs:
        """The store's half of them."""
        return Codecs(
            alias=self.alias,
            alias_answer=partial(decode_alias_answer, alias_service_pb2.Alias),
            base_model=self.base_model,
            blob=self.blob,
            engine=self.engine,
            erasure=self.erasure,
            evaluation=self.evaluation,
            fleet_operation=self.fleet_operation,
            fleet_result=self.fleet_result,
            holder=self.holder,
            policy=self.policy,
            published=self.published,
            revision=self.revision,
            rollout=self.rollout,
            run=self.run,
            run_step=self.run_step,
        )
