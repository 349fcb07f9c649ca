from __future__ import annotations

from datetime import UTC, datetime

import pytest
from unit.catalog.catalog_lab import Lab

from mint_catalog.model.records import Fence
from mint_catalog.model.run_records import RunProgress, RunStep
from mint_core.errors import InvalidArgument, LeaseLost, NotFound
from mint_core.names import RunName

R1 = RunName("acme", "r1")
TIME = datetime(2026, 1, 2, tzinfo=UTC)


async def _claimed() -> tuple[Lab, Fence]:
    lab = Lab()
    await lab.policy()
    await lab.run("r1")
    return lab, (await lab.claimed())[1]


async def _steps(lab: Lab, page_size: int = 0) -> list[RunStep]:
    steps: list[RunStep] = []
    token = ""
    while True:
        page = await lab.runs.steps(R1, page_size=page_size, page_token=token)
        steps += page.records
        token = page.next_page_token
        if not token:
            return steps


async def test_steps_are_kept_in_order_and_a_later_report_replaces_them() -> None:
    lab, fence = await _claimed()
    for step in (9, 10, 2, 100, 1):
        await lab.queue.report(R1, fence, None, steps=(RunStep(step, TIME, 1.0 / step, {"reward_mean": 0.5}),))
    assert [each.step for each in await _steps(lab)] == [1, 2, 9, 10, 100]
    assert [each.step for each in await _steps(lab, page_size=2)] == [1, 2, 9, 10, 100]
    await lab.queue.report(R1, fence, RunProgress(9), steps=(RunStep(9, None, 7.0),))
    replaced = (await _steps(lab))[2]
    assert (replaced.loss, replaced.metrics) == (7.0, {})
    assert replaced.time is not None, "the catalog says when, if the worker does not"
    assert replaced.mod_revision == (await lab.runs.get(R1)).mod_revision, "one transaction with the report"


async def test_a_hundred_steps_are_one_report_and_more_are_refused() -> None:
    lab, fence = await _claimed()
    steps = tuple(RunStep(step, TIME, 0.5) for step in range(1, 102))
    with pytest.raises(InvalidArgument) as caught:
        await lab.queue.report(R1, fence, None, steps=steps)
    assert caught.value.field == "steps"
    assert await _steps(lab) == []
    before = lab.store.num_txns
    await lab.queue.report(R1, fence, RunProgress(100), steps=steps[:100])
    assert lab.store.num_txns == before + 1
    assert len(await _steps(lab)) == 100


async def test_steps_of_a_superseded_worker_are_refused() -> None:
    lab, stale = await _claimed()
    await lab.queue.report(R1, stale, None, steps=(RunStep(1, TIME, 0.5),))
    await lab.store.pass_time(31)
    await lab.queue.reap()
    _, fence = await lab.claimed("worker-2")
    with pytest.raises(LeaseLost):
        await lab.queue.report(R1, stale, None, steps=(RunStep(1, TIME, 9.0), RunStep(2, TIME, 9.0)))
    await lab.queue.report(R1, fence, None, steps=(RunStep(2, TIME, 0.25),))
    assert [each.loss for each in await _steps(lab)] == [0.5, 0.25]


async def test_runs_keep_their_steps_apart() -> None:
    lab, fence = await _claimed()
    await lab.run("r1-2")
    await lab.queue.report(R1, fence, None, steps=(RunStep(1, TIME),))
    page = await lab.runs.steps(RunName("acme", "r1-2"), page_size=0, page_token="")
    assert page.records == []
    with pytest.raises(NotFound):
        await lab.runs.steps(RunName("acme", "none"), page_size=0, page_token="")


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (RunStep(0), "steps[1].step"),
        (RunStep(10**9), "steps[1].step"),
        (RunStep(2, loss=float("nan")), "steps[1].loss"),
        (RunStep(2, metrics={"reward_mean": float("inf")}), "steps[1].metrics['reward_mean']"),
        (RunStep(2, metrics={"Reward": 1.0}), "steps[1].metrics"),
        (RunStep(2, metrics={f"m{number}": 1.0 for number in range(65)}), "steps[1].metrics"),
    ],
)
async def test_a_bad_step_is_refused_and_its_report_with_it(step: RunStep, field: str) -> None:
    lab, fence = await _claimed()
    with pytest.raises(InvalidArgument) as caught:
        await lab.queue.report(R1, fence, RunProgress(2), steps=(RunStep(1, TIME), step))
    assert caught.value.field == field
    assert await _steps(lab) == []
    assert (await lab.runs.get(R1)).progress == RunProgress(
        num_steps=10, update_time=(await lab.runs.get(R1)).create_time
    )
