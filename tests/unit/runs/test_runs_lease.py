"""Leases are given up in time; progress never holds training up; services that are away are waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from mint_api.v1 import run_service_pb2
from mint_core import clock
from mint_core.errors import InvalidArgument, LeaseLost, NotFound, Unavailable
from mint_runs import lease as lease_module
from mint_runs.lease import HeldLease
from mint_runs.patience import patiently
from mint_runs.progress import Reporter


class Clock:
    """CLOCK_BOOTTIME by hand; sleeping moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self._sleep = asyncio.sleep
        monkeypatch.setattr(clock, "boottime_s", lambda: self.now_s)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s
        await self._sleep(0)


@pytest.fixture
def hand_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def make_lease(renew: Any, **changes: float) -> HeldLease:
    values = {"ttl_s": 30.0, "margin_s": 5.0, "acquired_at_s": 1000.0} | changes
    return HeldLease("tenants/acme/policies/tone", renew, **values)


async def test_a_lease_is_renewed_long_before_it_ends(hand_clock: Clock) -> None:
    sent: list[tuple[float, float]] = []

    async def renew(timeout_s: float) -> None:
        sent.append((hand_clock.now_s, timeout_s))
        if len(sent) == 3:
            raise LeaseLost("superseded")

    with pytest.raises(LeaseLost, match="superseded"):
        await make_lease(renew).keep()
    assert sent == [(1010.0, 15.0), (1020.0, 15.0), (1030.0, 15.0)]


async def test_work_stops_a_margin_before_an_unrenewed_lease_ends(hand_clock: Clock) -> None:
    async def renew(timeout_s: float) -> None:
        raise Unavailable("the catalog is away")

    lease = make_lease(renew)
    lease.check()
    with pytest.raises(LeaseLost, match="not renewed in time"):
        await lease.keep()
    assert hand_clock.now_s == pytest.approx(1025.0)
    with pytest.raises(LeaseLost):
        lease.check()


async def test_a_renewal_counts_from_when_it_was_sent(hand_clock: Clock) -> None:
    async def renew(timeout_s: float) -> None:
        hand_clock.now_s += 12.0  # a slow answer

    lease = make_lease(renew)
    task = asyncio.ensure_future(lease.keep())
    while hand_clock.now_s < 1022.0:
        await hand_clock._sleep(0)
    await hand_clock._sleep(0)
    assert lease.remaining_s <= 1010.0 + 25.0 - 1022.0
    task.cancel()


async def test_a_watch_that_breaks_is_opened_again_and_tells_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_WATCH_AGAIN_S", 0.01)
    told: list[Any] = [Unavailable("the catalog is stopping"), None, LeaseLost("superseded")]

    async def watch() -> AsyncGenerator[None, None]:
        yield None
        error = told.pop(0)
        if error is not None:
            raise error

    async def renew(timeout_s: float) -> None:
        raise AssertionError

    now_s = clock.boottime_s()
    lease = HeldLease("p", renew, ttl_s=3000.0, margin_s=5.0, acquired_at_s=now_s, watch=watch)
    async with asyncio.timeout(5):
        with pytest.raises(LeaseLost, match="superseded"):
            await lease.keep()
    assert lease.remaining_s == 0.0
    assert not told


async def test_a_process_that_slept_finds_out_by_itself(hand_clock: Clock) -> None:
    lease = make_lease(None)
    hand_clock.now_s += 25.0
    with pytest.raises(LeaseLost, match="not renewed in time") as caught:
        lease.check()
    assert caught.value.metadata == {"resource": "tenants/acme/policies/tone"}
    hand_clock.now_s -= 20.0  # lost once is lost for good
    assert lease.remaining_s == 0.0
    with pytest.raises(LeaseLost):
        lease.check()


async def test_waiting_ends_with_the_last_error() -> None:
    num_calls = 0

    async def call() -> str:
        nonlocal num_calls
        num_calls += 1
        if num_calls < 3:
            raise Unavailable("away", retry_after_s=0.01)
        return "here"

    assert await patiently("it", call, patience_s=5) == "here"
    num_calls = -100
    with pytest.raises(Unavailable):
        await patiently("it", call, patience_s=0.05)


async def test_only_what_may_pass_is_waited_for() -> None:
    async def call() -> None:
        raise NotFound("no such thing")

    with pytest.raises(NotFound):
        await patiently("it", call, patience_s=5)


class Sink:
    """Where progress goes; each test sets what is answered."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[str]]] = []
        self.steps: list[list[tuple[int, float]]] = []
        self.answers: list[bool | Exception] = []

    async def __call__(
        self,
        progress: run_service_pb2.RunProgress | None,
        events: Sequence[run_service_pb2.RunEvent],
        steps: Sequence[run_service_pb2.RunStep],
    ) -> bool:
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, Exception):
            raise answer
        self.sent.append((progress.step if progress else -1, [event.kind for event in events]))
        self.steps.append([(step.step, step.loss) for step in steps])
        return answer


async def test_overtaken_progress_is_never_sent_but_events_all_are() -> None:
    sink = Sink()
    reporter = Reporter(sink, interval_s=0.01)
    for step in range(1, 4):
        reporter.progress(run_service_pb2.RunProgress(step=step))
        reporter.event(f"e{step}", "")
    task = asyncio.ensure_future(reporter.run())
    await asyncio.sleep(0.005)
    reporter.progress(run_service_pb2.RunProgress(step=4))
    await asyncio.sleep(0.05)
    task.cancel()
    assert sink.sent == [(3, ["e1", "e2", "e3"]), (4, [])]


async def test_a_failed_report_is_repeated_with_the_next() -> None:
    sink = Sink()
    sink.answers = [Unavailable("away")]
    reporter = Reporter(sink, interval_s=0.0)
    reporter.event("saved", "")
    await reporter.flush()
    reporter.progress(run_service_pb2.RunProgress(step=1))
    await reporter.flush()
    await reporter.flush()
    assert sink.sent == [(1, ["saved"])]


async def test_the_figures_of_every_step_are_sent_once_and_the_newest_win() -> None:
    sink = Sink()
    sink.answers = [Unavailable("away")]
    reporter = Reporter(sink, interval_s=0.0)
    for number in range(1, 131):
        reporter.step(run_service_pb2.RunStep(step=number, loss=1.0))
    reporter.step(run_service_pb2.RunStep(step=130, loss=2.0))
    for _ in range(4):
        await reporter.flush()
    assert [len(steps) for steps in sink.steps] == [100, 30]
    assert [step for steps in sink.steps for step in steps] == [(number, 1.0) for number in range(1, 130)] + [
        (130, 2.0)
    ]


async def test_a_cancel_is_remembered_and_a_lost_lease_is_raised() -> None:
    sink = Sink()
    sink.answers = [True, False, LeaseLost("superseded"), InvalidArgument("bad")]
    reporter = Reporter(sink, interval_s=0.0)
    for _ in range(2):
        reporter.progress(run_service_pb2.RunProgress(step=1))
        await reporter.flush()
    assert reporter.cancel_requested
    reporter.event("a", "")
    with pytest.raises(LeaseLost):
        await reporter.flush()


async def test_progress_is_a_copy_with_its_time() -> None:
    kept: list[run_service_pb2.RunProgress] = []

    async def send(progress: Any, events: Any, steps: Any) -> bool:
        kept.append(progress)
        return False

    reporter = Reporter(send, interval_s=0.0)
    progress = run_service_pb2.RunProgress(step=1)
    reporter.progress(progress)
    progress.step = 2
    await reporter.flush()
    assert kept[0].step == 1
    assert kept[0].update_time.seconds > 0
