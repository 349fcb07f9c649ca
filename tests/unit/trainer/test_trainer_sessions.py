"""Order, idempotency, cancellation, limits and expiry of sessions on the torch thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mint_blobs.memory import MemoryObjectStore
from mint_core import calls, clock
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    RequestIdReused,
    ResourceExhausted,
    Unavailable,
    WrongState,
)
from mint_core.names import PolicyName, SessionName
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.ledger import StepLedger
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import StepResult, TrainingSession
from mint_trainer.sessions import SessionLimits, Sessions, SessionView
from mint_trainer.worker import TorchThread

OPTIMIZER = AdamWConfig(learning_rate=1e-2)
LIMITS = SessionLimits(max_sessions=4, max_waiting_steps=6, idle_ttl_s=100.0, num_kept_results=3)

MakeData = Callable[..., list[Datum]]


@pytest.fixture
async def sessions(base_folder: Path, limits: BatchLimits, tmp_path: Path) -> AsyncIterator[Sessions]:
    thread = TorchThread(1)
    base = ResidentBase.load(base_folder, model_id="tiny")
    yield Sessions(base, MemoryObjectStore(), thread, limits, LIMITS, tmp_path)
    thread.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While cleared, ``TrainingSession.forward`` stands still on the torch thread."""
    event = threading.Event()
    event.set()
    real = TrainingSession.forward

    def waits(self: TrainingSession, data: list[Datum], *, reference: bool = False) -> StepResult:
        assert event.wait(20)
        return real(self, data, reference=reference)

    monkeypatch.setattr(TrainingSession, "forward", waits)
    return event


def name_of(number: int) -> SessionName:
    return SessionName("acme", f"s{number}")


async def create(sessions: Sessions, number: int, recipe: AdapterRecipe, payload: bytes = b"p") -> SessionView:
    policy = PolicyName("acme", f"p{number}")
    return await sessions.create(name_of(number), policy, payload_digest=payload, recipe=recipe)


def step(sessions: Sessions, number: int, seq: int, data: list[Datum], payload: bytes = b"x") -> Awaitable[StepResult]:
    return sessions.forward_backward(name_of(number), seq, payload, data, "cross_entropy", {}, return_logprobs=True)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_steps_run_in_order_and_once(sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe) -> None:
    await create(sessions, 1, recipe)
    first = await step(sessions, 1, 1, make_data(1))
    assert await step(sessions, 1, 1, make_data(1)) == first
    assert await step(sessions, 1, 1, []) == first  # the payload's digest decides, not what came with it
    with pytest.raises(RequestIdReused, match="seq 1 of tenants/acme/sessions/s1"):
        await step(sessions, 1, 1, make_data(1), b"other")
    with pytest.raises(WrongState, match=r"seq is 3 but the next step of .* is 2") as caught:
        await step(sessions, 1, 3, make_data(1))
    assert caught.value.metadata["next_seq"] == "2"
    with pytest.raises(InvalidArgument, match="seq is 0"):
        await step(sessions, 1, 0, make_data(1))
    done = await sessions.optim_step(name_of(1), 2, b"y", OPTIMIZER, 1.0)
    assert await sessions.optim_step(name_of(1), 2, b"y", OPTIMIZER, 1.0) == done
    assert (sessions.get(name_of(1)).step, sessions.get(name_of(1)).next_seq) == (1, 3)
    assert sessions.step_result(name_of(1), 2) == done
    with pytest.raises(NotFound, match=r"s1/steps/3 has no stored result"):
        sessions.step_result(name_of(1), 3)


