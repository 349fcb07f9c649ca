"""Groups over the catalog's public services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    common_pb2,
    engine_replica_service_pb2,
    engine_replica_service_pb2_grpc,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    revision_service_pb2,
    revision_service_pb2_grpc,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)
from mint_client._calling import Connection, new_request_id, pages
from mint_core.channel import call, stream
from mint_core.clock import Deadline
from mint_core.errors import Unavailable

__all__ = [
    "Aliases",
    "BaseModels",
    "EngineReplicas",
    "Evaluations",
    "Revisions",
    "Rollouts",
    "Runs",
    "run_has_ended",
]

_ENDED = frozenset(
    (run_service_pb2.RUN_STATE_SUCCEEDED, run_service_pb2.RUN_STATE_FAILED, run_service_pb2.RUN_STATE_CANCELLED)
)


def run_has_ended(run: run_service_pb2.Run) -> bool:
    """Whether the run's state is final."""
    return run.state in _ENDED


class _Group:
    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        return await call(method, request, timeout_s=self._timeout_s if timeout_s is None else timeout_s)


class Revisions(_Group):
    """Adapter revisions."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(revision_service_pb2_grpc.RevisionServiceStub)

    async def get(
        self, name: str, *, consistency: common_pb2.Consistency | None = None
    ) -> revision_service_pb2.Revision:
        request = revision_service_pb2.GetRevisionRequest(name=name, consistency=consistency)
        return (await self._call(self._stub.GetRevision, request)).revision

    def list(self, policy: str, *, page_size: int = 0) -> AsyncIterator[revision_service_pb2.Revision]:
        """All revisions of ``policy`` (a policy name), oldest first."""

        async def read(token: str) -> Any:
            request = revision_service_pb2.ListRevisionsRequest(parent=policy, page_size=page_size, page_token=token)
            return await self._call(self._stub.ListRevisions, request)

        return pages(read, "revisions")

    async def retire(self, name: str, *, etag: str = "") -> revision_service_pb2.Revision:
        request = revision_service_pb2.RetireRevisionRequest(name=name, etag=etag, request_id=new_request_id())
        return (await self._call(self._stub.RetireRevision, request)).revision

    async def delete(self, name: str, *, etag: str = "") -> None:
        request = revision_service_pb2.DeleteRevisionRequest(name=name, etag=etag, request_id=new_request_id())
        await self._call(self._stub.DeleteRevision, request)


class Aliases(_Group):
    """Aliases and resolution; ``name`` is ``tenants/{t}/policies/{p}/aliases/{a}``."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(alias_service_pb2_grpc.AliasServiceStub)

    async def promote(
        self,
        name: str,
        revision_number: int,
        *,
        etag: str = "",
        reason: str = "",
        min_resident_replicas: int = 0,
        residency_timeout_s: float = 60.0,
        ignore_gate: bool = False,
        request_id: str | None = None,
    ) -> alias_service_pb2.Alias:
        """Point the alias at a READY revision, after ``min_resident_replicas`` engines hold it.

        ``ignore_gate`` moves it although the alias's gate is not met, and needs a ``reason``.
        """
        request = alias_service_pb2.PromoteAliasRequest(
            name=name,
            revision_number=revision_number,
            etag=etag,
            reason=reason,
            min_resident_replicas=min_resident_replicas,
            ignore_gate=ignore_gate,
            request_id=request_id or new_request_id(),
        )
        timeout_s = self._timeout_s
        if min_resident_replicas:
            request.residency_timeout.FromMilliseconds(round(residency_timeout_s * 1000))
            timeout_s += residency_timeout_s
        return (await self._call(self._stub.PromoteAlias, request, timeout_s)).alias

    async def rollback(
        self, name: str, revision_number: int = 0, *, etag: str = "", reason: str = ""
    ) -> alias_service_pb2.Alias:
        """Point the alias back at ``revision_number``, or (0) at the previous distinct READY revision."""
        request = alias_service_pb2.RollbackAliasRequest(
            name=name, revision_number=revision_number, etag=etag, reason=reason, request_id=new_request_id()
        )
        return (await self._call(self._stub.RollbackAlias, request)).alias

    async def set_canary(
        self,
        name: str,
        revision_number: int,
        weight: float,
        *,
        salt: str = "",
        etag: str = "",
        reason: str = "",
    ) -> alias_service_pb2.Alias:
        """Try a READY revision on the share ``weight`` (above 0, at most 1) of the sticky keys."""
        target = alias_service_pb2.AliasTarget(revision_number=revision_number)
        canary = alias_service_pb2.Canary(target=target, weight=weight, salt=salt)
        return await self._set_canary(name, canary, etag=etag, reason=reason)

    async def clear_canary(self, name: str, *, etag: str = "", reason: str = "") -> alias_service_pb2.Alias:
        """End the trial, if there is one."""
        return await self._set_canary(name, None, etag=etag, reason=reason)

    async def _set_canary(
        self, name: str, canary: alias_service_pb2.Canary | None, *, etag: str, reason: str
    ) -> alias_service_pb2.Alias:
        request = alias_service_pb2.SetCanaryRequest(
            name=name, canary=canary, etag=etag, reason=reason, request_id=new_request_id()
        )
        return (await self._call(self._stub.SetCanary, request)).alias

    async def set_gate(
        self, name: str, gate: alias_service_pb2.Gate | None, *, etag: str = "", reason: str = ""
    ) -> alias_service_pb2.Alias:
        """Set what a promotion and the canary must show, or (None) nothing."""
        request = alias_service_pb2.SetGateRequest(
            name=name, gate=gate, etag=etag, reason=reason, request_id=new_request_id()
        )
        return (await self._call(self._stub.SetGate, request)).alias

    async def get(self, name: str, *, consistency: common_pb2.Consistency | None = None) -> alias_service_pb2.Alias:
        request = alias_service_pb2.GetAliasRequest(name=name, consistency=consistency)
        return (await self._call(self._stub.GetAlias, request)).alias

    async def list(self, policy: str) -> list[alias_service_pb2.Alias]:
        """All aliases of ``policy`` (a policy name)."""
        request = alias_service_pb2.ListAliasesRequest(parent=policy)
        return list((await self._call(self._stub.ListAliases, request)).aliases)

    async def delete(self, name: str, *, etag: str = "") -> None:
        request = alias_service_pb2.DeleteAliasRequest(name=name, etag=etag, request_id=new_request_id())
        await self._call(self._stub.DeleteAlias, request)

    async def resolve(
        self, name: str, *, sticky_key: str = "", consistency: common_pb2.Consistency | None = None
    ) -> alias_service_pb2.Resolution:
        """What an alias or revision name stands for."""
        request = alias_service_pb2.ResolveRequest(name=name, sticky_key=sticky_key, consistency=consistency)
        return (await self._call(self._stub.Resolve, request)).resolution


