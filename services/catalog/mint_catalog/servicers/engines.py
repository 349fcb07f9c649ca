"""EngineReplicaService and RegistryService."""

from __future__ import annotations

from typing import Any

from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.runtime.v1 import registry_service_pb2 as registry_pb
from mint_api.runtime.v1 import registry_service_pb2_grpc as registry_grpc
from mint_api.v1 import common_pb2
from mint_api.v1 import engine_replica_service_pb2 as pb
from mint_api.v1 import engine_replica_service_pb2_grpc as pb_grpc
from mint_catalog.model.checks import check_ttl
from mint_catalog.model.codec import enum_of, to_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.records import EngineReplicaState
from mint_catalog.serving.registry import DEFAULT_TTL_S, Registry
from mint_core.names import BaseModelName, EngineReplicaName

__all__ = ["EngineReplicaServicer", "RegistryServicer"]


class EngineReplicaServicer(pb_grpc.EngineReplicaServiceServicer):
    def __init__(self, registry: Registry, codecs: MessageCodecs) -> None:
        self._registry = registry
        self._codec = codecs.engine

    async def GetEngineReplica(self, request: pb.GetEngineReplicaRequest, _context: Any) -> Any:
        replica = await self._registry.get(EngineReplicaName.parse(request.name))
        return pb.GetEngineReplicaResponse(engine_replica=self._codec.to_message(replica))

    async def ListEngineReplicas(self, request: pb.ListEngineReplicasRequest, _context: Any) -> Any:
        base_model = BaseModelName.parse(request.base_model, field="base_model") if request.base_model else None
        replicas, revision = await self._registry.list(base_model)
        return pb.ListEngineReplicasResponse(
            engine_replicas=map(self._codec.to_message, replicas), catalog_revision=revision
        )


class RegistryServicer(registry_grpc.RegistryServiceServicer):
    def __init__(self, registry: Registry, codecs: MessageCodecs) -> None:
        self._registry = registry
        self._codec = codecs.engine

    async def RegisterEngineReplica(self, request: registry_pb.RegisterEngineReplicaRequest, _context: Any) -> Any:
        name = EngineReplicaName.parse(request.engine_replica.name, field="engine_replica.name")
        wanted = self._codec.from_message(request.engine_replica, name=name)
        ttl_s = check_ttl(request.ttl.seconds + request.ttl.nanos / 1e9, default_s=DEFAULT_TTL_S)
        token = await self._registry.register(wanted, request.holder, ttl_s)
        return registry_pb.RegisterEngineReplicaResponse(registration_token=token)

    async def RenewEngineReplica(self, request: registry_pb.RenewEngineReplicaRequest, _context: Any) -> Any:
        state = enum_of(request.state, EngineReplicaState)
        name = EngineReplicaName.parse(request.name)
        wanted = await self._registry.renew(name, request.registration_token, state, request.held_digests)
        return registry_pb.RenewEngineReplicaResponse(
            wanted_digests=wanted.digests,
            adapters_to_load=[
                loader_pb.AdapterRef(
                    tenant=each.tenant,
                    blob=to_message(each.blob, common_pb2.BlobRef),
                    object_key=each.object_key,
                    base_digest=each.base_digest,
                    signature=(
                        to_message(each.signature, common_pb2.AdapterSignature) if each.signature is not None else None
                    ),
                )
                for each in wanted.to_load
            ],
        )

    async def DeregisterEngineReplica(self, request: registry_pb.DeregisterEngineReplicaRequest, _context: Any) -> Any:
        await self._registry.deregister(EngineReplicaName.parse(request.name), request.registration_token)
        return registry_pb.DeregisterEngineReplicaResponse()
