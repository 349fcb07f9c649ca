"""The order in which adapters leave a full disk."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidArgument
from mint_loader.eviction import POLICIES, EvictionOrder, Facts, Gdsf, Lfu, Lru, Seen, make_policy


def anything(_: str) -> bool:
    return True


def drained(order: EvictionOrder) -> list[str]:
    left = []
    while (digest := order.take_least(anything)) is not None:
        left.append(digest)
    return left


def used(order: EvictionOrder, *digests: str, size_bytes: int = 100) -> None:
    for at_s, digest in enumerate(digests):
        order.use(digest, size_bytes, float(at_s))


def test_lru_takes_what_was_used_longest_ago() -> None:
    order = EvictionOrder(Lru())
    used(order, "a", "b", "c", "a")
    assert drained(order) == ["b", "c", "a"]


def test_lfu_takes_what_was_used_least_and_of_equals_the_older() -> None:
    order = EvictionOrder(Lfu())
    used(order, "a", "b", "b", "c", "a", "a")
    assert drained(order) == ["c", "b", "a"]


def test_gdsf_takes_the_large_first_unless_it_is_used_more() -> None:
    order = EvictionOrder(Gdsf(overhead_bytes=100))
    order.use("large", 1000, 1.0)
    order.use("small", 10, 0.0)
    assert order.take_least(anything) == "large"
    for at_s in range(20):
        order.use("large", 1000, float(at_s))
    assert order.take_least(anything) == "small"


def test_gdsf_forgets_what_was_popular_once() -> None:
    order = EvictionOrder(Gdsf())
    for _ in range(50):
        order.use("old star", 1 << 20, 0.0)
    for number in range(200):
        for _ in range(3):
            order.use(f"new {number}", 1 << 20, 1.0)
        if len(order) > 4:
            order.take_least(anything)
    assert "old star" not in order
    lfu = EvictionOrder(Lfu())
    for _ in range(50):
        lfu.use("old star", 1 << 20, 0.0)
    for number in range(200):
        lfu.use(f"new {number}", 1 << 20, 1.0)
        lfu.take_least(anything)
    assert "old star" in lfu


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_may_not_leave_keeps_its_place(name: str) -> None:
    order = EvictionOrder(make_policy(name))
    used(order, "a", "b", "c")
    assert order.take_least(lambda digest: digest == "c") == "c"
    assert order.take_least(lambda digest: False) is None
    assert drained(order) == ["a", "b"]
    assert order.take_least(anything) is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_clock_that_is_set_back_makes_no_use_an_old_one(name: str) -> None:
    order = EvictionOrder(make_policy(name))
    order.use("before", 100, 5000.0)
    order.use("after", 100, 1000.0)
    assert drained(order) == ["before", "after"]


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_equals_that_of_a_plain_list(name: str, seed: int) -> None:
    """The heap with its outdated entries against a search through everything."""
    chance = random.Random(seed)
    order, policy = EvictionOrder(make_policy(name)), make_policy(name)
    plain: dict[str, tuple[float, int, int]] = {}
    for number in range(300):
        digest, size_bytes = f"{chance.randrange(30)}", 1 + chance.randrange(10)
        sized = size_bytes * 1000 + int(digest)
        if chance.random() < 0.2 and plain:
            held = {each for each in plain if chance.random() < 0.3}
            free = {each: place for each, place in plain.items() if each not in held}
            least = min(free, key=lambda each: free[each][:2], default=None)
            assert order.take_least(lambda each, held=held: each not in held) == least
            if least is not None:
                policy.evicted(plain.pop(least)[0])
        elif chance.random() < 0.05:
            order.discard(digest)
            plain.pop(digest, None)
        else:
            num_uses = plain.get(digest, (0.0, 0, 0))[2] + 1
            order.use(digest, sized, float(number))
            plain[digest] = (policy.worth(Facts(sized, num_uses, float(number))), number, num_uses)
    assert drained(order) == sorted(plain, key=lambda each: plain[each][:2])


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_restart_keeps_the_order_and_newcomers_are_not_worthless(name: str) -> None:
    before = EvictionOrder(make_policy(name))
    chance = random.Random(1)
    at_s = {}
    for number in range(2000):
        digest = f"{int(40 * chance.random() ** 3)}"
        before.use(digest, 100, float(number))
        at_s[digest] = float(number)
        if len(before) > 20:
            before.take_least(anything)
    seen = [Seen(each, 100, at_s[each], uses, worth) for each, (uses, worth) in before.snapshot().items()]
    chance.shuffle(seen)
    after = EvictionOrder(make_policy(name))
    after.restore(seen)
    for order in (before, after):
        order.use("newcomer", 100, 3000.0)
        for _ in range(60):
            order.use("regular", 100, 3000.0)
    orders = [drained(order) for order in (before, after)]
    if name != "lfu":
        assert all(order[0] != "newcomer" and order.index("regular") > 10 for order in orders)
    for order in orders:
        order.remove("newcomer")
    if name != "gdsf":  # whose clock may stand a little later
        assert orders[0] == orders[1]


def test_without_worth_the_time_of_use_decides() -> None:
    order = EvictionOrder(Gdsf())
    order.restore([Seen("b", 100, 20.0), Seen("a", 100, 10.0), Seen("c", 100, 30.0)])
    assert drained(order) == ["a", "b", "c"]


def test_many_uses_of_few_do_not_grow_the_heap() -> None:
    order = EvictionOrder(Lru())
    for number in range(10_000):
        order.use(f"{number % 10}", 100, float(number))
    assert len(order._heap) <= 64 + 2 * 10 + 1


def test_an_unknown_policy_is_told_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="'fifo'; choose one of gdsf, lfu, lru"):
        make_policy("fifo")
