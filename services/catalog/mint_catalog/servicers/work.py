"""WorkService: leases and the queue of runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.runtime.v1 import work_service_pb2 as pb
from mint_api.runtime.v1 import work_service_pb2_grpc as pb_grpc
from mint_catalog.model.checks import check_ttl
from mint_catalog.model.codec import enum_of, from_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.records import Fence, TrainingState
from mint_catalog.model.run_records import RunEvent, RunProgress, RunState, RunStep
from mint_catalog.storage.changes import Changes
from mint_catalog.work.leases import DEFAULT_TTL_S, Leases, parse_resource
from mint_catalog.work.queue import Outcome, RunQueue
from mint_core.calls import remaining_s
from mint_core.names import BaseModelName, RunName, TenantName

__all__ = ["WorkServicer"]

_LONGEST_WAIT_S = 30.0
_MARGIN_S = 0.5


class WorkServicer(pb_grpc.WorkServiceServicer):
    def __init__(self, leases: Leases, queue: RunQueue, changes: Changes, codecs: MessageCodecs) -> None:
        self._leases = leases
        self._queue = queue
        self._changes = changes
        self._run_codec = codecs.run
        self._holder_codec = codecs.holder

    async def AcquireLease(self, request: pb.AcquireLeaseRequest, _context: Any) -> Any:
        resource = parse_resource(request.resource)
        held = await self._leases.acquire(resource, request.holder, _ttl_s(request))
        return pb.AcquireLeaseResponse(lease=self._holder_codec.to_message(resource, held))

    async def RenewLease(self, request: pb.RenewLeaseRequest, _context: Any) -> Any:
        resource = parse_resource(request.fence.resource, field="fence.resource")
        held = await self._leases.renew(resource, request.fence.token)
        return pb.RenewLeaseResponse(lease=self._holder_codec.to_message(resource, held))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, _context: Any) -> Any:
        resource = parse_resource(request.fence.resource, field="fence.resource")
        await self._leases.release(resource, request.fence.token)
        return pb.ReleaseLeaseResponse()

    async def WatchLease(self, request: pb.WatchLeaseRequest, _context: Any) -> AsyncIterator[Any]:
        resource = parse_resource(request.fence.resource, field="fence.resource")
        watched = self._changes.lease(resource, request.fence.token)
        async with contextlib.aclosing(watched):
            async for held in watched:
                yield pb.WatchLeaseResponse(lease=self._holder_codec.to_message(resource, held))

    async def ListLeases(self, request: pb.ListLeasesRequest, _context: Any) -> Any:
        leases = await self._leases.list(TenantName.parse(request.parent, field="parent"))
        return pb.ListLeasesResponse(
            leases=[self._holder_codec.to_message(resource, held) for resource, held in leases]
        )

    async def ClaimRun(self, request: pb.ClaimRunRequest, _context: Any) -> Any:
        base_model = BaseModelName.parse(request.base_model, field="base_model")
        remaining = remaining_s()
        wait_s = _LONGEST_WAIT_S if remaining is None else max(0.0, remaining - _MARGIN_S)
        claim = await self._queue.claim(base_model, request.holder, _ttl_s(request), wait_s=wait_s)
        if claim is None:
            return pb.ClaimRunResponse()
        return pb.ClaimRunResponse(
            run=self._run_codec.to_message(claim.run), lease=self._holder_codec.to_message(claim.resource, claim.holder)
        )

    async def ReportRun(self, request: pb.ReportRunRequest, _context: Any) -> Any:
        cancel_requested = await self._queue.report(
            RunName.parse(request.name),
            from_message(request.fence, Fence),
            from_message(request.progress, RunProgress) if request.HasField("progress") else None,
            tuple(from_message(event, RunEvent) for event in request.events),
            tuple(from_message(step, RunStep) for step in request.steps),
        )
        return pb.ReportRunResponse(cancel_requested=cancel_requested)

    async def CommitTrainingState(self, request: pb.CommitTrainingStateRequest, _context: Any) -> Any:
        revision = await self._queue.commit_state(
            RunName.parse(request.name),
            from_message(request.fence, Fence),
            from_message(request.state, TrainingState),
        )
        return pb.CommitTrainingStateResponse(catalog_revision=revision)

    async def FinishRun(self, request: pb.FinishRunRequest, _context: Any) -> Any:
        outcome = Outcome(
            enum_of(request.state, RunState), request.error, request.retriable, request.published_revision
        )
        run = await self._queue.finish(RunName.parse(request.name), from_message(request.fence, Fence), outcome)
        return pb.FinishRunResponse(run=self._run_codec.to_message(run))


def _ttl_s(request: Any) -> int:
    ttl_s = request.ttl.seconds + request.ttl.nanos / 1e9
    return check_ttl(ttl_s, default_s=DEFAULT_TTL_S)
