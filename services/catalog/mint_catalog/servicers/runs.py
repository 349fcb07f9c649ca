"""RunService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import run_service_pb2 as pb
from mint_api.v1 import run_service_pb2_grpc as pb_grpc
from mint_catalog.model.codec import check_enums, enum_of, to_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.run_records import RunState
from mint_catalog.servicers.common import identity
from mint_catalog.storage.changes import Changes
from mint_catalog.work.runs import Runs
from mint_core.calls import principal
from mint_core.names import PolicyName, RunName, TenantName

__all__ = ["RunServicer"]


class RunServicer(pb_grpc.RunServiceServicer):
    def __init__(self, runs: Runs, changes: Changes, codecs: MessageCodecs) -> None:
        self._runs = runs
        self._changes = changes
        self._codec = codecs.run

    async def CreateRun(self, request: pb.CreateRunRequest, _context: Any) -> Any:
        tenant = TenantName.parse(request.parent, field="parent")
        recipe = request.run.WhichOneof("recipe")
        if recipe is not None:
            check_enums(getattr(request.run, recipe), field=f"run.{recipe}")
        wanted = self._codec.from_message(request.run, name=None)
        written = await self._runs.create(tenant, request.run_id, wanted, identity(request, tenant.tenant))
        return pb.CreateRunResponse(
            run=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetRun(self, request: pb.GetRunRequest, _context: Any) -> Any:
        return pb.GetRunResponse(run=self._codec.to_message(await self._runs.get(RunName.parse(request.name))))

    async def ListRuns(self, request: pb.ListRunsRequest, _context: Any) -> Any:
        check_enums(request, field="request")
        policies = [str(PolicyName.parse(request.policy, field="policy"))] if request.policy else []
        page = await self._runs.list(
            TenantName.parse(request.parent, field="parent"),
            page_size=request.page_size,
            page_token=request.page_token,
            policies=policies,
            state=enum_of(request.state, RunState),
            dead_letter=request.dead_letter,
        )
        return pb.ListRunsResponse(runs=map(self._codec.to_message, page.records), next_page_token=page.next_page_token)

    async def WatchRun(self, request: pb.WatchRunRequest, _context: Any) -> AsyncIterator[Any]:
        runs = self._changes.run(RunName.parse(request.name))
        async with contextlib.aclosing(runs):
            async for run in runs:
                yield pb.WatchRunResponse(run=self._codec.to_message(run))

    async def ListRunSteps(self, request: pb.ListRunStepsRequest, _context: Any) -> Any:
        page = await self._runs.steps(
            RunName.parse(request.name), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListRunStepsResponse(
            steps=[to_message(step, pb.RunStep) for step in page.records], next_page_token=page.next_page_token
        )

    async def CancelRun(self, request: pb.CancelRunRequest, _context: Any) -> Any:
        run = await self._runs.cancel(RunName.parse(request.name), request.reason)
        return pb.CancelRunResponse(run=self._codec.to_message(run))

    async def RetryRun(self, request: pb.RetryRunRequest, _context: Any) -> Any:
        name = RunName.parse(request.name)
        run = await self._runs.retry(name, request.reason, principal(), identity(request, name.tenant))
        return pb.RetryRunResponse(run=self._codec.to_message(run))
