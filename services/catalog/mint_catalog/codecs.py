"""The codec of every kind of record. Servicers and store use the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mint_api.runtime.v1 import publish_service_pb2, work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    base_model_service_pb2,
    engine_replica_service_pb2,
    evaluation_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    rollout_service_pb2,
    run_service_pb2,
)
from mint_catalog.codec import Codec
from mint_catalog.keys import Keys
from mint_catalog.records import (
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
from mint_catalog.run_records import Run, RunStep
from mint_catalog.store import KeyValue
from mint_catalog.tables import Codecs
from mint_core.names import BaseModelName, BlobName, EngineReplicaName, PolicyName, RunName

__all__ = ["HolderCodec", "MessageCodecs"]


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


@dataclass(frozen=True, slots=True)
class MessageCodecs:
    """All codecs, typed with their conversions to messages."""

    alias: Codec[Alias]
    base_model: Codec[BaseModel]
    blob: Codec[BlobRecord]
    engine: Codec[EngineReplica]
    evaluation: Codec[Evaluation]
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
            alias=Codec(Alias, alias_service_pb2.Alias, keys.alias_name),
            base_model=Codec(
                BaseModel, base_model_service_pb2.BaseModel, lambda key: BaseModelName(keys.parts(key)[-1])
            ),
            blob=Codec(BlobRecord, publish_service_pb2.BlobRecord, blob_name),
            engine=Codec(
                EngineReplica,
                engine_replica_service_pb2.EngineReplica,
                lambda key: EngineReplicaName(keys.parts(key)[-1]),
            ),
            evaluation=Codec(Evaluation, evaluation_service_pb2.Evaluation, keys.evaluation_name),
            holder=HolderCodec(),
            policy=Codec(Policy, policy_service_pb2.Policy, keys.policy_name),
            published=Codec(Published, revision_service_pb2.Revision),
            revision=Codec(Revision, revision_service_pb2.Revision, keys.revision_name),
            rollout=Codec(Rollout, rollout_service_pb2.Rollout, keys.rollout_name),
            run=Codec(Run, run_service_pb2.Run, keys.run_name),
            run_step=Codec(RunStep, run_service_pb2.RunStep),
        )

    def for_store(self) -> Codecs:
        """The store's half of them."""
        return Codecs(
            alias=self.alias,
            base_model=self.base_model,
            blob=self.blob,
            engine=self.engine,
            evaluation=self.evaluation,
            holder=self.holder,
            policy=self.policy,
            published=self.published,
            revision=self.revision,
            rollout=self.rollout,
            run=self.run,
            run_step=self.run_step,
        )
