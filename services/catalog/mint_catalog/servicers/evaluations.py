"""EvaluationService."""

from __future__ import annotations

from typing import Any

from mint_api.v1 import evaluation_service_pb2 as pb
from mint_api.v1 import evaluation_service_pb2_grpc as pb_grpc
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.policies.evaluations import Evaluations
from mint_catalog.servicers.common import check_parent, fence_of
from mint_core.names import EvaluationName, PolicyName, check_id

__all__ = ["EvaluationServicer"]


class EvaluationServicer(pb_grpc.EvaluationServiceServicer):
    def __init__(self, evaluations: Evaluations, codecs: MessageCodecs) -> None:
        self._evaluations = evaluations
        self._codec = codecs.evaluation

    async def CreateEvaluation(self, request: pb.CreateEvaluationRequest, _context: Any) -> Any:
        policy = PolicyName.parse(request.parent, field="parent")
        name = EvaluationName(policy.tenant, policy.policy, check_id(request.evaluation_id, field="evaluation_id"))
        check_parent(request.evaluation.name, str(name), field="evaluation.name")
        wanted = self._codec.from_message(request.evaluation, name=name)
        written = await self._evaluations.create(wanted, fence_of(request))
        return pb.CreateEvaluationResponse(
            evaluation=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetEvaluation(self, request: pb.GetEvaluationRequest, _context: Any) -> Any:
        record = await self._evaluations.get(EvaluationName.parse(request.name))
        return pb.GetEvaluationResponse(evaluation=self._codec.to_message(record))

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, _context: Any) -> Any:
        page = await self._evaluations.list(
            PolicyName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListEvaluationsResponse(
            evaluations=map(self._codec.to_message, page.records), next_page_token=page.next_page_token
        )
