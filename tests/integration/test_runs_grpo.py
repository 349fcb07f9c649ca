"""Reinforcement learning over real services: rollouts are kept, revisions follow each other, bad scorers do no harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from mint_api.v1 import run_service_pb2, scorer_service_pb2, scorer_service_pb2_grpc
from mint_blobs import ObjectStoreSettings
from mint_blobs.s3 import S3ObjectStore
from mint_client import MintClient
from mint_core.errors import NotFound
from mint_runs.rollouts.batch import RolloutBatch
from mint_runs.rollouts.codec import read_batch
from support.invariants import Invariants
from support.publishing import create_policy
from support.stack import Stack, running_stack
from support.tiny_models import make_tiny_llama

NUM_STEPS = 3
GROUP_SIZE = 4
NUM_PROMPTS_PER_STEP = 2
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Installation:
    """A running stack whose runs worker knows a remote scorer at ``scorer_address``."""

    stack: Stack
    scorer_address: str


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    base = make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)
    environ = {"MINT_RUNS_REMOTE_SCORERS": json.dumps({"remote": address})}
    with running_stack(tmp_path_factory.mktemp("stack"), base, environ=environ) as stack:
        yield Installation(stack, address)


class Scorer(scorer_service_pb2_grpc.ScorerServiceServicer):
    """Rewards short texts, unless the line's ``mode`` wants it to misbehave."""

    def __init__(self) -> None:
        self.num_samples = 0

    async def ScoreSamples(
        self, request: scorer_service_pb2.ScoreSamplesRequest, context: Any
    ) -> scorer_service_pb2.ScoreSamplesResponse:
        self.num_samples += len(request.samples)
        scores = []
        for place, sample in enumerate(request.samples):
            mode = json.loads(sample.example_json).get("mode", "")
            if mode == "hang":
                await asyncio.sleep(60)
            if mode == "raise":
                await context.abort(grpc.StatusCode.INTERNAL, "a bug in the scorer")
            nonsense = mode == "nonsense" and place % 2
            scores.append(
                scorer_service_pb2.Score(
                    value=1.0 if mode == "equal" else float("nan") if nonsense else 1.0 / (1 + len(sample.completion))
                )
            )
        return scorer_service_pb2.ScoreSamplesResponse(scores=scores)


