"""PolicyService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from google.rpc import status_pb2

from mint_api.v1 import policy_service_pb2 as pb
from mint_api.v1 import policy_service_pb2_grpc as pb_grpc
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.policies.bulk import BulkCreation, worked_at_once
from mint_catalog.policies.creation import NewPolicy
from mint_catalog.policies.heads import Policies
from mint_catalog.policies.policy_listing import PolicyQuery
from mint_catalog.servicers.common import check_parent, identity, min_revision, watch_responses
from mint_catalog.storage.changes import Changes
from mint_core.errors import MintError
from mint_core.names import PolicyName, TenantName, check_id
from mint_core.status import to_status

__all__ = ["PolicyServicer"]


_MESSAGES_AT_ONCE: Final = 4
"""Of one import stream; what it sends beyond waits at the sender."""


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    def __init__(self, policies: Policies, bulk: BulkCreation, changes: Changes, codecs: MessageCodecs) -> None:
        self._policies = policies
        self._bulk = bulk
        self._changes = changes
        self._codec = codecs.policy
        self._revision_codec = codecs.revision

    async def CreatePolicy(self, request: pb.CreatePolicyRequest, _context: Any) -> Any:
        new = self._new_policy(request, TenantName.parse(request.parent, field="parent").tenant)
        written = await self._policies.create(
            new.name, new.policy, new.request, revisions=new.revisions, aliases=new.aliases
        )
        return pb.CreatePolicyResponse(
            policy=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    def _new_policy(self, request: pb.CreatePolicyRequest, tenant: str) -> NewPolicy:
        name = PolicyName(tenant, check_id(request.policy_id, field="policy_id"))
        if request.policy.name:
            check_parent(request.policy.name, str(name), field="policy.name")
        return NewPolicy(
            name,
            self._codec.from_message(request.policy, name=name),
            [self._revision_codec.from_message(revision, name=None) for revision in request.revisions],
            dict(request.aliases),
            identity(request, tenant),
        )

    def _new_policies(self, batch: pb.BatchCreatePoliciesRequest, tenant: str) -> Iterator[NewPolicy | MintError]:
        """The items; one that cannot be read is its error."""
        for request in batch.requests:
            try:
                check_parent(request.parent, batch.parent, field="requests.parent")
                request.parent = batch.parent  # the same payload, and so the same request id, with it and without
                yield self._new_policy(request, tenant)
            except MintError as error:
                yield error

    async def BatchCreatePolicies(self, request: pb.BatchCreatePoliciesRequest, _context: Any) -> Any:
        tenant = TenantName.parse(request.parent, field="parent").tenant
        result = await self._bulk.create(tenant, len(request.requests), self._new_policies(request, tenant))
        return pb.BatchCreatePoliciesResponse(
            statuses=map(_status, result.errors), catalog_revision=result.catalog_revision
        )

    async def ImportPolicies(
        self, request_iterator: AsyncIterator[pb.ImportPoliciesRequest], context: Any
    ) -> AsyncIterator[Any]:
        async def answer(request: pb.ImportPoliciesRequest) -> Any:
            try:
                result = await self.BatchCreatePolicies(request.batch, context)
            except MintError as error:  # of the message as a whole, which must not end the stream
                statuses = [to_status(error)] * len(request.batch.requests)
                result = pb.BatchCreatePoliciesResponse(statuses=statuses)
            return pb.ImportPoliciesResponse(sequence=request.sequence, result=result)

        answers = worked_at_once(aiter(request_iterator), answer, limit=_MESSAGES_AT_ONCE)
        async with contextlib.aclosing(answers):
            async for each in answers:
                yield each

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

    async def UndeletePolicy(self, request: pb.UndeletePolicyRequest, _context: Any) -> Any:
        name = PolicyName.parse(request.name)
        written = await self._policies.undelete(name, identity(request, name.tenant))
        return pb.UndeletePolicyResponse(
            policy=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def ListPolicies(self, request: pb.ListPoliciesRequest, _context: Any) -> Any:
        query = PolicyQuery(
            PolicyQuery.parse_parent(request.parent),
            page_size=request.page_size,
            page_token=request.page_token,
            filter=request.filter,
            order_by=request.order_by,
            min_revision=min_revision(request),
        )
        page = await self._policies.list(query)
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


_OK: Final = status_pb2.Status()


def _status(error: MintError | None) -> status_pb2.Status:
    return _OK if error is None else to_status(error)
