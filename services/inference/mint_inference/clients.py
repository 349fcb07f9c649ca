"""The catalog, the engines and the loaders behind the Protocols of this room."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc

from mint_api.runtime.v1 import engine_service_pb2 as engine_pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as engine_grpc
from mint_api.runtime.v1 import loader_service_pb2 as loader_pb
from mint_api.runtime.v1 import loader_service_pb2_grpc as loader_grpc
from mint_api.runtime.v1 import usage_report_service_pb2 as usage_pb
from mint_api.runtime.v1 import usage_report_service_pb2_grpc as usage_grpc
from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import alias_service_pb2_grpc as alias_grpc
from mint_api.v1 import base_model_service_pb2 as base_pb
from mint_api.v1 import base_model_service_pb2_grpc as base_grpc
from mint_api.v1 import common_pb2
from mint_api.v1 import engine_replica_service_pb2 as replica_pb
from mint_api.v1 import engine_replica_service_pb2_grpc as replica_grpc
from mint_api.v1 import inference_service_pb2 as pb
from mint_core.channel import call, connect, stream
from mint_core.errors import Unavailable
from mint_core.names import AliasName, BaseModelName, RevisionName
from mint_core.signing import Signature
from mint_inference.model import (
    AliasWord,
    Call,
    Chunk,
    Consistency,
    Replica,
    ReplicaState,
    Residency,
    Resolution,
    Scored,
    Split,
    Started,
)
from mint_inference.usage import UsageCount

__all__ = ["CatalogClient", "Channels", "EngineClients", "LoaderClients", "UsageClient"]

_STATES = {
    replica_pb.ENGINE_REPLICA_STATE_READY: ReplicaState.READY,
    replica_pb.ENGINE_REPLICA_STATE_DRAINING: ReplicaState.DRAINING,
    replica_pb.ENGINE_REPLICA_STATE_SICK: ReplicaState.SICK,
}


class Channels:
    """Open channels by address; the least recently used idle ones are closed beyond ``max_idle``."""

    def __init__(self, *, max_message_bytes: int, max_idle: int = 64, retry: bool = True) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_idle = max_idle
        self._retry = retry
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._num_users: dict[str, int] = {}

    @contextlib.contextmanager
    def using(self, address: str) -> Iterator[grpc.aio.Channel]:
        """The channel to ``address``, kept open inside the block."""
        channel = self._channels.get(address)
        if channel is None:
            channel = connect(address, max_message_bytes=self._max_message_bytes, retry=self._retry)
            self._channels[address] = channel
        self._channels.move_to_end(address)
        self._num_users[address] = self._num_users.get(address, 0) + 1
        try:
            yield channel
        finally:
            self._num_users[address] -= 1

    async def trim(self) -> None:
        """Close idle channels of addresses that were not used for long: engines come and go on new ports."""
        idle = [address for address in self._channels if not self._num_users.get(address)]
        for address in idle[: max(0, len(idle) - self._max_idle)]:
            self._num_users.pop(address, None)
            await self._channels.pop(address).close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class CatalogClient:
    """A :class:`~mint_inference.model.Catalog` over its channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._aliases = alias_grpc.AliasServiceStub(channel)
        self._replicas = replica_grpc.EngineReplicaServiceStub(channel)
        self._base_models = base_grpc.BaseModelServiceStub(channel)

    async def resolve(
        self, name: AliasName | RevisionName, consistency: Consistency, *, timeout_s: float
    ) -> Resolution:
        request = alias_pb.ResolveRequest(name=str(name), consistency=_encode_consistency(consistency))
        response: alias_pb.ResolveResponse = await call(self._aliases.Resolve, request, timeout_s=timeout_s)
        return _decode_resolution(response.resolution, response.resolution.catalog_revision)

    async def watch_aliases(self, *, after: int) -> AsyncGenerator[AliasWord, None]:
        request = alias_pb.WatchAliasesRequest(parent="tenants/-", start_after_catalog_revision=after)
        responses = stream(self._aliases.WatchAliases, request, timeout_s=None)
        async with contextlib.aclosing(cast("AsyncGenerator[alias_pb.WatchAliasesResponse, None]", responses)) as each:
            async for response in each:
                yield _decode_word(response)

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]:
        request = replica_pb.ListEngineReplicasRequest()
        response: replica_pb.ListEngineReplicasResponse = await call(
            self._replicas.ListEngineReplicas, request, timeout_s=timeout_s
        )
        return [_decode_replica(replica) for replica in response.engine_replicas]

    async def base_digest(self, name: BaseModelName, *, timeout_s: float) -> str:
        response: base_pb.GetBaseModelResponse = await call(
            self._base_models.GetBaseModel, base_pb.GetBaseModelRequest(name=str(name)), timeout_s=timeout_s
        )
        return response.base_model.digest


