"""What a run has to tell reaches the catalog whole, also at the end, and nothing bad blocks what is good."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

import pytest

from mint_api.v1 import run_service_pb2
from mint_core.errors import Internal, InvalidArgument, LeaseLost, MintError, ResourceExhausted, Unavailable
from mint_runs.progress import Reporter


class Catalog:
    """Keeps what is reported, refuses whole reports with a bad part; ``faults`` come first."""

    def __init__(self, *faults: MintError) -> None:
        self.faults = list(faults)
        self.bad: set[str | int] = set()
        self.progress: list[int] = []
        self.events: list[str] = []
        self.reports: list[list[int]] = []
        self.num_calls = 0

    @property
    def steps(self) -> list[int]:
        return [step for report in self.reports for step in report]

    async def __call__(
        self,
        progress: run_service_pb2.RunProgress | None,
        events: Sequence[run_service_pb2.RunEvent],
        steps: Sequence[run_service_pb2.RunStep],
    ) -> bool:
        self.num_calls += 1
        assert len(steps) <= 100
        if self.faults:
            raise self.faults.pop(0)
        parts = [event.kind for event in events], [step.step for step in steps]
        if self.bad & {*parts[0], *parts[1], *(["progress"] if progress else [])}:
            raise InvalidArgument("a part of this report is bad")
        self.progress += [progress.step] if progress else []
        self.events += parts[0]
        self.reports += [parts[1]] if steps else []
        return False


def telling(catalog: Catalog, num_steps: int, *events: str) -> Reporter:
    """A reporter that has the progress and figures of ``num_steps`` to tell."""
    reporter = Reporter(catalog, interval_s=0.0)
    reporter.progress(run_service_pb2.RunProgress(step=num_steps))
    for event in events:
        reporter.event(event, "")
    for number in range(1, num_steps + 1):
        reporter.step(run_service_pb2.RunStep(step=number))
    return reporter


async def test_one_flush_sends_everything_in_as_many_reports_as_it_takes() -> None:
    catalog = Catalog()
    reporter = telling(catalog, 250, "saved", "published")
    await reporter.flush()
    assert (catalog.progress, catalog.events) == ([250], ["saved", "published"])
    assert catalog.steps == list(range(1, 251))
    assert catalog.num_calls == 3
    await reporter.flush()
    assert catalog.num_calls == 3


async def test_what_is_noted_while_a_report_is_under_way_waits_for_the_next() -> None:
    catalog = Catalog()
    reporter = telling(catalog, 150)
    task = asyncio.ensure_future(reporter.flush())
    await asyncio.sleep(0)
    reporter.step(run_service_pb2.RunStep(step=151))
    await task
    await reporter.flush()
    assert catalog.steps == list(range(1, 152))


@pytest.mark.parametrize("noted", ["progress", "b", 7, 100])
async def test_a_refused_part_is_dropped_and_told_and_all_else_arrives_once(
    caplog: pytest.LogCaptureFixture, noted: str | int
) -> None:
    catalog = Catalog()
    catalog.bad = {noted}
    reporter = telling(catalog, 120, "a", "b", "c")
    with caplog.at_level(logging.ERROR):
        await reporter.flush()
    assert catalog.progress == ([] if noted == "progress" else [120])
    assert catalog.events == [kind for kind in ("a", "b", "c") if kind != noted]
    assert catalog.steps == [number for number in range(1, 121) if number != noted]
    (dropped,) = [record for record in caplog.records if record.message == "report refused and dropped"]
    assert "a part of this report is bad" in dropped.fields["error"]
    num_calls = catalog.num_calls
    assert num_calls < 20
    await reporter.flush()
    assert catalog.num_calls == num_calls, "what was refused is not tried for ever"


async def test_a_catalog_that_goes_away_between_reports_gets_the_rest_later() -> None:
    catalog = Catalog()
    catalog.bad = {"b"}
    reporter = telling(catalog, 3, "a", "b", "c")
    original, num_left = reporter._send, 3

    async def send(*report: object) -> bool:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise Unavailable("away")
        return await original(*report)  # type: ignore[arg-type]

    reporter._send = send  # type: ignore[assignment]
    for _ in range(2):
        await reporter.flush()
    assert (catalog.progress, catalog.events, catalog.steps) == ([3], ["a", "c"], [1, 2, 3])


async def test_figures_that_are_not_finite_are_left_out() -> None:
    noted: list[run_service_pb2.RunProgress | run_service_pb2.RunStep] = []

    async def send(
        progress: run_service_pb2.RunProgress | None, events: object, steps: Sequence[run_service_pb2.RunStep]
    ) -> bool:
        assert progress is not None
        noted.extend([progress, *steps])
        return False

    reporter = Reporter(send, interval_s=0.0)
    metrics = {"grad_norm": math.inf, "behavior_kl": math.nan, "entropy": 1.5}
    mine = run_service_pb2.RunProgress(step=2, loss=math.nan, eval_loss=-math.inf, tokens_per_s=3.0, metrics=metrics)
    reporter.progress(mine)
    reporter.step(run_service_pb2.RunStep(step=2, loss=math.inf, metrics=metrics))
    await reporter.flush()
    progress, step = noted
    assert isinstance(progress, run_service_pb2.RunProgress)
    assert (progress.step, progress.loss, progress.eval_loss, progress.tokens_per_s) == (2, 0.0, 0.0, 3.0)
    assert (step.step, step.loss) == (2, 0.0)
    assert dict(progress.metrics) == dict(step.metrics) == {"entropy": 1.5}
    assert math.isnan(mine.loss), "the recipe's own figures stay as they are"


async def test_the_last_report_waits_for_a_catalog_that_is_away() -> None:
    catalog = Catalog(Unavailable("away", retry_after_s=0.01), Unavailable("away", retry_after_s=0.01))
    await telling(catalog, 130, "published").deliver(patience_s=10)
    assert (catalog.progress, catalog.events) == ([130], ["published"])
    assert catalog.steps == list(range(1, 131))


@pytest.mark.parametrize(
    "fault", [Unavailable("away"), ResourceExhausted("too much"), LeaseLost("superseded")], ids=str
)
async def test_a_last_report_that_is_not_written_is_told(fault: MintError) -> None:
    reporter = telling(Catalog(*[fault] * 100), 1)
    with pytest.raises(type(fault), match=fault.message):
        await reporter.deliver(patience_s=0.05)


async def test_a_bug_in_the_catalog_does_not_hold_the_end_up(caplog: pytest.LogCaptureFixture) -> None:
    await telling(Catalog(Internal("a bug")), 1).deliver(patience_s=10)
    assert "progress not written" in caplog.messages
