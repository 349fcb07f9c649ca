"""A GRPO run changes hands: a stored batch is trained on bit for bit, and who slept past its lease writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from pathlib import Path

import pytest

from mint_api.v1 import common_pb2, revision_service_pb2, run_service_pb2
from mint_blobs import ObjectStore
from mint_client import MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core import errors
from support.conductor import Conductor, Held
from support.grpo_runs import TENANT, check_ended, grpo_recipe, start_grpo
from support.log_reader import LogReader
from support.stack import Stack

TIMEOUT_S = 90.0
MAX_OBJECT_BYTES = 1 << 24


async def hold_in_second_step(conductor: Conductor, point: str) -> Held:
    """The worker at ``point`` of the run's second step, which starts from weights that are not fresh any more."""
    (await conductor.hold("runs.promoted", timeout_s=TIMEOUT_S)).go_on()
    return await conductor.hold(point, timeout_s=TIMEOUT_S)


async def finish(stack: Stack, client: MintClient, name: str) -> run_service_pb2.Run:
    async with asyncio.timeout(TIMEOUT_S):
        run = await client.runs.wait(name)
    await check_ended(stack, client, run)
    return run


def kinds(run: run_service_pb2.Run) -> set[str]:
    return {event.kind for event in run.events}


async def saved_states(store: ObjectStore, run: run_service_pb2.Run, step: int) -> list[dict[str, bytes]]:
    """Every state that was stored of ``step``, oldest fence first: the bytes of its objects by their names."""
    prefix = f"tenants/{TENANT}/states/{run.policy.rpartition('/')[2]}/{run.name.rpartition('/')[2]}/{step:08d}-"
    states: dict[int, dict[str, bytes]] = {}
    async for found in store.list(prefix):
        fence, _, name = found.key.removeprefix(prefix).partition("/")
        states.setdefault(int(fence), {})[name] = await store.get_bytes(found.key, max_bytes=MAX_OBJECT_BYTES)
    return [states[fence] for fence in sorted(states)]


@pytest.mark.timeout(180)
async def test_a_stored_batch_is_trained_on_again_bit_for_bit(
    armed_stack: Stack, conductor: Conductor, work: Path
) -> None:
    async with armed_stack.client() as client, armed_stack.object_store() as store:
        queued = await start_grpo(armed_stack, client, work, grpo_recipe(3))
        held = await hold_in_second_step(conductor, "runs.saved")
        before = [rollout async for rollout in client.rollouts.list(queued.policy, run=queued.name)]
        held.kill()  # the second step's state is stored, and nobody knows
        run = await finish(armed_stack, client, queued.name)
        after = [rollout async for rollout in client.rollouts.list(run.policy, run=run.name)]
        assert "replayed" in kinds(run)
        assert [rollout for rollout in after if rollout.step <= 2] == before
        once, again = await saved_states(store, run, step=2)
        assert set(once) == {"weights.safetensors", "optimizer.safetensors"}
        assert once == again
        (third,) = await saved_states(store, run, step=3)
        assert third != again


@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", ["runs.sampling", "runs.scored"])
async def test_a_batch_that_was_not_stored_is_sampled_again_and_the_run_says_so(
    armed_stack: Stack, conductor: Conductor, work: Path, point: str
) -> None:
    async with armed_stack.client() as client:
        queued = await start_grpo(armed_stack, client, work, grpo_recipe(2))
        (await hold_in_second_step(conductor, point)).kill()
        run = await finish(armed_stack, client, queued.name)
        assert "resampled" in kinds(run)
        assert "replayed" not in kinds(run)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", ["runs.scored", "runs.saved", "runs.exported"])
async def test_a_worker_that_slept_through_its_lease_writes_nothing(
    armed_stack: Stack, conductor: Conductor, work: Path, point: str
) -> None:
    """Stopped before it stores a batch, commits a state or moves the alias; awake when its successor has finished."""
    stack = armed_stack
    async with stack.client() as client, stack.object_store() as store:
        queued = await start_grpo(stack, client, work, grpo_recipe(4))
        zombie = await hold_in_second_step(conductor, point)
        fence = await fence_of(stack, queued.policy)
        with stack.second("runs") as successor:
            taken_over = await conductor.hold("runs.persisted", timeout_s=TIMEOUT_S)
            assert taken_over.service == successor
            await assert_refused(stack, client, queued.name, fence)
            taken_over.go_on()
            run = await finish(stack, client, queued.name)
            assert run.num_attempts == 2
        before = await everything_of(client, store, run)
        log = LogReader.at_end(stack.log("runs"))
        zombie.go_on()
        lost = await log.wait_for("lease lost", timeout_s=TIMEOUT_S)
        assert lost["run"] == run.name
        # It is the only worker now: when another run has ended, it has long given up the first.
        await finish(stack, client, (await start_grpo(stack, client, work, grpo_recipe(1))).name)
        assert await everything_of(client, store, run) == before


async def fence_of(stack: Stack, policy: str) -> common_pb2.Fence:
    async with WorkClient(stack.address("catalog", runtime=True)) as work:
        return next(lease.fence for lease in await work.list_leases(TENANT) if lease.fence.resource == policy)


async def assert_refused(stack: Stack, client: MintClient, name: str, fence: common_pb2.Fence) -> None:
    """Every kind of write of a worker, under a fence that was superseded: a clock alone protects nobody."""
    run = await client.runs.get(name)
    rollout = [rollout async for rollout in client.rollouts.list(run.policy, run=name)][-1]
    rollout.ClearField("name")
    state = run.latest_training_state
    state.step, state.fence = state.step + 1, fence.token
    lineage = revision_service_pb2.Lineage(run=name, step=state.step)
    async with (
        WorkClient(stack.address("catalog", runtime=True)) as work,
        ExporterClient(stack.address("exporter", runtime=True)) as exporter,
    ):
        writes: Mapping[str, Awaitable[object]] = {
            "renew": work.renew_lease(fence),
            "report": work.report_run(name, fence, progress=run.progress),
            "rollout": client.rollouts.create(run.policy, "of-a-zombie", rollout, fence),
            "commit": work.commit_training_state(name, fence, state),
            "export": exporter.export(run.policy, state, fence, lineage=lineage),
            "finish": work.finish_run(name, fence, run_service_pb2.RUN_STATE_SUCCEEDED),
        }
        answers = await asyncio.gather(*writes.values(), return_exceptions=True)
    refused = {kind: type(answer) for kind, answer in zip(writes, answers, strict=True)}
    assert refused == dict.fromkeys(writes, errors.LeaseLost)


async def everything_of(client: MintClient, store: ObjectStore, run: run_service_pb2.Run) -> list[object]:
    """All that the catalog and the object store have of a run and its policy."""
    policy_id = run.policy.rpartition("/")[2]
    prefixes = [f"tenants/{TENANT}/{kind}/{policy_id}/" for kind in ("states", "rollouts")]
    return [
        await client.runs.get(run.name),
        await client.policies.get(run.policy),
        await client.aliases.list(run.policy),
        [step async for step in client.runs.steps(run.name)],
        [revision async for revision in client.revisions.list(run.policy)],
        [rollout async for rollout in client.rollouts.list(run.policy)],
        [[found async for found in store.list(prefix)] for prefix in prefixes],
    ]
