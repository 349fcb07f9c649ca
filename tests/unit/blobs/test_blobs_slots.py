"""Slots of transfers: bounded, fair, and none lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from mint_blobs._slots import TransferSlots


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def granted(slots: TransferSlots, transfer: str, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(slots.acquire(transfer)) for _ in range(count)]
    await settle()
    return tasks


def num_done(tasks: list[asyncio.Task[None]]) -> int:
    return sum(task.done() for task in tasks)


@pytest.mark.parametrize(("num_slots", "for_one"), [(1, 1), (2, 2), (4, 3), (8, 6), (12, 9)])
async def test_one_transfer_leaves_a_quarter_to_others(num_slots: int, for_one: int) -> None:
    slots = TransferSlots(num_slots)
    greedy = await granted(slots, "greedy", 40)
    assert num_done(greedy) == for_one
    # It stands still; everybody else gets one, and goes on getting one.
    for number in range(3 if num_slots > for_one else 0):
        [other] = await granted(slots, f"other {number}", 1)
        assert other.done()
        slots.release(f"other {number}")
    assert num_done(greedy) == for_one
    for task in greedy:
        task.cancel()


async def test_what_is_given_back_goes_to_who_holds_fewest() -> None:
    slots = TransferSlots(8)
    first = await granted(slots, "first", 20)
    second = await granted(slots, "second", 20)
    assert (num_done(first), num_done(second)) == (6, 1)
    for _ in range(3):
        slots.release("first")
        await settle()
    assert (num_done(first), num_done(second)) == (6, 3)
    for task in first + second:
        task.cancel()


async def test_cancelled_waits_lose_no_slot() -> None:
    slots = TransferSlots(4)
    chance = random.Random(3)
    num_inside = most_inside = 0

    async def use(transfer: int) -> None:
        nonlocal num_inside, most_inside
        async with slots.slot(transfer):
            num_inside += 1
            most_inside = max(most_inside, num_inside)
            try:
                await asyncio.sleep(0.001 * chance.random())
            finally:
                num_inside -= 1

    tasks = [asyncio.create_task(use(number % 7)) for number in range(300)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        chance.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most_inside == 4
    assert sum(task.cancelled() for task in tasks) > 10
    free = [await granted(slots, f"{number}", 1) for number in range(4)]
    assert all(task.done() for [task] in free)
    assert not slots._waiting
