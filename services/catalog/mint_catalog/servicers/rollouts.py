"""RolloutService."""

from __future__ import annotations

from typing import Any

from mint_api.v1 import rollout_service_pb2 as pb
from mint_api.v1 import rollout_service_pb2_grpc as pb_grpc
from mint_catalog.model.codec import from_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.records import Fence
from mint_catalog.policies.rollouts import Rollouts
from mint_catalog.servicers.common import check_parent
from mint_core.names import PolicyName, RolloutName, check_id

__all__ = ["RolloutServicer"]


class RolloutServicer(pb_grpc.RolloutServiceServicer):
    def __init__(self, rollouts: Rollouts, codecs: MessageCodecs) -> None:
        self._rollouts = rollouts
        self._codec = codecs.rollout

    async def CreateRollout(self, request: pb.CreateRolloutRequest, _context: Any) -> Any:
        policy = PolicyName.parse(request.parent, field="parent")
        name = RolloutName(policy.tenant, policy.policy, check_id(request.rollout_id, field="rollout_id"))
        check_parent(request.rollout.name, str(name), field="rollout.name")
        wanted = self._codec.from_message(request.rollout, name=name)
        written = await self._rollouts.create(wanted, from_message(request.fence, Fence))
        return pb.CreateRolloutResponse(
            rollout=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetRollout(self, request: pb.GetRolloutRequest, _context: Any) -> Any:
        record = await self._rollouts.get(RolloutName.parse(request.name))
        return pb.GetRolloutResponse(rollout=self._codec.to_message(record))

    async def ListRollouts(self, request: pb.ListRolloutsRequest, _context: Any) -> Any:
        page = await self._rollouts.list(
            PolicyName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
            run=request.run,
        )
        return pb.ListRolloutsResponse(
            rollouts=map(self._codec.to_message, page.records), next_page_token=page.next_page_token
        )

    async def DeleteRollout(self, request: pb.DeleteRolloutRequest, _context: Any) -> Any:
        await self._rollouts.delete(RolloutName.parse(request.name), from_message(request.fence, Fence))
        return pb.DeleteRolloutResponse()