class Runs(_Group):
    """Training and evaluation runs."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(run_service_pb2_grpc.RunServiceStub)

    async def create(
        self, tenant: str, run: run_service_pb2.Run, *, run_id: str = "", request_id: str | None = None
    ) -> run_service_pb2.Run:
        """Queue ``run``; its policy and recipe must be set. Without ``run_id`` the catalog chooses a name."""
        request = run_service_pb2.CreateRunRequest(
            parent=f"tenants/{tenant}", run_id=run_id, run=run, request_id=request_id or new_request_id()
        )
        return (await self._call(self._stub.CreateRun, request)).run

    async def get(self, name: str) -> run_service_pb2.Run:
        return (await self._call(self._stub.GetRun, run_service_pb2.GetRunRequest(name=name))).run

    def list(
        self,
        tenant: str,
        *,
        policy: str = "",
        state: run_service_pb2.RunState.ValueType = run_service_pb2.RUN_STATE_UNSPECIFIED,
        dead_letter: bool = False,
        page_size: int = 0,
    ) -> AsyncIterator[run_service_pb2.Run]:
        """All runs of ``tenant``, or those of one ``policy`` (a policy name), in one ``state``, or failed for good."""

        async def read(token: str) -> Any:
            request = run_service_pb2.ListRunsRequest(
                parent=f"tenants/{tenant}",
                page_size=page_size,
                page_token=token,
                policy=policy,
                state=state,
                dead_letter=dead_letter,
            )
            return await self._call(self._stub.ListRuns, request)

        return pages(read, "runs")

    async def watch(self, name: str, *, patience_s: float = 120.0) -> AsyncIterator[run_service_pb2.Run]:
        """The run as it is now, then after every change, until it has ended.

        A catalog that is away is waited for up to ``patience_s``, then :class:`Unavailable` is raised.
        """
        request = run_service_pb2.WatchRunRequest(name=name)
        deadline = Deadline.after(patience_s)
        while True:
            try:
                async for response in stream(self._stub.WatchRun, request, timeout_s=None):
                    deadline = Deadline.after(patience_s)
                    yield response.run
                    if run_has_ended(response.run):
                        return
            except Unavailable as error:
                if deadline.remaining_s <= 0:
                    raise
                pause_s = error.retry_after_s or 1.0
            else:
                # The server closed the stream before the end, as it does when it drains.
                if deadline.remaining_s <= 0:
                    raise Unavailable(f"the catalog keeps closing the watch of {name} before the run has ended")
                pause_s = 0.5
            await asyncio.sleep(min(pause_s, deadline.remaining_s))

    async def wait(self, name: str, *, patience_s: float = 120.0) -> run_service_pb2.Run:
        """Wait until the run has ended; the caller bounds the waiting with ``asyncio.timeout``."""
        async for run in self.watch(name, patience_s=patience_s):
            if run_has_ended(run):
                return run
        raise Unavailable(f"the watch of {name} ended before the run did")

    def steps(self, name: str, *, page_size: int = 0) -> AsyncIterator[run_service_pb2.RunStep]:
        """The figures of all steps of a run, oldest first."""

        async def read(token: str) -> Any:
            request = run_service_pb2.ListRunStepsRequest(name=name, page_size=page_size, page_token=token)
            return await self._call(self._stub.ListRunSteps, request)

        return pages(read, "steps")

    async def cancel(self, name: str, *, reason: str = "") -> run_service_pb2.Run:
        request = run_service_pb2.CancelRunRequest(name=name, reason=reason)
        return (await self._call(self._stub.CancelRun, request)).run

    async def retry(self, name: str, *, reason: str = "", request_id: str | None = None) -> run_service_pb2.Run:
        """Queue a run that has failed again; it goes on from the newest state it saved."""
        request = run_service_pb2.RetryRunRequest(name=name, reason=reason, request_id=request_id or new_request_id())
        return (await self._call(self._stub.RetryRun, request)).run


class Rollouts(_Group):
    """Rollout batches: pointers to stored objects; ``name`` is ``tenants/{t}/policies/{p}/rollouts/{r}``."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(rollout_service_pb2_grpc.RolloutServiceStub)

    async def create(
        self, policy: str, rollout_id: str, rollout: rollout_service_pb2.Rollout, fence: common_pb2.Fence
    ) -> rollout_service_pb2.Rollout:
        """Record a batch whose object is stored, under the fence of ``policy``'s lease; safe to repeat."""
        request = rollout_service_pb2.CreateRolloutRequest(
            parent=policy, rollout_id=rollout_id, rollout=rollout, fence=fence
        )
        return (await self._call(self._stub.CreateRollout, request)).rollout

    async def get(self, name: str) -> rollout_service_pb2.Rollout:
        return (await self._call(self._stub.GetRollout, rollout_service_pb2.GetRolloutRequest(name=name))).rollout

    def list(self, policy: str, *, run: str = "", page_size: int = 0) -> AsyncIterator[rollout_service_pb2.Rollout]:
        """All rollouts of ``policy`` (a policy name), or those of one ``run`` (a run name); also expired ones."""

        async def read(token: str) -> Any:
            request = rollout_service_pb2.ListRolloutsRequest(
                parent=policy, page_size=page_size, page_token=token, run=run
            )
            return await self._call(self._stub.ListRollouts, request)

        return pages(read, "rollouts")

    async def delete(self, name: str, fence: common_pb2.Fence) -> None:
        """Forget a rollout whose object is deleted already."""
        request = rollout_service_pb2.DeleteRolloutRequest(name=name, fence=fence)
        await self._call(self._stub.DeleteRollout, request)