async def test_failed_step_does_not_use_up_its_seq(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    await create(sessions, 1, recipe)
    with pytest.raises(InvalidArgument):
        await step(sessions, 1, 1, [])
    with pytest.raises(WrongState, match="no gradient"):
        await sessions.optim_step(name_of(1), 1, b"y", OPTIMIZER, 1.0)
    assert sessions.get(name_of(1)).next_seq == 1
    assert (await step(sessions, 1, 1, make_data(1), b"another payload")).loss_sum > 0


async def test_steps_sent_at_once_run_in_order(sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe) -> None:
    for number in (1, 2):
        await create(sessions, number, recipe)
    results = await asyncio.gather(
        step(sessions, 1, 1, make_data(1)),
        sessions.optim_step(name_of(1), 2, b"o", OPTIMIZER, 1.0),
        step(sessions, 1, 3, make_data(1)),
    )
    alone = []
    alone.append(await step(sessions, 2, 1, make_data(1)))
    alone.append(await sessions.optim_step(name_of(2), 2, b"o", OPTIMIZER, 1.0))
    alone.append(await step(sessions, 2, 3, make_data(1)))
    assert [(r.loss_sum, r.logprobs, r.grad_norm) for r in results] == [
        (r.loss_sum, r.logprobs, r.grad_norm) for r in alone
    ]
    assert results[2].loss_sum < results[0].loss_sum


async def test_failure_in_a_pipeline_stops_what_follows(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    await create(sessions, 1, recipe)
    outcomes = await asyncio.gather(
        step(sessions, 1, 1, []),
        sessions.optim_step(name_of(1), 2, b"o", OPTIMIZER, 1.0),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], InvalidArgument)
    assert isinstance(outcomes[1], WrongState)
    assert sessions.get(name_of(1)).step == 0


async def test_sessions_take_turns(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, gate: threading.Event
) -> None:
    for number in (1, 2):
        await create(sessions, number, recipe)
    order: list[str] = []

    async def note(text: str, work: Awaitable[object]) -> None:
        await work
        order.append(text)

    gate.clear()
    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(note(f"1.{number}", sessions.forward(name_of(1), make_data(1))))
        tasks.create_task(note("2.0", sessions.forward(name_of(2), make_data(1))))
        await settled()
        gate.set()
    assert order == ["1.0", "2.0", "1.1", "1.2"]


async def test_caller_that_leaves_before_the_start_takes_its_step_along(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, gate: threading.Event
) -> None:
    for number in (1, 2):
        await create(sessions, number, recipe)
    gate.clear()
    blocker = asyncio.ensure_future(sessions.forward(name_of(2), make_data(1)))
    await settled()
    leaving = asyncio.ensure_future(step(sessions, 1, 1, make_data(1)))
    await settled()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.set()
    await blocker
    assert (await step(sessions, 1, 1, make_data(2), b"new payload")).loss_sum > 0
    assert sessions.get(name_of(1)).next_seq == 2


async def test_caller_that_leaves_during_a_step_finds_the_result_later(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(sessions, 1, recipe)
    started, go_on = threading.Event(), threading.Event()
    real, num_runs = TrainingSession.forward_backward, []

    def slow(self: TrainingSession, *args: object, **options: bool) -> StepResult:
        num_runs.append(1)
        started.set()
        assert go_on.wait(20)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingSession, "forward_backward", slow)
    leaving = asyncio.ensure_future(step(sessions, 1, 1, make_data(1)))
    await asyncio.to_thread(started.wait, 20)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    go_on.set()
    assert (await step(sessions, 1, 1, make_data(1))).loss_sum > 0
    assert len(num_runs) == 1


async def test_deadline_is_honoured_before_a_step_starts(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, gate: threading.Event
) -> None:
    for number in (1, 2):
        await create(sessions, number, recipe)
    gate.clear()
    blocker = asyncio.ensure_future(sessions.forward(name_of(2), make_data(1)))
    await settled()
    with calls.inbound_call("tester", 0.05):
        late = asyncio.ensure_future(step(sessions, 1, 1, make_data(1)))
        await asyncio.sleep(0.1)
    gate.set()
    await blocker
    with pytest.raises(DeadlineExceeded, match="waiting for its turn"):
        await late
    assert sessions.get(name_of(1)).next_seq == 1


async def test_queue_is_bounded(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, gate: threading.Event
) -> None:
    await create(sessions, 1, recipe)
    gate.clear()
    waiting = [asyncio.ensure_future(sessions.forward(name_of(1), make_data(1))) for _ in range(6)]
    await settled()
    with pytest.raises(Unavailable, match="6 steps are waiting") as caught:
        await sessions.forward(name_of(1), make_data(1))
    assert caught.value.retry_after_s
    gate.set()
    assert len({result.loss_sum for result in await asyncio.gather(*waiting)}) == 1
    await sessions.forward(name_of(1), make_data(1))


async def test_create_is_idempotent_by_payload(sessions: Sessions, recipe: AdapterRecipe) -> None:
    first = await create(sessions, 1, recipe)
    again = await create(sessions, 1, recipe)
    assert (again.name, again.create_time_s, again.recipe) == (first.name, first.create_time_s, recipe)
    with pytest.raises(AlreadyExists, match="sessions/s1 exists"):
        await create(sessions, 1, recipe, b"other")


async def test_bad_creations(sessions: Sessions, recipe: AdapterRecipe) -> None:
    policy = PolicyName("acme", "p")
    with pytest.raises(InvalidArgument) as caught:
        await sessions.create(name_of(1), PolicyName("other", "p"), payload_digest=b"", recipe=recipe)
    assert caught.value.field == "session.policy"
    with pytest.raises(InvalidArgument) as caught:
        await sessions.create(name_of(1), policy, payload_digest=b"")
    assert caught.value.field == "session.lora"
    digest = "sha256:" + "0" * 64
    with pytest.raises(BaseModelMismatch, match="this trainer holds sha256:"):
        await sessions.create(name_of(1), policy, payload_digest=b"", recipe=recipe, base_digest=digest)
    with pytest.raises(NotFound, match="sessions/s1 does not exist"):
        sessions.get(name_of(1))
    view = await sessions.create(
        name_of(1), policy, payload_digest=b"", recipe=recipe, base_digest=sessions.base.digest
    )
    assert view.next_seq == 1


async def test_no_more_than_max_sessions(
    sessions: Sessions, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        await create(sessions, number, recipe)
    with pytest.raises(ResourceExhausted, match="all 4 sessions"):
        await create(sessions, 9, recipe)
    await sessions.close(name_of(2))
    await create(sessions, 9, recipe)
    with pytest.raises(ResourceExhausted):
        await create(sessions, 10, recipe)
    later = clock.monotonic_s() + 101.0
    monkeypatch.setattr(clock, "monotonic_s", lambda: later)
    await create(sessions, 10, recipe)  # makes room by itself once the others are stale
    assert [number for number in range(11) if exists(sessions, number)] == [10]
    assert sum("lora_A" in name for name, _ in sessions.base.model.named_parameters()) == 14


def exists(sessions: Sessions, number: int) -> bool:
    try:
        sessions.get(name_of(number))
    except NotFound:
        return False
    return True


async def test_idle_sessions_expire_and_used_ones_do_not(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.monotonic_s()
    monkeypatch.setattr(clock, "monotonic_s", lambda: now)
    for number in (1, 2):
        await create(sessions, number, recipe)
    assert sessions.get(name_of(1)).expire_time_s == pytest.approx(clock.wall_s() + 100.0, abs=5)
    now += 60
    await step(sessions, 2, 1, make_data(1))
    now += 60
    assert await sessions.expire_idle() == 1
    assert not exists(sessions, 1)
    assert exists(sessions, 2)
    with pytest.raises(NotFound, match="expired"):
        await step(sessions, 1, 1, make_data(1))


async def test_session_at_work_does_not_expire(
    sessions: Sessions,
    make_data: MakeData,
    recipe: AdapterRecipe,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await create(sessions, 1, recipe)
    gate.clear()
    running = asyncio.ensure_future(sessions.forward(name_of(1), make_data(1)))
    await settled()
    later = clock.monotonic_s() + 1000.0
    monkeypatch.setattr(clock, "monotonic_s", lambda: later)
    assert await sessions.expire_idle() == 0
    gate.set()
    await running


async def test_closing_finishes_the_running_step_and_refuses_the_waiting(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, gate: threading.Event
) -> None:
    await create(sessions, 1, recipe)
    gate.clear()
    running = asyncio.ensure_future(sessions.forward(name_of(1), make_data(1)))
    waiting = asyncio.ensure_future(sessions.forward(name_of(1), make_data(1)))
    await settled()
    closing = asyncio.ensure_future(sessions.close(name_of(1)))
    await settled()
    with pytest.raises(NotFound):
        sessions.get(name_of(1))
    gate.set()
    await closing
    assert (await running).loss_sum > 0
    with pytest.raises(NotFound):
        await waiting
    with pytest.raises(NotFound):
        await sessions.close(name_of(1))
    await create(sessions, 1, recipe, b"a new one")


async def test_running_out_of_memory_is_said_and_survived(
    sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(sessions, 1, recipe)

    def no_memory(self: TrainingSession, data: list[Datum], *, reference: bool = False) -> StepResult:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "forward", no_memory)
        with pytest.raises(ResourceExhausted, match="ran out of memory"):
            await sessions.forward(name_of(1), make_data(1))
    await sessions.forward(name_of(1), make_data(1))


def test_ledger_keeps_the_last_results_only() -> None:
    ledger = StepLedger("s", 2)
    for seq in (1, 2, 3):
        assert ledger.result_of(seq, b"p") is None
        ledger.record(seq, b"p", StepResult(step=seq))
    assert ledger.result_of(2, b"p") == StepResult(step=2)
    with pytest.raises(WrongState, match="not kept any more"):
        ledger.result_of(1, b"p")
    with pytest.raises(NotFound):
        ledger.kept(1)


def test_void_ticket_says_why() -> None:
    from mint_trainer.worker import Ticket

    ticket = Ticket()
    ticket.check()
    ticket.cancel()
    with pytest.raises(Cancelled):
        ticket.check()
