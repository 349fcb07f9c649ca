"""The client against scripted services on a loopback port."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import work_service_pb2, work_service_pb2_grpc
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    blob_service_pb2,
    blob_service_pb2_grpc,
    common_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)
from mint_client import Endpoints, MintClient, as_prompt
from mint_client.runtime import WorkClient
from mint_core.config import ServiceSettings
from mint_core.errors import (
    BlobCorrupt,
    EtagMismatch,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from mint_core.server import Binding, Services, running

RUN = "tenants/acme/runs/r1"


class Scripted(
    policy_service_pb2_grpc.PolicyServiceServicer,
    alias_service_pb2_grpc.AliasServiceServicer,
    run_service_pb2_grpc.RunServiceServicer,
    rollout_service_pb2_grpc.RolloutServiceServicer,
    evaluation_service_pb2_grpc.EvaluationServiceServicer,
    work_service_pb2_grpc.WorkServiceServicer,
    blob_service_pb2_grpc.BlobServiceServicer,
    inference_service_pb2_grpc.InferenceServiceServicer,
):
    """All services that the tests call; each test sets what is answered."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.failures: list[Exception] = []
        self.watches: list[list[Any]] = []
        self.received = bytearray()
        self.break_after: int | None = None
        self.blob = b""
        self.generated: list[Any] = []

    def _take(self, request: Any) -> None:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)

    async def CreatePolicy(self, request: Any, context: Any) -> Any:
        self._take(request)
        policy = policy_service_pb2.Policy(name=f"{request.parent}/policies/{request.policy_id}")
        return policy_service_pb2.CreatePolicyResponse(policy=policy)

    async def ListPolicies(self, request: Any, context: Any) -> Any:
        self._take(request)
        place = int(request.page_token or 0)
        names = [policy_service_pb2.Policy(name=f"p{place + i}") for i in range(2)]
        return policy_service_pb2.ListPoliciesResponse(
            policies=names, next_page_token=str(place + 2) if place < 4 else ""
        )

    async def PromoteAlias(self, request: Any, context: Any) -> Any:
        self._take(request)
        return alias_service_pb2.PromoteAliasResponse(alias=alias_service_pb2.Alias(name=request.name))

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for item in self.watches.pop(0):
            if isinstance(item, Exception):
                raise item
            yield run_service_pb2.WatchRunResponse(run=run_service_pb2.Run(name=request.name, state=item))

    async def ListRunSteps(self, request: Any, context: Any) -> Any:
        self._take(request)
        first = int(request.page_token or 1)
        steps = [run_service_pb2.RunStep(step=first), run_service_pb2.RunStep(step=first + 1)]
        return run_service_pb2.ListRunStepsResponse(steps=steps, next_page_token=str(first + 2) if first < 5 else "")

    async def CreateRollout(self, request: Any, context: Any) -> Any:
        self._take(request)
        rollout = rollout_service_pb2.Rollout(name=f"{request.parent}/rollouts/{request.rollout_id}")
        return rollout_service_pb2.CreateRolloutResponse(rollout=rollout)

    async def GetRollout(self, request: Any, context: Any) -> Any:
        self._take(request)
        return rollout_service_pb2.GetRolloutResponse(rollout=rollout_service_pb2.Rollout(name=request.name))

    async def ListRollouts(self, request: Any, context: Any) -> Any:
        self._take(request)
        rollout = rollout_service_pb2.Rollout(name=f"{request.parent}/rollouts/{request.page_token or 'a'}")
        return rollout_service_pb2.ListRolloutsResponse(
            rollouts=[rollout], next_page_token="" if request.page_token else "b"
        )

    async def DeleteRollout(self, request: Any, context: Any) -> Any:
        self._take(request)
        return rollout_service_pb2.DeleteRolloutResponse()

    async def CreateEvaluation(self, request: Any, context: Any) -> Any:
        self._take(request)
        evaluation = evaluation_service_pb2.Evaluation(name=f"{request.parent}/evaluations/{request.evaluation_id}")
        return evaluation_service_pb2.CreateEvaluationResponse(evaluation=evaluation)

    async def GetEvaluation(self, request: Any, context: Any) -> Any:
        self._take(request)
        evaluation = evaluation_service_pb2.Evaluation(name=request.name)
        return evaluation_service_pb2.GetEvaluationResponse(evaluation=evaluation)

    async def ListEvaluations(self, request: Any, context: Any) -> Any:
        self._take(request)
        evaluation = evaluation_service_pb2.Evaluation(name=f"{request.parent}/evaluations/e")
        return evaluation_service_pb2.ListEvaluationsResponse(evaluations=[evaluation])

    async def ReportRun(self, request: Any, context: Any) -> Any:
        self._take(request)
        return work_service_pb2.ReportRunResponse(cancel_requested=True)

    async def GetUpload(self, request: Any, context: Any) -> Any:
        self._take(request)
        return blob_service_pb2.GetUploadResponse(
            committed_bytes=len(self.received), verified=bool(self.blob) and bytes(self.received) == self.blob
        )

    async def UploadBlob(self, requests: AsyncIterator[Any], context: Any) -> Any:
        size_bytes = 0
        async for request in requests:
            self.requests.append(request)
            if request.WhichOneof("content") == "announcement":
                size_bytes = request.announcement.size_bytes
                continue
            assert request.chunk.offset == len(self.received)
            assert len(request.chunk.data) <= 1 << 20
            self.received += request.chunk.data
            if self.break_after is not None and len(self.received) >= self.break_after:
                self.break_after = None
                raise Unavailable("broke", retry_after_s=0.01)
        digest = f"sha256:{hashlib.sha256(self.received).hexdigest()}"
        return blob_service_pb2.UploadBlobResponse(blob=common_pb2.BlobRef(digest=digest, size_bytes=size_bytes))

    async def DownloadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for start in range(0, len(self.blob), 3):
            chunk = blob_service_pb2.BlobChunk(offset=start, data=self.blob[start : start + 3])
            yield blob_service_pb2.DownloadBlobResponse(chunk=chunk)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._take(request)
        for item in self.generated:
            yield item


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, MintClient]]:
    servicer = Scripted()
    bindings = [
        Binding(getattr(grpc_module, f"add_{name}Servicer_to_server"), servicer, f"mint.{version}.{name}")
        for grpc_module, version, name in [
            (policy_service_pb2_grpc, "v1", "PolicyService"),
            (alias_service_pb2_grpc, "v1", "AliasService"),
            (run_service_pb2_grpc, "v1", "RunService"),
            (rollout_service_pb2_grpc, "v1", "RolloutService"),
            (evaluation_service_pb2_grpc, "v1", "EvaluationService"),
            (work_service_pb2_grpc, "runtime.v1", "WorkService"),
            (blob_service_pb2_grpc, "v1", "BlobService"),
            (inference_service_pb2_grpc, "v1", "InferenceService"),
        ]
    ]

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield Services(public=bindings)

    settings = ServiceSettings.model_construct(
        **{name: field.default for name, field in ServiceSettings.model_fields.items()} | {"grace_s": 0.0}
    )
    async with running("scripted", settings, build) as addresses:
        at = addresses.public
        async with MintClient(Endpoints(catalog=at, inference=at, exporter=at), timeout_s=5) as client:
            yield servicer, client


