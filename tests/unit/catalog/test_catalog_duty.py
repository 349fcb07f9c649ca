"""Duties: one catalog at a time, with a fence, and cancelled when the lease is lost."""

from __future__ import annotations

import asyncio

import pytest
from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.keys import Keys
from mint_catalog.storage.duty import Duties, Duty, keep_doing
from mint_catalog.storage.store import Put
from mint_core import calls
from mint_core.errors import LeaseHeld, LeaseLost, Unavailable

KEYS = Keys()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_one_at_a_time_and_the_next_has_another_fence(store: MemoryStore) -> None:
    first, second = Duties(store, KEYS), Duties(store, KEYS)
    async with first.hold("gc") as duty:
        with pytest.raises(LeaseHeld, match="the duty gc is being done by"):
            async with second.hold("gc"):
                raise AssertionError
        async with second.hold("other"):
            pass
    async with second.hold("gc") as successor:
        assert successor.token > duty.token
        assert not (await store.txn([duty.compare], [Put(b"/x", b"")])).succeeded
        assert (await store.txn([successor.compare], [Put(b"/x", b"")])).succeeded


async def test_lost_lease_cancels_the_job(store: MemoryStore) -> None:
    started = asyncio.Event()

    async def job() -> None:
        async with Duties(store, KEYS).hold("gc", ttl_s=1):
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(job())
    await started.wait()
    await store.pass_time(2)
    with pytest.raises(LeaseLost, match="taken over by another catalog"):
        await asyncio.wait_for(task, 5)
    assert task.cancelling() == 0


async def test_store_that_does_not_answer_renewals_ends_the_job_in_time(store: MemoryStore) -> None:
    async def deaf(lease: int) -> bool:
        raise Unavailable("away")

    store.keep_alive = deaf  # type: ignore[method-assign]
    started_at = asyncio.get_running_loop().time()
    with pytest.raises(LeaseLost):
        async with Duties(store, KEYS).hold("gc", ttl_s=1):
            await asyncio.sleep(60)
    assert 0.5 < asyncio.get_running_loop().time() - started_at < 3.0


async def test_job_cancelled_from_outside_gives_the_duty_back(store: MemoryStore) -> None:
    started = asyncio.Event()

    async def job() -> None:
        async with Duties(store, KEYS).hold("gc"):
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(job())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with Duties(store, KEYS).hold("gc"):
        pass


async def test_errors_of_the_job_pass(store: MemoryStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Duties(store, KEYS).hold("gc"):
            raise ZeroDivisionError
    async with Duties(store, KEYS).hold("gc"):
        pass


async def loop(duties: Duties, who: str, done: list[tuple[str, str]], *, num_looks: int, **options: bool) -> None:
    """Run the loop of one catalog for some looks at the clock, and end it."""

    async def sleep(_: float) -> None:
        nonlocal num_looks
        num_looks -= 1
        if num_looks < 0:
            raise asyncio.CancelledError

    async def job(duty: Duty) -> None:
        done.append((who, calls.principal()))

    with pytest.raises(asyncio.CancelledError):
        await keep_doing(duties, "gc", job, 3600, sleep=sleep, **options)


async def test_loop_does_its_job_each_interval(store: MemoryStore) -> None:
    done: list[tuple[str, str]] = []
    for who in ("a", "b"):
        await loop(Duties(store, KEYS), who, done, num_looks=2)
    assert done == [("a", "catalog"), ("a", "catalog"), ("b", "catalog"), ("b", "catalog")]


async def test_remembered_job_is_done_once_an_interval_over_all(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_s = 1e9
    monkeypatch.setattr("mint_catalog.storage.duty.wall_s", lambda: time_s)
    done: list[tuple[str, str]] = []
    for who in ("a", "b"):  # nothing is to be done in a new installation
        await loop(Duties(store, KEYS), who, done, num_looks=2, remembered=True)
    assert done == []
    time_s += 3601
    for who in ("a", "b"):
        await loop(Duties(store, KEYS), who, done, num_looks=2, remembered=True)
    assert done == [("a", "catalog")]
    time_s -= 1e6  # the clock was set back: better once too often than never again
    await loop(Duties(store, KEYS), "b", done, num_looks=2, remembered=True)
    assert done == [("a", "catalog"), ("b", "catalog")]


async def test_loop_looks_before_it_takes_the_duty(store: MemoryStore) -> None:
    num_slept = 0

    async def sleep(_: float) -> None:
        nonlocal num_slept
        num_slept += 1
        if num_slept > 4:
            raise asyncio.CancelledError

    async def nothing() -> bool:
        return False

    async def job(duty: Duty) -> None:
        raise AssertionError

    before = store.revision
    with pytest.raises(asyncio.CancelledError):
        await keep_doing(Duties(store, KEYS), "gc", job, 1, pending=nothing, sleep=sleep)
    assert store.revision == before
