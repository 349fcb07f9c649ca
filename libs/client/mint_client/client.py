"""The client: addresses in, groups of calls out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

from mint_api.v1 import common_pb2, inference_service_pb2, inference_service_pb2_grpc
from mint_client._calling import Connection
from mint_client.accounting import Audit, UsageCounters
from mint_client.blobs import Blobs
from mint_client.catalog import (
    Aliases,
    BaseModels,
    EngineReplicas,
    Evaluations,
    Revisions,
    Rollouts,
    Runs,
)
from mint_client.fleet import FleetOperations, Tenants
from mint_client.generation import Generation, PromptLike, as_prompt, gather
from mint_client.policies import Policies
from mint_client.sessions import Sessions
from mint_core.channel import DEFAULT_TIMEOUT_S, call, stream

__all__ = ["Endpoints", "MintClient"]

_GENERATE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Public addresses (host:port or unix:PATH); one that is never called may stay empty."""

    catalog: str = ""
    inference: str = ""
    exporter: str = ""
    trainer: str = ""


class MintClient:
    """An asynchronous client of the public services.

    ::

        async with MintClient(Endpoints(catalog="127.0.0.1:7000", inference="127.0.0.1:7001")) as client:
            policy = await client.policies.create("acme", "tone", base_model="baseModels/smollm2-135m-instruct")
            answer = await client.generate_text("tenants/acme/policies/tone/aliases/live", "Hello")

    Calls that change something carry a request id of their own, so the transport may repeat them. ``timeout_s`` is
    the deadline of a small call; long ones have longer ones of their own.
    """

    def __init__(self, endpoints: Endpoints, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        catalog = Connection("catalog", endpoints.catalog)
        exporter = Connection("exporter", endpoints.exporter)
        trainer = Connection("trainer", endpoints.trainer)
        self._inference = Connection("inference", endpoints.inference)
        self._connections = (catalog, exporter, trainer, self._inference)
        self.endpoints = endpoints
        self.policies = Policies(catalog, timeout_s)
        self.revisions = Revisions(catalog, timeout_s)
        self.aliases = Aliases(catalog, timeout_s)
        self.runs = Runs(catalog, timeout_s)
        self.rollouts = Rollouts(catalog, timeout_s)
        self.evaluations = Evaluations(catalog, timeout_s)
        self.base_models = BaseModels(catalog, timeout_s)
        self.engine_replicas = EngineReplicas(catalog, timeout_s)
        self.audit = Audit(catalog, timeout_s)
        self.usage = UsageCounters(catalog, timeout_s)
        self.fleet_operations = FleetOperations(catalog, timeout_s)
        self.tenants = Tenants(catalog, timeout_s)
        self.blobs = Blobs(exporter, timeout_s)
        self.sessions = Sessions(trainer, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections))

    def generate(
        self,
        model: str,
        prompt: PromptLike,
        *,
        sampling: inference_service_pb2.SamplingParams | None = None,
        return_logprobs: bool = False,
        return_routed_experts: bool = False,
        sticky_key: str = "",
        consistency: common_pb2.Consistency | None = None,
        tenant: str = "",
        timeout_s: float = _GENERATE_TIMEOUT_S,
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        """Stream a completion: a header that names revision and digest, then chunks.

        ``model`` is an alias, revision or base model name; ``tenant`` (a tenant name) counts with a base model only.
        """
        request = inference_service_pb2.GenerateRequest(
            model=model,
            prompt=as_prompt(prompt),
            sampling=sampling,
            return_logprobs=return_logprobs,
            return_routed_experts=return_routed_experts,
            sticky_key=sticky_key,
            consistency=consistency,
            tenant=tenant,
        )
        stub = self._inference.stub(inference_service_pb2_grpc.InferenceServiceStub)
        return stream(stub.Generate, request, timeout_s=timeout_s)

    async def generate_text(
        self,
        model: str,
        prompt: PromptLike,
        *,
        sampling: inference_service_pb2.SamplingParams | None = None,
        return_logprobs: bool = False,
        return_routed_experts: bool = False,
        sticky_key: str = "",
        consistency: common_pb2.Consistency | None = None,
        tenant: str = "",
        timeout_s: float = _GENERATE_TIMEOUT_S,
    ) -> Generation:
        """:meth:`generate`, gathered into one answer."""
        return await gather(
            self.generate(
                model,
                prompt,
                sampling=sampling,
                return_logprobs=return_logprobs,
                return_routed_experts=return_routed_experts,
                sticky_key=sticky_key,
                consistency=consistency,
                tenant=tenant,
                timeout_s=timeout_s,
            )
        )

    async def score(
        self,
        model: str,
        prompt: PromptLike,
        *,
        sticky_key: str = "",
        consistency: common_pb2.Consistency | None = None,
        tenant: str = "",
        timeout_s: float = _GENERATE_TIMEOUT_S,
    ) -> inference_service_pb2.ScoreResponse:
        """Log-probability of each token of ``prompt`` but the first."""
        request = inference_service_pb2.ScoreRequest(
            model=model, prompt=as_prompt(prompt), consistency=consistency, tenant=tenant, sticky_key=sticky_key
        )
        stub = self._inference.stub(inference_service_pb2_grpc.InferenceServiceStub)
        response: inference_service_pb2.ScoreResponse = await call(stub.Score, request, timeout_s=timeout_s)
        return response