async def test_changing_calls_carry_a_request_id_of_their_own(scripted: Any) -> None:
    servicer, client = scripted
    policy = await client.policies.create("acme", "tone", base_model="baseModels/b")
    await client.policies.create("acme", "tone2", base_model="baseModels/b")
    assert policy.name == "tenants/acme/policies/tone"
    ids = [uuid.UUID(request.request_id) for request in servicer.requests]
    assert [one.version for one in ids] == [4, 4]
    assert len(set(ids)) == 2


async def test_a_call_repeated_by_the_transport_keeps_its_request_id(scripted: Any) -> None:
    servicer, client = scripted
    servicer.failures = [Unavailable("not yet", retry_after_s=None)]
    await client.policies.create("acme", "tone", base_model="baseModels/b")
    assert len(servicer.requests) == 2
    assert servicer.requests[0] == servicer.requests[1]


async def test_failures_are_errors_of_mint(scripted: Any) -> None:
    servicer, client = scripted
    servicer.failures = [EtagMismatch("changed", metadata={"resource": "a"})]
    with pytest.raises(EtagMismatch) as caught:
        await client.aliases.promote("tenants/acme/policies/tone/aliases/live", 2)
    assert caught.value.metadata == {"resource": "a"}


async def test_waiting_for_residency_extends_the_deadline(scripted: Any) -> None:
    servicer, client = scripted
    await client.aliases.promote("a", 1, min_resident_replicas=2, residency_timeout_s=1.5)
    assert servicer.requests[0].residency_timeout.ToMilliseconds() == 1500
    await client.aliases.promote("a", 1)
    assert not servicer.requests[1].HasField("residency_timeout")