class EngineClients:
    """:class:`~mint_inference.model.Engines` over their channels. Prompts, parameters and chunks pass as they are."""

    def __init__(self, channels: Channels, *, timeout_s: float) -> None:
        self._channels = channels
        self._timeout_s = timeout_s

    async def generate(self, replica: Replica, asked: Call, digest: str) -> AsyncGenerator[Started | Chunk, None]:
        request = engine_pb.GenerateRequest(
            digest=digest,
            base=not digest,
            tenant=asked.tenant,
            prompt=cast("pb.Prompt", asked.prompt),
            sampling=cast("pb.SamplingParams", asked.sampling),
            return_logprobs=asked.return_logprobs,
            return_routed_experts=asked.return_routed_experts,
        )
        with self._channels.using(replica.address) as channel:
            method = engine_grpc.EngineServiceStub(channel).Generate
            responses = stream(method, request, timeout_s=self._timeout_s)
            async with contextlib.aclosing(cast("AsyncGenerator[engine_pb.GenerateResponse, None]", responses)) as each:
                async for response in each:
                    if response.WhichOneof("content") == "started":
                        yield Started(response.started.prompt_token_ids, response.started.num_running)
                    else:
                        yield response.chunk

    async def score(self, replica: Replica, asked: Call, digest: str) -> Scored:
        request = engine_pb.ScoreRequest(
            digest=digest, base=not digest, tenant=asked.tenant, prompt=cast("pb.Prompt", asked.prompt)
        )
        with self._channels.using(replica.address) as channel:
            method = engine_grpc.EngineServiceStub(channel).Score
            response: engine_pb.ScoreResponse = await call(method, request, timeout_s=self._timeout_s)
        return Scored(response.token_ids, response.logprobs)

    async def residency(self, replica: Replica, *, timeout_s: float) -> Residency:
        with self._channels.using(replica.address) as channel:
            method = engine_grpc.EngineServiceStub(channel).GetResidency
            response: engine_pb.GetResidencyResponse = await call(
                method, engine_pb.GetResidencyRequest(), timeout_s=timeout_s
            )
        return Residency(frozenset(adapter.digest for adapter in response.adapters), response.num_running)


class LoaderClients:
    """:class:`~mint_inference.model.Loaders` over their channels."""

    def __init__(self, channels: Channels, *, timeout_s: float, priority: int) -> None:
        self._channels = channels
        self._timeout_s = timeout_s
        self._priority = priority

    async def ensure(self, replica: Replica, tenant: str, resolution: Resolution) -> bool:
        if not replica.loader_address:
            raise Unavailable(
                f"{replica.name} lacks adapter {resolution.digest} and has no loader beside it; start one and name "
                "it in the engine's loader_address"
            )
        signature = resolution.signature
        request = loader_pb.EnsureLoadedRequest(
            adapter=loader_pb.AdapterRef(
                tenant=tenant,
                blob=common_pb2.BlobRef(digest=resolution.digest, size_bytes=resolution.size_bytes),
                object_key=resolution.object_key,
                base_digest=resolution.base_digest,
                signature=(
                    common_pb2.AdapterSignature(key_id=signature.key_id, value=signature.value) if signature else None
                ),
            ),
            priority=self._priority,
            revision=resolution.revision,
        )
        with self._channels.using(replica.loader_address) as channel:
            method = loader_grpc.LoaderServiceStub(channel).EnsureLoaded
            response: loader_pb.EnsureLoadedResponse = await call(method, request, timeout_s=self._timeout_s)
        return response.found_at < loader_pb.TIER_HOST


