"""Which replica is asked: residency first, then room, then an order of which everybody knows; the lost are left out."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable

import pytest

from mint_core.errors import MintError, Unavailable
from mint_core.placement import placement_order
from mint_inference.copies import Copies
from mint_inference.hints import Hints
from mint_inference.lookout import Lookout
from mint_inference.model import Replica, ReplicaState, Residency, Resolution
from mint_inference.router import Router

BASE = "sha256:base"
DIGEST = "sha256:1"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Registered:
    """A registry of what the test says."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        self.replicas = list(replicas)

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]:
        return self.replicas


def a_replica(name: str, *, born_s: float = 1.0, capacity: int = 4, num_slots: int = 0) -> Replica:
    return Replica(
        f"engineReplicas/{name}",
        f"{name}:1",
        f"{name}:2",
        "baseModels/smol",
        BASE,
        ReplicaState.READY,
        born_s,
        max_running_requests=capacity,
        num_slots=num_slots,
    )


class Setting:
    def __init__(self, *replicas: Replica) -> None:
        self.clock = Clock()
        self.registry = Registered(replicas)
        self.router = Router(self.registry, poll_s=1000, now_s=self.clock)
        self.streams = contextlib.ExitStack()

    async def read(self) -> None:
        """Let the router look at the registry."""
        following = asyncio.ensure_future(self.router.follow())
        await asyncio.sleep(0.001)
        following.cancel()

    async def chosen(self, digest: str = DIGEST, excluded: frozenset[str] = frozenset()) -> str:
        return (await self.router.choose(BASE, digest, excluded)).name

    def busy(self, replica: Replica, num_streams: int, digest: str = "") -> None:
        for _ in range(num_streams):
            self.streams.enter_context(self.router.using(replica, digest))


async def a_setting(*replicas: Replica) -> Setting:
    at = Setting(*replicas)
    await at.read()
    return at


def two() -> tuple[Replica, Replica]:
    """Two replicas in the order that :data:`DIGEST` prefers them in."""
    by_name = {each.name: each for each in (a_replica("a"), a_replica("b"))}
    first, second = placement_order(DIGEST, by_name)
    return by_name[first], by_name[second]


async def test_what_nobody_holds_goes_where_every_process_would_send_it() -> None:
    replicas = [a_replica(name) for name in "abcd"]
    here, there = await a_setting(*replicas), await a_setting(*reversed(replicas))
    for number in range(50):
        assert await here.chosen(f"sha256:{number}") == await there.chosen(f"sha256:{number}")


async def test_what_nobody_holds_goes_to_the_less_busy_of_its_first_two() -> None:
    replicas = {each.name: each for each in (a_replica(name) for name in "abcd")}
    at = await a_setting(*replicas.values())
    first, second, *_ = placement_order(DIGEST, replicas)
    assert await at.chosen() == first
    at.busy(replicas[first], 1)
    assert await at.chosen() == second
    at.busy(replicas[second], 3)
    assert await at.chosen() == first  # two more are idle, and are not of its two


async def test_the_holder_is_asked_as_long_as_it_has_room_and_then_one_half_as_busy() -> None:
    first, second = two()
    at = await a_setting(first, second)
    at.router.note_resident(second, DIGEST)
    for _ in range(4):
        assert await at.chosen() == second.name
        at.busy(second, 1, DIGEST)
    assert await at.chosen() == first.name
    at.busy(first, 3)
    assert await at.chosen() == second.name  # nobody is far less busy: a copy would gain nothing


async def test_of_several_holders_the_less_busy_one_answers() -> None:
    first, second = two()
    at = await a_setting(first, second)
    for each in (first, second):
        at.router.note_resident(each, DIGEST)
    at.busy(first, 1)
    assert {await at.chosen() for _ in range(10)} == {second.name}


async def test_the_base_is_spread_by_two_choices() -> None:
    replicas = [a_replica(name) for name in "abcd"]
    at = await a_setting(*replicas)
    by_name = {each.name: each for each in replicas}
    served: Counter[str] = Counter()
    for _ in range(200):
        name = await at.chosen("")
        served[name] += 1
        at.busy(by_name[name], 1)
    assert min(served.values()) > 40