async def test_lists_go_through_all_pages(scripted: Any) -> None:
    _, client = scripted
    assert [policy.name async for policy in client.policies.list("acme")] == [f"p{i}" for i in range(6)]


async def test_rollouts(scripted: Any) -> None:
    servicer, client = scripted
    policy, fence = "tenants/acme/policies/tone", common_pb2.Fence(resource="tenants/acme/policies/tone", token=3)
    rollout = rollout_service_pb2.Rollout(run=RUN, step=4)
    created = await client.rollouts.create(policy, "r1-4", rollout, fence)
    assert created.name == f"{policy}/rollouts/r1-4"
    assert (servicer.requests[0].rollout, servicer.requests[0].fence) == (rollout, fence)
    assert (await client.rollouts.get(created.name)).name == created.name
    names = [each.name async for each in client.rollouts.list(policy, run=RUN, page_size=1)]
    assert names == [f"{policy}/rollouts/a", f"{policy}/rollouts/b"]
    assert {(request.run, request.page_size) for request in servicer.requests[2:]} == {(RUN, 1)}
    await client.rollouts.delete(created.name, fence)
    assert (servicer.requests[-1].name, servicer.requests[-1].fence) == (created.name, fence)


async def test_evaluations(scripted: Any) -> None:
    servicer, client = scripted
    policy, fence = "tenants/acme/policies/tone", common_pb2.Fence(resource=RUN, token=3)
    evaluation = evaluation_service_pb2.Evaluation(run=RUN, metrics={"score_mean": 0.5})
    created = await client.evaluations.create(policy, "r1", evaluation, fence=fence)
    assert created.name == f"{policy}/evaluations/r1"
    assert (servicer.requests[0].evaluation, servicer.requests[0].fence) == (evaluation, fence)
    await client.evaluations.create(policy, "by-hand", evaluation)
    assert not servicer.requests[1].HasField("fence")
    assert (await client.evaluations.get(created.name)).name == created.name
    assert [each.name async for each in client.evaluations.list(policy)] == [f"{policy}/evaluations/e"]


async def test_steps_of_a_run_are_reported_and_listed(scripted: Any) -> None:
    servicer, client = scripted
    assert [each.step async for each in client.runs.steps(RUN)] == [1, 2, 3, 4, 5, 6]
    steps = [run_service_pb2.RunStep(step=step, loss=0.5) for step in (1, 2)]
    fence = common_pb2.Fence(resource="tenants/acme/policies/tone", token=3)
    async with WorkClient(client.endpoints.catalog) as work:
        assert await work.report_run(RUN, fence, steps=steps)
    assert list(servicer.requests[-1].steps) == steps
    assert not servicer.requests[-1].HasField("progress")


async def test_an_address_that_was_not_given_is_named() -> None:
    async with MintClient(Endpoints()) as client:
        with pytest.raises(FailedPrecondition, match="no address of the trainer"):
            await client.sessions.get("tenants/acme/sessions/s")


async def test_a_watch_survives_a_catalog_that_restarts(scripted: Any) -> None:
    servicer, client = scripted
    queued, running_, done = 1, 2, 4
    servicer.watches = [[queued, Unavailable("away", retry_after_s=0.01)], [running_], [done]]
    states = [run.state async for run in client.runs.watch(RUN, patience_s=20)]
    assert states == [queued, running_, done]


async def test_a_watch_gives_up_when_patience_is_over(scripted: Any) -> None:
    servicer, client = scripted
    servicer.watches = [[Unavailable("away", retry_after_s=0.05)] for _ in range(20)]
    with pytest.raises(Unavailable):
        await client.runs.wait(RUN, patience_s=0.1)


async def test_a_watch_of_nothing_ends_at_once(scripted: Any) -> None:
    servicer, client = scripted
    servicer.watches = [[NotFound("no such run")]]
    with pytest.raises(NotFound):
        await client.runs.wait(RUN)