class Evaluations(_Group):
    """Results of scoring; ``name`` is ``tenants/{t}/policies/{p}/evaluations/{e}``."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(evaluation_service_pb2_grpc.EvaluationServiceStub)

    async def create(
        self,
        policy: str,
        evaluation_id: str,
        evaluation: evaluation_service_pb2.Evaluation,
        *,
        fence: common_pb2.Fence | None = None,
    ) -> evaluation_service_pb2.Evaluation:
        """Record an evaluation, under the fence of ``policy``'s or ``evaluation.run``'s lease if one is given.

        Safe to repeat when ``evaluation.run`` is set.
        """
        request = evaluation_service_pb2.CreateEvaluationRequest(
            parent=policy, evaluation_id=evaluation_id, evaluation=evaluation, fence=fence
        )
        return (await self._call(self._stub.CreateEvaluation, request)).evaluation

    async def get(self, name: str) -> evaluation_service_pb2.Evaluation:
        request = evaluation_service_pb2.GetEvaluationRequest(name=name)
        return (await self._call(self._stub.GetEvaluation, request)).evaluation

    def list(self, policy: str, *, page_size: int = 0) -> AsyncIterator[evaluation_service_pb2.Evaluation]:
        """All evaluations of ``policy`` (a policy name)."""

        async def read(token: str) -> Any:
            request = evaluation_service_pb2.ListEvaluationsRequest(
                parent=policy, page_size=page_size, page_token=token
            )
            return await self._call(self._stub.ListEvaluations, request)

        return pages(read, "evaluations")


class BaseModels(_Group):
    """Base models known to the installation."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(base_model_service_pb2_grpc.BaseModelServiceStub)

    async def register(self, base_model: base_model_service_pb2.BaseModel) -> base_model_service_pb2.BaseModel:
        """Register name and digest; the same pair again is a no-op, another digest is refused."""
        request = base_model_service_pb2.RegisterBaseModelRequest(base_model=base_model)
        return (await self._call(self._stub.RegisterBaseModel, request)).base_model

    async def get(self, name: str) -> base_model_service_pb2.BaseModel:
        request = base_model_service_pb2.GetBaseModelRequest(name=name)
        return (await self._call(self._stub.GetBaseModel, request)).base_model

    def list(self, *, page_size: int = 0) -> AsyncIterator[base_model_service_pb2.BaseModel]:
        async def read(token: str) -> Any:
            request = base_model_service_pb2.ListBaseModelsRequest(page_size=page_size, page_token=token)
            return await self._call(self._stub.ListBaseModels, request)

        return pages(read, "base_models")


class EngineReplicas(_Group):
    """Living engine replicas."""

    @property
    def _stub(self) -> Any:
        return self._connection.stub(engine_replica_service_pb2_grpc.EngineReplicaServiceStub)

    async def get(self, name: str) -> engine_replica_service_pb2.EngineReplica:
        request = engine_replica_service_pb2.GetEngineReplicaRequest(name=name)
        return (await self._call(self._stub.GetEngineReplica, request)).engine_replica

    async def list(self, *, base_model: str = "") -> list[engine_replica_service_pb2.EngineReplica]:
        request = engine_replica_service_pb2.ListEngineReplicasRequest(base_model=base_model)
        return list((await self._call(self._stub.ListEngineReplicas, request)).engine_replicas)
