"""Commands around runs, against scripted services on a loopback port: what they ask for and what they print."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
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
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)
from mint_cli.main import run
from mint_cli.runs import figures_text
from mint_core.config import ServiceSettings
from mint_core.errors import FailedPrecondition, NotFound
from mint_core.server import Binding, Services, running

POLICY = "tenants/acme/policies/tone"
RUN = "tenants/acme/runs/r1"
DATA = '{"prompt": "1 + 1 =", "completion": " 2"}\n'
SUCCEEDED = run_service_pb2.RUN_STATE_SUCCEEDED
RUNNING = run_service_pb2.RUN_STATE_RUNNING


class Scripted(
    run_service_pb2_grpc.RunServiceServicer,
    blob_service_pb2_grpc.BlobServiceServicer,
    alias_service_pb2_grpc.AliasServiceServicer,
    evaluation_service_pb2_grpc.EvaluationServiceServicer,
    rollout_service_pb2_grpc.RolloutServiceServicer,
    work_service_pb2_grpc.WorkServiceServicer,
):
    """All services that the commands call; each test sets what is answered."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.uploaded: dict[str, bytes] = {}
        self.runs: list[run_service_pb2.Run] = []
        """What a watch shows, one after the other; the first is what is read and listed."""
        self.steps: list[run_service_pb2.RunStep] = []
        self.evaluation = evaluation_service_pb2.Evaluation()
        self.rollouts: list[rollout_service_pb2.Rollout] = []

    async def CreateRun(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        created = run_service_pb2.Run()
        created.CopyFrom(request.run)
        created.name = f"{request.parent}/runs/{request.run_id or 'r1'}"
        created.state = run_service_pb2.RUN_STATE_QUEUED
        return run_service_pb2.CreateRunResponse(run=created)

    async def GetRun(self, request: Any, context: Any) -> Any:
        if request.name != self.runs[0].name:
            raise NotFound(f"{request.name} does not exist")
        return run_service_pb2.GetRunResponse(run=self.runs[0])

    async def ListRuns(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return run_service_pb2.ListRunsResponse(runs=self.runs)

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for shown in self.runs:
            yield run_service_pb2.WatchRunResponse(run=shown)

    async def ListRunSteps(self, request: Any, context: Any) -> Any:
        start = int(request.page_token or 0)
        token = str(start + 10) if start + 10 < len(self.steps) else ""
        return run_service_pb2.ListRunStepsResponse(steps=self.steps[start : start + 10], next_page_token=token)

    async def CancelRun(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if self.runs[0].state == SUCCEEDED:
            raise FailedPrecondition(f"{request.name} has ended")
        cancelled = run_service_pb2.Run(name=request.name, state=run_service_pb2.RUN_STATE_CANCELLING)
        return run_service_pb2.CancelRunResponse(run=cancelled)

    async def RetryRun(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return run_service_pb2.RetryRunResponse(
            run=run_service_pb2.Run(name=request.name, state=run_service_pb2.RUN_STATE_QUEUED)
        )

    async def ListLeases(self, request: Any, context: Any) -> Any:
        assert request.parent == "tenants/acme"
        lease = work_service_pb2.Lease(resource=POLICY, holder="worker-0001")
        lease.fence.resource, lease.fence.token, lease.ttl.seconds = POLICY, 17, 30
        return work_service_pb2.ListLeasesResponse(leases=[lease])

    async def GetUpload(self, request: Any, context: Any) -> Any:
        return blob_service_pb2.GetUploadResponse()

    async def UploadBlob(self, requests: AsyncIterator[Any], context: Any) -> Any:
        data = b"".join([request.chunk.data async for request in requests])
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.uploaded[digest] = data
        return blob_service_pb2.UploadBlobResponse(blob=common_pb2.BlobRef(digest=digest, size_bytes=len(data)))

    async def Resolve(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return alias_service_pb2.ResolveResponse(
            resolution=alias_service_pb2.Resolution(revision=f"{POLICY}/revisions/7")
        )

    async def GetEvaluation(self, request: Any, context: Any) -> Any:
        self.evaluation.name = request.name
        return evaluation_service_pb2.GetEvaluationResponse(evaluation=self.evaluation)

    async def ListEvaluations(self, request: Any, context: Any) -> Any:
        assert request.parent == POLICY
        return evaluation_service_pb2.ListEvaluationsResponse(evaluations=[self.evaluation])

    async def ListRollouts(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return rollout_service_pb2.ListRolloutsResponse(rollouts=self.rollouts)


_MODULES = {
    "AliasService": alias_service_pb2_grpc,
    "BlobService": blob_service_pb2_grpc,
    "EvaluationService": evaluation_service_pb2_grpc,
    "RolloutService": rollout_service_pb2_grpc,
    "RunService": run_service_pb2_grpc,
}


@pytest.fixture
async def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Scripted]:
    servicer = Scripted()
    bindings = [
        Binding(getattr(module, f"add_{name}Servicer_to_server"), servicer, f"mint.v1.{name}")
        for name, module in _MODULES.items()
    ]

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        add_work = work_service_pb2_grpc.add_WorkServiceServicer_to_server
        yield Services(public=bindings, runtime=[Binding(add_work, servicer, "mint.runtime.v1.WorkService")])

    settings = ServiceSettings.model_construct(
        **{name: field.default for name, field in ServiceSettings.model_fields.items()} | {"grace_s": 0.0}
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(DATA)
    async with running("scripted", settings, build) as addresses:
        monkeypatch.setenv("MINT_ENDPOINTS_CATALOG", addresses.public)
        monkeypatch.setenv("MINT_ENDPOINTS_CATALOG_RUNTIME", addresses.runtime)
        monkeypatch.setenv("MINT_ENDPOINTS_EXPORTER", addresses.public)
        yield servicer


async def mint(*argv: str) -> int:
    """One command; it has an event loop of its own, so it gets a thread of its own."""
    return await asyncio.to_thread(run, argv)


def grpo_run(
    state: run_service_pb2.RunState.ValueType, step: int = 0, *kinds: str, **fields: Any
) -> run_service_pb2.Run:
    """A GRPO run of two steps as a watch shows it, with one event of each kind."""
    shown = run_service_pb2.Run(name=RUN, policy=POLICY, state=state, promote_alias="live", **fields)
    shown.grpo.num_steps = shown.progress.num_steps = 2
    shown.progress.step = step
    if step:
        shown.progress.loss = -0.01
        shown.progress.metrics["reward_mean"] = 0.25 * step
    shown.create_time.FromSeconds(0)
    for kind in kinds:
        event = shown.events.add(kind=kind, message=f"about {kind}")
        event.time.FromSeconds(len(shown.events))
    return shown


# mint train


async def test_grpo_asks_for_what_was_said(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "grpo", "acme/tone", "data.jsonl", "--scorer", "arithmetic", "--scorer-option", "partial=0.5"]
    argv += ["--scorer-timeout-s", "3", "--steps", "5", "--prompts-per-step", "4", "--group-size", "6"]
    argv += ["--max-new-tokens", "32", "--temperature", "0.9", "--stop", "\n", "--learning-rate", "1e-4"]
    argv += ["--max-grad-norm", "1", "--clip", "0.1", "--clip-high", "0.3", "--kl", "0.05", "--advantage", "centered"]
    argv += ["--weighting", "fixed-length", "--loss", "importance-sampling", "--sequence-level", "--staleness", "1"]
    argv += [
        "--priority",
        "-3",
        "--seed",
        "7",
        "--rollout-ttl-s",
        "60",
        "--continue",
        "--promote",
        "live",
        "--promote-every",
        "2",
    ]
    assert await mint(*argv, "--run-id", "mine") == 0
    assert capsys.readouterr().out == "queued acme/mine\n"
    (request,) = scripted.requests
    digest = f"sha256:{hashlib.sha256(DATA.encode()).hexdigest()}"
    assert scripted.uploaded == {digest: DATA.encode()}
    assert (request.parent, request.run_id) == ("tenants/acme", "mine")
    assert request.run == run_service_pb2.Run(
        policy=POLICY,
        continue_from_latest=True,
        publish=True,
        promote_alias="live",
        priority=-3,
        grpo=run_service_pb2.GrpoRecipe(
            prompts=common_pb2.BlobRef(digest=digest, size_bytes=len(DATA)),
            scorer="arithmetic",
            scorer_options={"partial": "0.5"},
            scorer_timeout_s=3,
            num_steps=5,
            num_prompts_per_step=4,
            group_size=6,
            max_new_tokens=32,
            temperature=0.9,
            stop=["\n"],
            optimizer=run_service_pb2.OptimizerConfig(learning_rate=1e-4, max_grad_norm=1),
            clip_epsilon=0.1,
            clip_epsilon_high=0.3,
            kl_coefficient=0.05,
            seed=7,
            advantage=run_service_pb2.GROUP_ADVANTAGE_CENTERED,
            weighting=run_service_pb2.TOKEN_WEIGHTING_FIXED_LENGTH,
            loss=common_pb2.LOSS_FUNCTION_IMPORTANCE_SAMPLING,
            sequence_level_ratio=True,
            max_staleness=1,
            promote_every_steps=2,
            rollout_ttl_s=60,
        ),
    )


@pytest.mark.parametrize(
    ("option", "values", "enum", "prefix"),
    [
        ("loss", ["ppo", "cispo", "importance-sampling", "dro"], common_pb2.LossFunction, "LOSS_FUNCTION_"),
        ("advantage", ["standardized", "centered"], run_service_pb2.GroupAdvantage, "GROUP_ADVANTAGE_"),
        (
            "weighting",
            ["token-mean", "sequence-mean", "fixed-length"],
            run_service_pb2.TokenWeighting,
            "TOKEN_WEIGHTING_",
        ),
    ],
)
async def test_every_choice_of_the_contract_can_be_made(
    scripted: Scripted, option: str, values: list[str], enum: Any, prefix: str
) -> None:
    for value in values:
        argv = ["train", "grpo", "acme/tone", "data.jsonl", "--scorer", "s", f"--{option}", value]
        assert await mint(*argv) == 0
    chosen = [enum.Name(getattr(request.run.grpo, option)) for request in scripted.requests]
    assert chosen == [prefix + value.upper().replace("-", "_") for value in values]
    assert set(chosen) == set(enum.keys()) - {f"{prefix}UNSPECIFIED", f"{prefix}CROSS_ENTROPY"}


async def test_watching_shows_figures_and_every_event_once(
    scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [f"e{i}" for i in range(64)]
    published = f"{POLICY}/revisions/9"
    scripted.runs = [
        grpo_run(RUNNING, 0, "claimed"),
        grpo_run(RUNNING, 1, "claimed", "persisted"),
        grpo_run(RUNNING, 1, *full),
        grpo_run(SUCCEEDED, 2, *full, "trained", published_revision=published),
    ]
    # The record keeps the 64 newest events: one has left it when the last comes.
    del scripted.runs[3].events[0]
    assert await mint("train", "grpo", "acme/tone", "data.jsonl", "--scorer", "s", "--watch") == 0
    out, err = capsys.readouterr()
    assert out == "succeeded after 2 steps, published acme/tone@9, promoted live\n"
    assert err.startswith("run acme/r1\n")
    told = [line.strip() for line in err.splitlines() if ": about " in line]
    assert told == [f"{kind}: about {kind}" for kind in ["claimed", "persisted", *full, "trained"]]
    assert "reward 0.500 loss -0.0100 " in err
    assert "2/2" in err


def test_the_bar_shows_how_far_the_next_batch_is() -> None:
    shown = grpo_run(RUNNING, 1)
    assert figures_text(shown) == "reward 0.250 loss -0.0100"
    shown.grpo.MergeFrom(run_service_pb2.GrpoRecipe(num_prompts_per_step=2, group_size=4))
    shown.progress.metrics["num_sampled"] = 3
    assert figures_text(shown) == "reward 0.250 loss -0.0100 sampled 3 of 8"


async def test_sft_queues_with_both_files(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    Path("heldout.jsonl").write_text(DATA * 2)
    argv = ["train", "sft", "acme/tone", "--data", "data.jsonl", "--eval-data", "heldout.jsonl", "--json"]
    assert await mint(*argv) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["state"], described["continue_from_latest"]) == ("QUEUED", False)
    assert described["sft"]["train_data"]["size_bytes"] == len(DATA)
    assert described["sft"]["eval_data"]["size_bytes"] == 2 * len(DATA)


async def test_a_file_that_is_not_there_is_named(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert await mint("train", "grpo", "acme/tone", "absent.jsonl", "--scorer", "s") == 1
    assert capsys.readouterr().err.startswith("error: INVALID_FIELD: cannot read 'absent.jsonl'")
    assert scripted.requests == []


# mint eval


async def test_an_alias_is_evaluated_at_its_revision_now(
    scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "acme/tone@live", "data.jsonl", "--scorer", "exact_match", "--temperature", "0.5"]
    assert await mint(*argv) == 0
    assert capsys.readouterr().out == "queued acme/r1: acme/tone@7 on data.jsonl\n"
    resolve, create = scripted.requests
    assert resolve.name == f"{POLICY}/aliases/live"
    recipe = create.run.evaluation
    assert create.run.policy == POLICY
    assert (recipe.revision, recipe.scorer, recipe.temperature) == (f"{POLICY}/revisions/7", "exact_match", 0.5)
    assert recipe.data.size_bytes == len(DATA)
    assert not create.run.publish


async def test_a_base_is_evaluated_for_a_policy(scripted: Scripted) -> None:
    argv = ["eval", "--scorer", "exact_match", "baseModels/b", "data.jsonl", "--policy", "acme/tone"]
    assert await mint(*argv) == 0
    (create,) = scripted.requests
    assert (create.run.policy, create.run.evaluation.revision) == (POLICY, "baseModels/b")


async def test_a_watched_evaluation_prints_its_figures(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run_service_pb2.Run(name=RUN, policy=POLICY, state=SUCCEEDED)
    ended.evaluation.revision = f"{POLICY}/revisions/2"
    ended.progress.metrics["score_mean"] = 0.75
    scripted.runs = [ended]
    scripted.evaluation = evaluation_service_pb2.Evaluation(
        revision=f"{POLICY}/revisions/2",
        revision_digest="sha256:a",
        scorer="exact_match",
        data_digest="sha256:b",
        num_examples=4,
        metrics={"score_mean": 0.75},
        run=RUN,
    )
    argv = ["eval", "acme/tone@2", "data.jsonl", "--scorer", "exact_match", "--watch"]
    assert await mint(*argv) == 0
    out, err = capsys.readouterr()
    assert {name: value.strip() for name, value in (line.split(maxsplit=1) for line in out.splitlines())} == {
        "evaluation": f"{POLICY}/evaluations/r1",
        "revision": "acme/tone@2 (sha256:a)",
        "scorer": "exact_match",
        "data": "sha256:b",
        "examples": "4",
        "score_mean": "0.75",
    }
    assert "score 0.750" in err
    assert await mint(*argv, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["run"]["state"] == "SUCCEEDED"
    assert described["evaluation"]["metrics"] == {"score_mean": 0.75}
    assert await mint("run", "watch", "acme/r1") == 0
    assert "score_mean" in capsys.readouterr().out


async def test_evaluations_are_listed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.evaluation = evaluation_service_pb2.Evaluation(
        name=f"{POLICY}/evaluations/e1", scorer="exact_match", num_examples=4, metrics={"score_mean": 0.75, "n": 1}
    )
    assert await mint("eval", "list", "acme/tone") == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["EVALUATION", "REVISION", "SCORER", "EXAMPLES", "FIGURES", "CREATED", "DATA"]
    assert row.split() == ["e1", "the", "base", "exact_match", "4", "n=1", "score_mean=0.75"]
    assert await mint("eval", "list", "acme/tone", "--json") == 0
    (described,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert described["metrics"]["score_mean"] == 0.75


# mint run, mint rollout


async def test_runs_are_listed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.runs = [grpo_run(RUNNING, 1)]
    assert await mint("run", "list", "acme") == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[:7] == ["acme/r1", "acme/tone", "grpo", "running", "1", "of", "2"]
    assert await mint("run", "list", "--policy", "acme/tone", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "RUNNING"
    assert [(request.parent, request.policy) for request in scripted.requests] == [
        ("tenants/acme", ""),
        ("tenants/acme", POLICY),
    ]


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (
            grpo_run(run_service_pb2.RUN_STATE_FAILED, 1, error="RESOURCE_NOT_FOUND: no scorer 'x'"),
            "error: RESOURCE_NOT_FOUND: no scorer 'x'\n",
        ),
        (
            grpo_run(run_service_pb2.RUN_STATE_CANCELLED, 1),
            f"error: PRECONDITION_FAILED: {RUN} was cancelled after step 1\n",
        ),
    ],
)
async def test_a_run_that_does_not_succeed_fails_the_command(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], last: run_service_pb2.Run, error: str
) -> None:
    scripted.runs = [grpo_run(RUNNING), last]
    assert await mint("run", "watch", "acme/r1", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["progress"]["step"] == 1
    assert err.endswith(error)


async def test_a_run_is_cancelled_with_a_reason(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.runs = [grpo_run(RUNNING)]
    assert await mint("run", "cancel", RUN, "--reason", "wrong data") == 0
    assert capsys.readouterr().out == "acme/r1 is cancelling\n"
    assert scripted.requests == [run_service_pb2.CancelRunRequest(name=RUN, reason="wrong data")]
    scripted.runs = [grpo_run(SUCCEEDED, 2)]
    assert await mint("run", "cancel", "acme/r1", "--json") == 1
    assert capsys.readouterr().err == f"error: PRECONDITION_FAILED: {RUN} has ended\n"


async def test_runs_are_chosen_by_state_or_as_dead_letters(scripted: Scripted) -> None:
    assert await mint("run", "list", "acme", "--state", "failed") == 0
    assert await mint("run", "list", "acme", "--dead-letter") == 0
    assert [(request.state, request.dead_letter) for request in scripted.requests] == [
        (run_service_pb2.RUN_STATE_FAILED, False),
        (run_service_pb2.RUN_STATE_UNSPECIFIED, True),
    ]


async def test_a_run_is_retried_with_a_reason(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert await mint("run", "retry", "acme/r1", "--reason", "the trainer is back") == 0
    assert capsys.readouterr().out == "acme/r1 is queued\n"
    (request,) = scripted.requests
    assert (request.name, request.reason) == (RUN, "the trainer is back")
    assert request.request_id


async def test_leases_are_listed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert await mint("lease", "list", "acme") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["RESOURCE", "HOLDER", "FENCE", "TTL"]
    assert row.split() == ["acme/tone", "worker-0001", "17", "30", "s"]
    assert await mint("lease", "list", "acme", "--json") == 0
    assert json.loads(capsys.readouterr().out)["leases"][0]["holder"] == "worker-0001"


async def test_a_run_is_described(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.runs = [grpo_run(RUNNING, 1, "claimed", worker="w1")]
    assert await mint("run", "describe", "acme/r1") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        ["state", "running"],
        ["progress", "1", "of", "2"],
        ["worker", "w1"],
        ["grpo.num_steps", "2"],
        ["metrics.reward_mean", "0.25"],
        ["1970-01-01T00:00:01.000+00:00", "claimed", "about", "claimed"],
    ):
        assert line in lines
    assert not any(line and line[0] in ("grpo.temperature", "grpo.loss") for line in lines)
    assert await mint("run", "describe", "acme/r1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["grpo"]["num_steps"] == 2
    assert await mint("run", "describe", "acme/other") == 1
    assert capsys.readouterr().err == "error: RESOURCE_NOT_FOUND: tenants/acme/runs/other does not exist\n"


async def test_a_run_is_drawn(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.runs = [grpo_run(SUCCEEDED, 2)]
    scripted.steps = [
        run_service_pb2.RunStep(step=n, loss=1 / n, metrics={"reward_mean": n / 25, "step_ms": 10.0})
        for n in range(1, 26)
    ]
    assert await mint("run", "plot", "acme/r1") == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines() if "mean of the last" in line] == [
        "loss per token",
        "mean reward",
    ]
    assert await mint("run", "plot", "acme/r1", "--metric", "step_ms") == 0
    assert capsys.readouterr().out.startswith("step (ms) ")
    assert await mint("run", "plot", "acme/r1", "--metric", "nope") == 1
    assert capsys.readouterr().err == (
        "error: INVALID_FIELD: metric is 'nope': no step of run acme/r1 has a number for it; there are "
        "loss, reward_mean, step_ms\n"
    )
    assert await mint("run", "plot", "acme/r1", "--png", "r.png", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["png"] == "r.png"
    assert [step["step"] for step in described["steps"]] == list(range(1, 26))
    assert Path("r.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert await mint("run", "plot", "acme/r1", "--png", "absent/r.png") == 1
    assert capsys.readouterr().err == (
        "error: INVALID_FIELD: png is 'absent/r.png': cannot be written: No such file or directory\n"
    )


async def test_a_run_without_steps_has_nothing_to_draw(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.runs = [grpo_run(RUNNING)]
    assert await mint("run", "plot", "acme/r1") == 1
    assert capsys.readouterr().err.startswith("error: PRECONDITION_FAILED: run acme/r1 has no figures of steps yet")


async def test_rollouts_are_listed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.rollouts = [
        rollout_service_pb2.Rollout(
            name=f"{POLICY}/rollouts/x",
            run=RUN,
            step=3,
            revision=f"{POLICY}/revisions/2",
            reward_mean=0.5,
            num_samples=16,
            num_unscored=1,
            num_tokens=640,
            blob=common_pb2.BlobRef(digest="sha256:0", size_bytes=999),
        )
    ]
    assert await mint("rollout", "list", "acme/tone", "--run", "acme/r1") == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["acme/r1", "3", "acme/tone@2", "0.5", "16", "1", "640", "999"]
    assert await mint("rollout", "list", "acme/tone", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rollouts"][0]["num_tokens"] == 640
    assert [(request.parent, request.run) for request in scripted.requests] == [(POLICY, RUN), (POLICY, "")]