@contextlib.asynccontextmanager
async def serving(address: str) -> AsyncIterator[Scorer]:
    server, scorer = grpc.aio.server(), Scorer()
    scorer_service_pb2_grpc.add_ScorerServiceServicer_to_server(scorer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield scorer
    finally:
        await server.stop(None)


def write_prompts(path: Path, mode: str = "") -> Path:
    lines = [json.dumps({"prompt": f"Say {i} and", "completion": f"{i}", "mode": mode}) for i in range(5)]
    path.write_text("\n".join(lines) + "\n")
    return path


async def start_run(
    installation: Installation, client: MintClient, work: Path, *, policy: str = "", mode: str = "", **values: Any
) -> run_service_pb2.Run:
    recipe = run_service_pb2.GrpoRecipe(
        prompts=await client.blobs.upload("acme", write_prompts(work / "prompts.jsonl", mode)),
        num_steps=NUM_STEPS,
        num_prompts_per_step=NUM_PROMPTS_PER_STEP,
        group_size=GROUP_SIZE,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=7,
        optimizer=run_service_pb2.OptimizerConfig(learning_rate=1e-3),
    )
    recipe.MergeFrom(run_service_pb2.GrpoRecipe(**({"scorer": "remote"} | values)))
    run = run_service_pb2.Run(
        policy=policy or await create_policy(installation.stack, client),
        grpo=recipe,
        publish=True,
        promote_alias="live",
        continue_from_latest=bool(policy),
    )
    return await client.runs.create("acme", run)


async def finish(client: MintClient, name: str) -> run_service_pb2.Run:
    async with asyncio.timeout(150):
        run = await client.runs.wait(name)
    assert run.state == run_service_pb2.RUN_STATE_SUCCEEDED, run.error
    return run


async def read_rollouts(stack: Stack, client: MintClient, run: run_service_pb2.Run, work: Path) -> list[RolloutBatch]:
    """The run's batches, fetched by their pointers and decoded, by step."""
    import tomllib

    settings = tomllib.loads((stack.state / "mint.toml").read_text())["common"]["object_store"]
    batches = []
    async with S3ObjectStore(ObjectStoreSettings.model_validate(settings)) as store:
        pointers = [pointer async for pointer in client.rollouts.list(run.policy, run=run.name)]
        for pointer in sorted(pointers, key=lambda pointer: pointer.step):
            path = work / f"batch-{pointer.step}"
            await store.get_file(pointer.object_key, path, digest=pointer.blob.digest)
            batch = await asyncio.to_thread(read_batch, path, key=pointer.object_key)
            assert (pointer.revision, pointer.num_samples) == (batch.revision, batch.num_samples)
            assert pointer.reward_mean == pytest.approx(batch.reward_mean)
            batches.append(batch)
    return batches


@pytest.mark.timeout(400)
@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_a_run_keeps_its_rollouts_and_publishes_every_step(
    installation: Installation, work: Path, max_staleness: int
) -> None:
    stack = installation.stack
    async with stack.client() as client, serving(installation.scorer_address) as scorer:
        queued = await start_run(
            installation, client, work, max_staleness=max_staleness, promote_every_steps=2, kl_coefficient=0.01
        )
        run = await finish(client, queued.name)
        revisions = [revision async for revision in client.revisions.list(run.policy)]
        assert [revision.lineage.step for revision in revisions] == list(range(NUM_STEPS + 1))
        assert {revision.lineage.recipe for revision in revisions} == {"grpo"}
        assert all(each.lineage.data_digest and each.lineage.code_version for each in revisions)
        assert len({revision.blob.digest for revision in revisions}) == NUM_STEPS + 1, "every step learnt something"
        assert run.published_revision == revisions[-1].name
        alias = await client.aliases.get(f"{run.policy}/aliases/live")
        assert alias.active.revision_number == revisions[-1].number
        assert [entry.target.revision_number for entry in alias.history] == [4, 3]

        batches = await read_rollouts(stack, client, run, work)
        lag = [0, *[max_staleness] * (NUM_STEPS - 1)]
        assert [batch.revision for batch in batches] == [revisions[place - late].name for place, late in enumerate(lag)]
        for batch in batches:
            assert batch.numerics.engine_version.startswith("sglang")
            assert batch.num_samples == NUM_PROMPTS_PER_STEP * GROUP_SIZE
            assert batch.num_unscored == 0
            for group in batch.groups:
                for sample in group.samples:
                    await check_logprobs(client, batch.revision, group.prompt_token_ids, sample)
        assert scorer.num_samples == NUM_STEPS * NUM_PROMPTS_PER_STEP * GROUP_SIZE

        steps = [step async for step in client.runs.steps(run.name)]
        assert [step.step for step in steps] == [1, 2, 3]
        for step, batch in zip(steps, batches, strict=True):
            assert step.metrics["reward_mean"] == pytest.approx(batch.reward_mean)
            assert step.metrics["behavior_kl"] < 1e-3 or max_staleness, (
                "the trainer computes what the engine sampled by"
            )
            for name in ("sample_ms", "score_ms", "persist_ms", "update_ms", "save_ms", "export_ms", "step_ms"):
                assert step.metrics[name] > 0
        assert all("load_ms" in step.metrics for step in steps[-1:])
        await Invariants(stack).check(client, [run.policy])


async def check_logprobs(client: MintClient, revision: str, prompt_token_ids: tuple[int, ...], sample: Any) -> None:
    """The recorded log-probabilities are the revision's own, and a completion that stopped has its end token."""
    assert len(sample.token_ids) == len(sample.logprobs)
    assert (sample.finish_reason == "length") == (len(sample.token_ids) == MAX_NEW_TOKENS) or sample.token_ids
    scored = await client.score(revision, [*prompt_token_ids, *sample.token_ids])
    assert list(scored.logprobs[len(prompt_token_ids) - 1 :]) == pytest.approx(sample.logprobs, abs=1e-4)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("mode", ["equal", "raise", "hang", "nonsense"])
async def test_a_bad_scorer_keeps_the_run_alive(installation: Installation, work: Path, mode: str) -> None:
    stack = installation.stack
    async with stack.client() as client, serving(installation.scorer_address):
        queued = await start_run(installation, client, work, mode=mode, num_steps=2, scorer_timeout_s=0.2)
        run = await finish(client, queued.name)
        steps = [step async for step in client.runs.steps(run.name)]
        assert [step.step for step in steps] == [1, 2]
        revisions = [revision async for revision in client.revisions.list(run.policy)]
        digests = {revision.blob.digest for revision in revisions}
        num_samples = NUM_PROMPTS_PER_STEP * GROUP_SIZE
        num_unscored = {"equal": 0, "raise": num_samples, "hang": num_samples, "nonsense": num_samples // 2}[mode]
        assert [step.metrics["num_unscored"] for step in steps] == [num_unscored] * 2
        if mode == "nonsense":
            assert len(digests) > 1
        else:
            assert [step.metrics["num_uninformative_groups"] for step in steps] == [NUM_PROMPTS_PER_STEP] * 2
            assert len(digests) == 1, "a step without samples changes nothing"


@pytest.mark.timeout(200)
async def test_a_run_goes_on_from_another_and_from_sft_lines(installation: Installation, work: Path) -> None:
    stack = installation.stack
    async with stack.client() as client, serving(installation.scorer_address):
        first = await finish(client, (await start_run(installation, client, work, num_steps=1)).name)
        queued = await start_run(installation, client, work, policy=first.policy, num_steps=1)
        run = await finish(client, queued.name)
        revisions = [revision async for revision in client.revisions.list(run.policy)]
        assert [revision.lineage.parent_revision for revision in revisions] == [
            "",
            revisions[0].name,
            revisions[1].name,
        ]
        (batch,) = await read_rollouts(stack, client, run, work)
        assert batch.revision == revisions[1].name


@pytest.mark.timeout(200)
async def test_a_revision_and_the_base_are_evaluated(installation: Installation, work: Path) -> None:
    stack = installation.stack
    async with stack.client() as client, serving(installation.scorer_address):
        run = await finish(client, (await start_run(installation, client, work, num_steps=1)).name)
        data = await client.blobs.upload("acme", write_prompts(work / "held_out.jsonl"))
        means = []
        for model in (run.published_revision, stack.base_model):
            recipe = run_service_pb2.EvaluationRecipe(
                revision=model, data=data, scorer="remote", max_new_tokens=MAX_NEW_TOKENS
            )
            queued = await client.runs.create("acme", run_service_pb2.Run(policy=run.policy, evaluation=recipe))
            ended = await finish(client, queued.name)
            assert (ended.progress.step, ended.progress.num_steps) == (5, 5)
            evaluation = await client.evaluations.get(f"{run.policy}/evaluations/{queued.name.rpartition('/')[2]}")
            assert evaluation.revision == ("" if model == stack.base_model else model)
            assert (evaluation.num_examples, evaluation.metrics["num_unscored"]) == (5, 0)
            means.append(evaluation.metrics["score_mean"])
        assert all(0 < mean <= 1 for mean in means)


@pytest.mark.timeout(100)
async def test_an_unknown_scorer_fails_the_run_with_the_known_ones(installation: Installation, work: Path) -> None:
    async with installation.stack.client() as client:
        queued = await start_run(installation, client, work, scorer="guesswork")
        async with asyncio.timeout(60):
            run = await client.runs.wait(queued.name)
        assert run.state == run_service_pb2.RUN_STATE_FAILED
        assert run.num_attempts == 1
        assert "guesswork" in run.error
        assert "exact_match" in run.error
        with pytest.raises(NotFound):
            await client.aliases.get(f"{run.policy}/aliases/live")
