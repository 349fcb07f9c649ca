"""PolicyService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import policy_service_pb2 as pb
from mint_api.v1 import policy_service_pb2_grpc as pb_grpc
from mint_catalog.changes import Changes
from mint_catalog.codecs import MessageCodecs
from mint_catalog.policies import Policies
from mint_catalog.servicers.common import check_parent, identity, min_revision, watch_responses
from mint_core.names import PolicyName, TenantName, check_id

__all__ = ["PolicyServicer"]


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    def __init__(self, policies: Policies, changes: Changes, codecs: MessageCodecs) -> None:
        self._policies = policies
        self._changes = changes
        self._codec = codecs.policy

    async def CreatePolicy(self, request: pb.CreatePolicyRequest, _context: Any) -> Any:
        tenant = TenantName.parse(request.parent, field="parent").tenant
        name = PolicyName(tenant, check_id(request.policy_id, field="policy_id"))
        check_parent(request.policy.name, str(name), field="policy.name")
        wanted = self._codec.from_message(request.policy, name=name)
        written = await self._policies.create(name, wanted, identity(request, tenant))
        return pb.CreatePolicyResponse(
            policy=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetPolicy(self, request: pb.GetPolicyRequest, _context: Any) -> Any:
        record = await self._policies.get(PolicyName.parse(request.name), min_revision=min_revision(request))
        return pb.GetPolicyResponse(policy=self._codec.to_message(record))

    async def UpdatePolicy(self, request: pb.UpdatePolicyRequest, _context: Any) -> Any:
        name = PolicyName.parse(request.policy.name, field="policy.name")
        wanted = self._codec.from_message(request.policy, name=name)
        mask = frozenset(request.update_mask.paths)
        written = await self._policies.update(name, wanted, mask, request.policy.etag, identity(request, name.tenant))
        return pb.UpdatePolicyResponse(
            policy=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def DeletePolicy(self, request: pb.DeletePolicyRequest, _context: Any) -> Any:
        name = PolicyName.parse(request.name)
        revision = await self._policies.delete(name, request.etag, identity(request, name.tenant))
        return pb.DeletePolicyResponse(catalog_revision=revision)

    async def ListPolicies(self, request: pb.ListPoliciesRequest, _context: Any) -> Any:
        page = await self._policies.list(
            TenantName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
            filter_=request.filter,
            order_by=request.order_by,
            min_revision=min_revision(request),
        )
        return pb.ListPoliciesResponse(
            policies=map(self._codec.to_message, page.records),
            next_page_token=page.next_page_token,
            catalog_revision=page.catalog_revision,
        )

    async def WatchPolicies(self, request: pb.WatchPoliciesRequest, _context: Any) -> AsyncIterator[Any]:
        tenant = TenantName.parse(request.parent, field="parent")
        events = self._changes.policies(tenant, after=request.start_after_catalog_revision)
        responses = watch_responses(events, pb.WatchPoliciesResponse, "policy", self._codec)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response
