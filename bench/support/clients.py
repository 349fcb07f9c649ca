"""The catalog's stubs, called as a service of ours calls them: with a deadline and a principal, and no retries."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from bench.support.processes import CatalogServer
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    revision_service_pb2_grpc,
)
from mint_core.channel import connect

__all__ = ["Clients", "clients_of", "resolve"]

_METADATA: Final = (("mint-principal", "bench"),)


class Clients:
    """Stubs of one catalog."""

    def __init__(self, public: grpc.aio.Channel, runtime: grpc.aio.Channel) -> None:
        self.public, self.runtime = public, runtime
        self.policies: Any = policy_service_pb2_grpc.PolicyServiceStub(public)
        self.aliases: Any = alias_service_pb2_grpc.AliasServiceStub(public)
        self.revisions: Any = revision_service_pb2_grpc.RevisionServiceStub(public)

    async def resolve(self, name: str, *, strong: bool = False) -> Any:
        return await resolve(self.aliases, name, strong=strong)

    async def create(self, request: policy_service_pb2.CreatePolicyRequest) -> Any:
        return await self.policies.CreatePolicy(request, timeout=30, metadata=_METADATA)

    async def promote(self, name: str, number: int) -> Any:
        request = alias_service_pb2.PromoteAliasRequest(name=name, revision_number=number, reason="bench")
        return await self.aliases.PromoteAlias(request, timeout=30, metadata=_METADATA)


async def resolve(stub: Any, name: str, *, strong: bool = False) -> Any:
    request = alias_service_pb2.ResolveRequest(name=name)
    if strong:
        request.consistency.strong = True
    return await stub.Resolve(request, timeout=30, metadata=_METADATA)


@contextlib.asynccontextmanager
async def clients_of(catalog: CatalogServer) -> AsyncIterator[Clients]:
    async with connect(catalog.public, retry=False) as public, connect(catalog.runtime, retry=False) as runtime:
        yield Clients(public, runtime)
