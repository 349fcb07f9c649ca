"""How an attempt ends: only after all it had to tell is written, and never without its lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.runs.memory_world import POLICY, RUN

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import common_pb2, policy_service_pb2, run_service_pb2
from mint_core.errors import LeaseLost, MintError, Unavailable
from mint_runs import worker
from mint_runs.attempt import Attempt, Outcome
from mint_runs.settings import RunsSettings
from mint_runs.worker import Worker

NUM_STEPS = 130
SUCCEEDED, FAILED = run_service_pb2.RUN_STATE_SUCCEEDED, run_service_pb2.RUN_STATE_FAILED


class Catalog:
    """One run to claim; ``reports`` and ``renewals`` say what comes before they are answered."""

    def __init__(self) -> None:
        self.reports: list[MintError] = []
        self.renewals: list[MintError] = []
        self.is_down = False
        self.lease_lost = asyncio.Event()
        self.progress = run_service_pb2.RunProgress()
        self.events: list[str] = []
        self.steps: list[int] = []
        self.ended: list[tuple[int, str, bool]] = []
        self.num_claims = 0
        self.worker: Worker | None = None
        self.policies = self

    async def claim_run(self, *_: Any, **__: Any) -> work_service_pb2.ClaimRunResponse | None:
        self.num_claims += 1
        if self.num_claims > 1:
            assert self.worker is not None
            self.worker.drain()
            return None
        run = run_service_pb2.Run(name=RUN, policy=POLICY, num_attempts=1)
        run.sft.num_steps = NUM_STEPS
        lease = work_service_pb2.Lease(fence=common_pb2.Fence(resource=POLICY, token=3))
        return work_service_pb2.ClaimRunResponse(run=run, lease=lease)

    async def get(self, name: str) -> policy_service_pb2.Policy:
        return policy_service_pb2.Policy(name=name)

    async def renew_lease(self, *_: Any, **__: Any) -> None:
        self._pass(self.renewals)

    async def watch_lease(self, fence: common_pb2.Fence) -> AsyncGenerator[work_service_pb2.Lease, None]:
        yield work_service_pb2.Lease(fence=fence)
        await self.lease_lost.wait()
        raise LeaseLost("superseded")

    async def report_run(
        self,
        name: str,
        fence: common_pb2.Fence,
        *,
        progress: run_service_pb2.RunProgress | None,
        events: Sequence[run_service_pb2.RunEvent],
        steps: Sequence[run_service_pb2.RunStep],
    ) -> bool:
        self._pass(self.reports)
        assert not self.ended, "a run that has ended takes no reports"
        if progress is not None:
            self.progress = progress
        self.events += [event.kind for event in events]
        self.steps += [step.step for step in steps]
        return False

    async def finish_run(
        self, name: str, fence: common_pb2.Fence, state: int, *, error: str, retriable: bool, published_revision: str
    ) -> None:
        self._pass([])
        self.ended.append((state, error, retriable))

    def _pass(self, faults: list[MintError]) -> None:
        if self.is_down:
            raise Unavailable("the catalog is down", retry_after_s=0.01)
        if faults:
            raise faults.pop(0)


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A catalog that is away for a moment when its run, at the very end, notes most of its figures."""
    catalog = Catalog()
    monkeypatch.setattr(worker, "RECIPES", {"sft": recipe_of(catalog)})
    return catalog


def recipe_of(catalog: Catalog, *, catalog_dies: bool = False) -> Any:
    async def recipe(attempt: Attempt) -> Outcome:
        attempt.reporter.progress(run_service_pb2.RunProgress(step=1))
        await asyncio.sleep(0.05)
        catalog.reports += [Unavailable("away", retry_after_s=0.01)] * 3
        catalog.is_down = catalog_dies
        for step in range(1, NUM_STEPS + 1):
            attempt.reporter.step(run_service_pb2.RunStep(step=step))
        attempt.reporter.progress(run_service_pb2.RunProgress(step=NUM_STEPS))
        attempt.reporter.event("published", "")
        return Outcome()

    return recipe


async def work(catalog: Catalog, tmp_path: Path, **settings: Any) -> None:
    """Let a worker do the one run."""
    values = {"lease_ttl_s": 30.0, "lease_margin_s": 1.0, "patience_s": 10.0, "report_interval_s": 100.0} | settings
    everything: Any = catalog
    catalog.worker = Worker(
        RunsSettings.model_construct(max_concurrent_runs=1, base_model_path=tmp_path, **values),
        client=everything,
        work=everything,
        exporter=everything,
        store=everything,
        tokenizer=everything,
    )
    async with asyncio.timeout(20):
        await catalog.worker.run()


async def test_a_run_ends_after_its_last_progress_is_written(catalog: Catalog, tmp_path: Path) -> None:
    await work(catalog, tmp_path)
    assert catalog.ended == [(SUCCEEDED, "", False)]
    assert catalog.progress.step == NUM_STEPS
    assert catalog.steps == list(range(1, NUM_STEPS + 1))
    assert catalog.events == ["published"]


async def test_a_run_that_cannot_tell_its_end_is_given_back(catalog: Catalog, tmp_path: Path) -> None:
    await work(catalog, tmp_path, patience_s=0.0)
    assert catalog.ended == [(FAILED, "TEMPORARILY_UNAVAILABLE: away", True)]


async def test_the_last_report_is_waited_for_no_longer_than_the_lease(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RECIPES", {"sft": recipe_of(catalog, catalog_dies=True)})
    await work(catalog, tmp_path, lease_ttl_s=0.6, lease_margin_s=0.1, patience_s=100.0)
    assert not catalog.ended
    assert catalog.num_claims == 2, "the worker goes on with other runs"
    assert catalog.progress.step == 1


async def test_a_worker_stops_as_soon_as_it_is_told_that_its_lease_is_lost(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def recipe(_: Attempt) -> Outcome:
        catalog.lease_lost.set()
        await asyncio.sleep(60)
        return Outcome()

    monkeypatch.setattr(worker, "RECIPES", {"sft": recipe})
    async with asyncio.timeout(5):
        await work(catalog, tmp_path, lease_ttl_s=3600.0)
    assert not catalog.ended
    assert catalog.num_claims == 2


async def test_a_drained_run_is_given_back_and_has_not_failed(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def recipe(attempt: Attempt) -> Outcome:
        assert catalog.worker is not None
        catalog.worker.drain()
        attempt.check()
        raise AssertionError

    monkeypatch.setattr(worker, "RECIPES", {"sft": recipe})
    await work(catalog, tmp_path)
    message = "the worker was drained; the run goes on from its saved state"
    assert catalog.ended == [(run_service_pb2.RUN_STATE_QUEUED, message, False)]
    assert catalog.events == ["drained"]