async def test_more_adapters_than_slots_are_an_overload_too() -> None:
    first, second = (a_replica(each.name.rpartition("/")[2], capacity=100, num_slots=3) for each in two())
    at = await a_setting(first, second)
    at.router.note_resident(first, DIGEST)
    for number in range(2):
        at.busy(first, 1, f"sha256:other{number}")
        expected = first.name if number == 0 else second.name
        assert await at.chosen() == expected


async def test_who_comes_during_a_load_joins_it() -> None:
    first, second = two()
    at = await a_setting(first, second)
    with at.router.loading(second, DIGEST):
        assert await at.chosen() == second.name
        at.router.note_residency(second, Residency(frozenset(), 0), at.clock())  # not yet
        assert await at.chosen() == second.name
    at.router.note_absent(second, DIGEST)
    assert await at.chosen() == first.name


async def test_streams_of_other_processes_count_for_as_long_as_they_are_news() -> None:
    first, second = two()
    at = await a_setting(first, second)
    at.router.note_resident(first, DIGEST)
    at.busy(first, 1)
    at.router.note_answered(first, num_running=4)
    assert await at.chosen() == second.name
    at.clock.now_s += 7
    assert await at.chosen() == first.name


async def test_who_did_not_answer_is_asked_last_until_it_answers() -> None:
    first, second = two()
    at = await a_setting(first, second)
    at.router.note_failed(first)
    assert await at.chosen() == second.name
    assert await at.chosen(excluded=frozenset({second.name})) == first.name
    at.router.note_failed(second)
    assert await at.chosen() == first.name  # nobody else is better
    at.router.note_answered(second)
    assert await at.chosen() == second.name
    at.router.note_answered(first)
    assert await at.chosen() == first.name


async def test_a_new_life_is_beyond_suspicion_and_holds_nothing() -> None:
    first, second = two()
    at = await a_setting(first, second)
    at.router.note_resident(second, DIGEST)
    at.router.note_failed(first)
    assert at.router.is_suspect(first)
    old = at.registry.replicas
    at.registry.replicas = [a_replica(each.name.rpartition("/")[2], born_s=2.0) for each in old]
    await at.read()
    assert await at.chosen() == first.name
    at.router.note_residency(old[1], Residency(frozenset({DIGEST}), 0), at.clock())  # said by the life before
    assert await at.chosen() == first.name


async def test_what_a_replica_says_it_holds_is_believed_but_for_what_is_newer() -> None:
    first, second = two()
    at = await a_setting(first, second)
    asked_at_s = at.clock()
    at.router.note_residency(second, Residency(frozenset({DIGEST}), 0), asked_at_s)
    assert await at.chosen() == second.name
    at.clock.now_s += 1
    at.router.note_resident(second, "sha256:2")
    at.router.note_residency(second, Residency(frozenset(), 0), at.clock() - 0.5)
    assert await at.chosen() == first.name
    assert await at.chosen("sha256:2") == second.name


async def test_who_watches_a_replica_is_told_that_its_registration_ended() -> None:
    first, second = two()
    at = await a_setting(first, second)
    told: list[str] = []
    with contextlib.ExitStack() as watching:
        for number, each in enumerate((first, second)):
            watching.enter_context(
                at.router.watching(
                    each,
                    on_gone=lambda number=number: told.append(f"{number} gone"),
                    on_suspect=lambda number=number: told.append(f"{number} suspect"),
                )
            )
        at.router.note_failed(second)
        at.registry.replicas = [second]
        await at.read()
        at.router.note_failed(first)  # nothing is known of it any more
        assert told == ["1 suspect", "0 gone"]
    at.registry.replicas = []
    await at.read()
    assert len(told) == 2