async def test_an_upload_goes_on_where_it_broke(scripted: Any, tmp_path: Path) -> None:
    servicer, client = scripted
    content = bytes(range(256)) * 12_000  # three chunks
    path = tmp_path / "data"
    path.write_bytes(content)
    servicer.break_after = 1 << 20
    blob = await client.blobs.upload("acme", path)
    assert bytes(servicer.received) == content
    assert (blob.digest, blob.size_bytes) == (f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
    announced = [r for r in servicer.requests if getattr(r, "announcement", None) and r.HasField("announcement")]
    assert len(announced) == 2


async def test_what_is_stored_already_is_not_sent(scripted: Any, tmp_path: Path) -> None:
    servicer, client = scripted
    servicer.blob = b"stored"
    servicer.received = bytearray(b"stored")
    path = tmp_path / "data"
    path.write_bytes(b"stored")
    await client.blobs.upload("acme", path)
    assert len(servicer.requests) == 1


async def test_a_file_that_cannot_be_read_is_named(scripted: Any, tmp_path: Path) -> None:
    _, client = scripted
    with pytest.raises(InvalidArgument, match="absent"):
        await client.blobs.upload("acme", tmp_path / "absent")


async def test_a_download_with_another_digest_is_not_kept(scripted: Any, tmp_path: Path) -> None:
    servicer, client = scripted
    servicer.blob = b"some bytes"
    good = f"tenants/acme/blobs/sha256:{hashlib.sha256(b'some bytes').hexdigest()}"
    blob = await client.blobs.download(good, tmp_path / "good")
    assert (tmp_path / "good").read_bytes() == b"some bytes"
    assert blob.size_bytes == 10
    with pytest.raises(BlobCorrupt):
        await client.blobs.download(f"tenants/acme/blobs/sha256:{'0' * 64}", tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


async def test_a_generation_is_gathered(scripted: Any) -> None:
    servicer, client = scripted
    header = inference_service_pb2.GenerationHeader(
        resolution=alias_service_pb2.Resolution(revision="r@2", blob=common_pb2.BlobRef(digest="d")),
        engine_replica="e",
        cold=True,
        prompt_token_ids=[1, 2],
    )
    chunks = [
        inference_service_pb2.GeneratedChunk(text="Hel", token_ids=[5], logprobs=[-0.5]),
        inference_service_pb2.GeneratedChunk(
            text="lo",
            token_ids=[6, 7],
            logprobs=[-1, -2],
            finish_reason=1,
            num_prompt_tokens=2,
            num_completion_tokens=3,
        ),
    ]
    servicer.generated = [
        inference_service_pb2.GenerateResponse(header=header),
        *(inference_service_pb2.GenerateResponse(chunk=chunk) for chunk in chunks),
    ]
    answer = await client.generate_text("m", "Hi", return_logprobs=True)
    assert (answer.text, answer.token_ids, answer.logprobs) == ("Hello", (5, 6, 7), (-0.5, -1.0, -2.0))
    assert (answer.revision, answer.digest, answer.cold, answer.finish_reason) == ("r@2", "d", True, "stop")
    assert 0 < answer.first_token_s <= answer.total_s


async def test_a_generation_without_its_header_is_refused(scripted: Any) -> None:
    servicer, client = scripted
    servicer.generated = [inference_service_pb2.GenerateResponse(chunk=inference_service_pb2.GeneratedChunk(text="x"))]
    with pytest.raises(Internal, match="names the revision"):
        await client.generate_text("m", "Hi")


def test_what_may_be_a_prompt() -> None:
    assert as_prompt("Hi").text == "Hi"
    assert list(as_prompt([3, 4]).tokens.ids) == [3, 4]
    chat = as_prompt([{"role": "user", "content": "Hi"}]).chat
    assert (chat.messages[0].role, chat.messages[0].content) == ("user", "Hi")
    assert as_prompt(as_prompt("Hi")).text == "Hi"


@pytest.mark.parametrize("prompt", [[], [1, "a"], [{"role": "user"}], [{"role": "user", "content": "a", "x": "b"}]])
def test_what_may_not_be_a_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="neither text"):
        as_prompt(prompt)