class UsageClient:
    """:class:`~mint_inference.usage.UsageReports` over the catalog's internal channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float) -> None:
        self._stub = usage_grpc.UsageReportServiceStub(channel)
        self._timeout_s = timeout_s

    async def report(self, reporter: str, counts: Sequence[UsageCount]) -> None:
        request = usage_pb.ReportUsageRequest(reporter=reporter)
        for count in counts:
            request.counts.add(
                policy=str(count.policy),
                num_requests=count.num_requests,
                num_prompt_tokens=count.num_prompt_tokens,
                num_generated_tokens=count.num_generated_tokens,
            ).day.FromSeconds(count.day_s)
        await call(self._stub.ReportUsage, request, timeout_s=self._timeout_s)


def _encode_consistency(consistency: Consistency) -> common_pb2.Consistency | None:
    if consistency.strong:
        return common_pb2.Consistency(strong=True)
    if consistency.min_revision:
        return common_pb2.Consistency(min_catalog_revision=consistency.min_revision)
    return None


def _decode_resolution(resolution: alias_pb.Resolution, catalog_revision: int) -> Resolution:
    return Resolution(
        base_digest=resolution.base_digest,
        base_model=resolution.base_model,
        revision=resolution.revision,
        digest=resolution.blob.digest,
        size_bytes=resolution.blob.size_bytes,
        object_key=resolution.object_key,
        canary=resolution.canary,
        stale=resolution.stale,
        catalog_revision=catalog_revision,
        split=_decode_split(resolution.split) if resolution.HasField("split") else None,
        signature=(
            Signature(resolution.signature.key_id, resolution.signature.value)
            if resolution.HasField("signature")
            else None
        ),
    )


def _decode_split(split: alias_pb.AliasSplit) -> Split:
    canary = replace(_decode_resolution(split.canary, 0), canary=True)
    return Split(split.weight, split.salt, _decode_resolution(split.active, 0), canary)


def _decode_word(response: alias_pb.WatchAliasesResponse) -> AliasWord:
    revision = response.catalog_revision
    if response.type == common_pb2.WATCH_EVENT_TYPE_BOOKMARK:
        return AliasWord(revision)
    alias = response.alias
    name = AliasName.parse(alias.name)
    if response.type != common_pb2.WATCH_EVENT_TYPE_PUT or not alias.HasField("resolution"):
        return AliasWord(revision, name)
    resolution = _decode_resolution(alias.resolution, revision)
    if alias.HasField("canary") and alias.HasField("canary_resolution"):
        split = alias_pb.AliasSplit(
            weight=alias.canary.weight,
            salt=alias.canary.salt,
            active=alias.resolution,
            canary=alias.canary_resolution,
        )
        resolution = replace(resolution, split=_decode_split(split))
    return AliasWord(revision, name, resolution)


def _decode_replica(replica: replica_pb.EngineReplica) -> Replica:
    return Replica(
        name=replica.name,
        address=replica.address,
        loader_address=replica.loader_address,
        base_model=replica.base_model,
        base_digest=replica.numerics.base_digest,
        state=_STATES.get(cast("Any", replica.state), ReplicaState.SICK),
        numerics=replica.numerics,
        registered_at_s=replica.register_time.ToNanoseconds() / 1e9,
        max_running_requests=replica.max_running_requests,
        num_slots=replica.num_slots,
    )