def test_hints_are_bounded_and_agree_both_ways_round() -> None:
    hints = Hints(10)
    for number in range(100):
        hints.note("a" if number % 2 else "b", f"sha256:{number}", 0.0)
    assert sum(bool(hints.holders(f"sha256:{number}")) for number in range(100)) == 10
    hints.forget("a")
    hints.replace("b", [], 1.0)
    assert not any(hints.holders(f"sha256:{number}") for number in range(100))
    assert hints._held == {}


RESOLUTION = Resolution(base_digest=BASE, revision="tenants/acme/policies/tone/revisions/1", digest=DIGEST)


class GatedLoaders:
    """Loads wait for the gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked: list[tuple[str, str]] = []
        self.error: MintError | None = None

    async def ensure(self, replica: Replica, tenant: str, resolution: Resolution) -> bool:
        self.asked.append((replica.name, resolution.digest))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return True


async def test_a_hot_adapter_is_copied_and_then_served_by_both() -> None:
    first, second = two()
    at = await a_setting(first, second)
    loaders = GatedLoaders()
    copies = Copies(at.router, loaders, now_s=at.clock)
    at.router.note_resident(first, DIGEST)
    at.busy(first, 1, DIGEST)
    copies.consider(first, "tenants/acme", RESOLUTION)
    at.busy(second, 1)
    at.busy(first, 1, DIGEST)
    copies.consider(first, "tenants/acme", RESOLUTION)
    await asyncio.sleep(0)
    assert loaders.asked == [(second.name, DIGEST)]
    assert await at.chosen() == first.name  # nobody waits for the copy
    copies.consider(first, "tenants/acme", RESOLUTION)
    loaders.gate.set()
    await asyncio.sleep(0.001)
    assert len(loaders.asked) == 1
    assert await at.chosen() == second.name
    await copies.close()


async def test_an_adapter_among_many_is_not_hot() -> None:
    first, second = two()
    at = await a_setting(first, second)
    at.router.note_resident(first, DIGEST)
    at.busy(first, 3)
    at.busy(first, 1, DIGEST)
    assert at.router.place_for_copy(first, DIGEST) is None


async def test_a_copy_that_fails_is_not_tried_again_at_once() -> None:
    first, second = two()
    at = await a_setting(first, second)
    loaders = GatedLoaders()
    loaders.gate.set()
    loaders.error = Unavailable("no loader")
    copies = Copies(at.router, loaders, pause_s=10, now_s=at.clock)
    at.busy(first, 4, DIGEST)
    for pause_s, num_asked in ((0, 1), (9, 1), (2, 2)):
        at.clock.now_s += pause_s
        copies.consider(first, "tenants/acme", RESOLUTION)
        await asyncio.sleep(0.001)
        assert len(loaders.asked) == num_asked
    await copies.close()


class Answering:
    """Engines that answer, hang or fail."""

    def __init__(self) -> None:
        self.held: dict[str, frozenset[str]] = {}
        self.error: dict[str, MintError] = {}
        self.num_asked: Counter[str] = Counter()

    async def residency(self, replica: Replica, *, timeout_s: float) -> Residency:
        self.num_asked[replica.name] += 1
        if replica.name in self.error:
            raise self.error[replica.name]
        return Residency(self.held.get(replica.name, frozenset()), 0)


async def test_the_lookout_learns_what_is_held_and_who_does_not_answer() -> None:
    first, second = two()
    at = await a_setting(first, second)
    engines = Answering()
    engines.held[second.name] = frozenset({DIGEST})
    lookout = Lookout(at.router, engines, every_s=1000, poll_s=0.002)  # type: ignore[arg-type]
    looking = asyncio.ensure_future(lookout.run())
    await asyncio.sleep(0.02)
    assert await at.chosen() == second.name
    assert engines.num_asked == {first.name: 1, second.name: 1}
    engines.error[second.name] = Unavailable("connection refused")
    at.router.note_failed(second)
    await asyncio.sleep(0.02)
    assert engines.num_asked[second.name] > 2  # a suspect is asked again and again
    assert at.router.is_suspect(second)
    engines.error.clear()
    await asyncio.sleep(0.02)
    assert not at.router.is_suspect(second)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
