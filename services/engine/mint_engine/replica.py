"""How this replica describes itself, to the catalog and to whoever asks for its residency."""

from __future__ import annotations

from dataclasses import dataclass, field

from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.v1 import common_pb2
from mint_api.v1 import engine_replica_service_pb2 as pb
from mint_engine.host import EngineHost, HostState

__all__ = ["STATES", "Replica"]

STATES = {
    HostState.READY: pb.ENGINE_REPLICA_STATE_READY,
    HostState.DRAINING: pb.ENGINE_REPLICA_STATE_DRAINING,
    HostState.SICK: pb.ENGINE_REPLICA_STATE_SICK,
}
"""States on the wire."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One host and the names it goes by."""

    host: EngineHost
    name: str
    """engineReplicas/{engine_replica}"""
    address: str
    """Where others reach its runtime endpoint."""
    base_model: str
    """baseModels/{base_model}"""
    base_digest: str
    loader_address: str
    max_running_requests: int = 0
    """Requests in one of its batches; 0 is not known."""
    to_load: list[loader_pb.AdapterRef] = field(default_factory=list)
    """What the node's loader should load, as the catalog last said; the registration keeps it."""

    @property
    def state(self) -> pb.EngineReplicaState.ValueType:
        return STATES[self.host.state]

    def describe(self) -> pb.EngineReplica:
        """The replica as it is now."""
        limits, numerics = self.host.engine.limits, self.host.engine.numerics
        return pb.EngineReplica(
            name=self.name,
            address=self.address,
            base_model=self.base_model,
            numerics=common_pb2.Numerics(
                base_digest=self.base_digest,
                dtype=numerics.dtype,
                quantization=numerics.quantization,
                engine_version=f"{numerics.engine} {numerics.engine_version}",
            ),
            max_loaded_adapters=limits.max_loaded_adapters,
            num_slots=limits.num_slots,
            max_lora_rank=limits.max_lora_rank,
            context_length=limits.max_total_tokens,
            state=self.state,
            loader_address=self.loader_address,
            max_running_requests=self.max_running_requests,
        )
