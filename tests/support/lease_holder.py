"""A worker in a process of its own that does not believe in losing its lease: it then writes all the more.

It claims a run, works a step, says so in a line of JSON, and renews its lease until that is refused. Then it tries
every write of a holder, under its old fence, and says in a second line what each was answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from mint_api.runtime.v1 import publish_service_pb2, work_service_pb2
from mint_api.v1 import common_pb2, evaluation_service_pb2, rollout_service_pb2, run_service_pb2
from mint_core.errors import MintError
from support.catalog_rig import BASE_DIGEST, Rig, connected, digest_of

__all__ = ["Worker", "training_state"]


def training_state(run: str, step: int, worker: str) -> common_pb2.TrainingState:
    """A state that a worker says it has saved."""
    tenant = run.partition("/runs/")[0]
    state = common_pb2.TrainingState(
        run=run,
        step=step,
        weights_key=f"{tenant}/states/{worker}/{step}/weights.safetensors",
        optimizer_key=f"{tenant}/states/{worker}/{step}/optimizer.safetensors",
    )
    state.weights.digest, state.weights.size_bytes = digest_of(f"{worker}-{step}-weights"), 100
    state.optimizer.digest, state.optimizer.size_bytes = digest_of(f"{worker}-{step}-optimizer"), 200
    return state


class Worker:
    """What the holder of a claim's lease writes."""

    def __init__(self, rig: Rig, name: str, claim: work_service_pb2.ClaimRunResponse) -> None:
        self._rig = rig
        self._name = name
        self.run = claim.run
        self.fence = claim.lease.fence

    async def renew(self, _step: int = 0) -> None:
        await self._rig.call(self._rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=self.fence))

    async def report(self, step: int) -> None:
        request = work_service_pb2.ReportRunRequest(name=self.run.name, fence=self.fence)
        request.progress.step = step
        request.steps.add(step=step, loss=1.0 / step)
        await self._rig.call(self._rig.work.ReportRun, request)

    async def record_rollout(self, step: int) -> None:
        rollout_id = f"{self._name}-{step}"
        request = self._rig.rollout(self.run.policy, rollout_id, self.fence, run=self.run.name, step=step)
        await self._rig.call(self._rig.rollouts.CreateRollout, request)

    async def commit_state(self, step: int) -> None:
        request = work_service_pb2.CommitTrainingStateRequest(name=self.run.name, fence=self.fence)
        request.state.CopyFrom(training_state(self.run.name, step, self._name))
        await self._rig.call(self._rig.work.CommitTrainingState, request)

    async def publish(self, step: int) -> None:
        request = publish_service_pb2.PublishRevisionRequest(parent=self.run.policy, fence=self.fence)
        request.revision.blob.CopyFrom(await self._rig.blob(self.run.policy, f"{self._name}-{step}"))
        request.revision.base_digest, request.revision.lora.rank = BASE_DIGEST, 4
        request.revision.lineage.run, request.revision.lineage.step = self.run.name, step
        await self._rig.call(self._rig.publish.PublishRevision, request)

    async def record_evaluation(self, step: int) -> None:
        request = evaluation_service_pb2.CreateEvaluationRequest(
            parent=self.run.policy, evaluation_id=f"{self._name}-{step}", fence=self.fence
        )
        request.evaluation.revision = f"{self.run.policy}/revisions/1"
        request.evaluation.scorer, request.evaluation.data_digest = "exact_match", digest_of("data")
        request.evaluation.num_examples, request.evaluation.run = 3, self.run.name
        request.evaluation.metrics["score_mean"] = 0.5
        await self._rig.call(self._rig.evaluations.CreateEvaluation, request)

    async def delete_rollout(self, step: int) -> None:
        name = f"{self.run.policy}/rollouts/{self._name}-{step}"
        request = rollout_service_pb2.DeleteRolloutRequest(name=name, fence=self.fence)
        await self._rig.call(self._rig.rollouts.DeleteRollout, request)

    async def finish(self, _step: int = 0) -> None:
        request = work_service_pb2.FinishRunRequest(
            name=self.run.name, fence=self.fence, state=run_service_pb2.RUN_STATE_SUCCEEDED
        )
        await self._rig.call(self._rig.work.FinishRun, request)

    async def release(self, _step: int = 0) -> None:
        await self._rig.call(self._rig.work.ReleaseLease, work_service_pb2.ReleaseLeaseRequest(fence=self.fence))

    async def work_a_step(self, step: int) -> None:
        """All that a step writes."""
        for write in (self.report, self.commit_state, self.publish, self.record_rollout, self.record_evaluation):
            await write(step)

    @property
    def writes(self) -> dict[str, Callable[[int], Coroutine[Any, Any, None]]]:
        """Every write, by name."""
        return {
            "renew": self.renew,
            "report": self.report,
            "commit state": self.commit_state,
            "publish": self.publish,
            "create rollout": self.record_rollout,
            "delete rollout": self.delete_rollout,
            "create evaluation": self.record_evaluation,
            "finish": self.finish,
            "release": self.release,
        }


async def _outcome(write: Coroutine[Any, Any, None]) -> str:
    try:
        await write
    except MintError as error:
        return error.reason
    return "OK"


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def _main(public: str, runtime: str, ttl_s: int) -> None:
    async with connected(public, runtime) as rig:
        worker = Worker(rig, "holder-0001", await rig.claim("holder-0001", ttl_s))
        await worker.work_a_step(1)
        _say({"run": worker.run.name, "fence": worker.fence.token})
        while await _outcome(worker.renew()) == "OK":  # noqa: ASYNC110 - nobody tells it
            await asyncio.sleep(ttl_s / 4)
        old = {"delete rollout": 1}
        answers = {name: await _outcome(write(old.get(name, 2))) for name, write in worker.writes.items()}
        _say(answers)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
