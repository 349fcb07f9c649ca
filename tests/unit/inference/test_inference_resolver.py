"""What a name means: cache, watch, catalog, and the last known."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace

import pytest

from mint_core import calls
from mint_core.errors import DeadlineExceeded, MintError, NotFound, RevisionCompacted, Unavailable
from mint_core.names import AliasName, RevisionName
from mint_inference.alias_cache import AliasCache
from mint_inference.model import AliasWord, Consistency, Resolution
from mint_inference.resolver import Resolver, ResolverLimits

LIVE = AliasName("acme", "tone", "live")
OTHER = AliasName("acme", "tone", "canary")
REVISION = RevisionName("acme", "tone", 1)
DEFAULT = Consistency()
STRONG = Consistency(strong=True)


def resolution(number: int, read_at: int) -> Resolution:
    return Resolution(
        base_digest="sha256:base",
        revision=f"tenants/acme/policies/tone/revisions/{number}",
        digest=f"sha256:{number}",
        catalog_revision=read_at,
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class TestAliasCache:
    """The rules, without I/O."""

    def setup_method(self) -> None:
        self.clock = Clock()
        self.cache = AliasCache(max_entries=4, staleness_s=5.0, now_s=self.clock)
        self.cache.begin_watch()

    def fill(self, number: int, read_at: int, name: AliasName = LIVE) -> bool:
        return self.cache.fill(name, resolution(number, read_at), asked_at_s=self.clock.now_s)

    def number(self, name: AliasName = LIVE, consistency: Consistency = DEFAULT) -> int | None:
        found = self.cache.get(name, consistency)
        return None if found is None else int(found.digest.partition(":")[2])

    def move(self, number: int, revision: int) -> None:
        self.cache.hear(AliasWord(revision, LIVE, resolution(number, revision)))

    def test_nothing_is_fresh_before_the_watch_spoke(self) -> None:
        assert self.fill(1, 10)
        assert self.number() is None
        self.cache.hear(AliasWord(10))
        assert self.number() == 1

    def test_a_fill_from_before_the_watch_began_is_not_trusted(self) -> None:
        self.fill(1, 9)
        self.cache.hear(AliasWord(10))
        assert self.number() is None

    def test_a_late_fill_is_dropped_when_the_watch_is_ahead(self) -> None:
        self.cache.hear(AliasWord(10))
        self.move(2, 12)  # nobody had asked for it yet
        assert not self.fill(1, 11)
        assert self.number() is None
        assert self.fill(2, 12)
        assert self.number() == 2

    def test_a_fill_read_between_two_aliases_of_one_revision_is_dropped(self) -> None:
        self.cache.hear(AliasWord(10))
        self.cache.hear(AliasWord(12, OTHER, None))
        assert not self.fill(1, 11)

    def test_a_late_word_does_not_undo_a_newer_fill(self) -> None:
        self.cache.hear(AliasWord(10))
        assert self.fill(3, 15)
        self.move(2, 12)
        assert self.number() == 3

    def test_a_word_replaces_what_is_older(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.move(2, 12)
        assert self.number() == 2

    def test_a_deletion_is_believed(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.cache.hear(AliasWord(11, LIVE, None))
        assert self.number() is None
        assert self.cache.last_known(LIVE, within_s=600) is None

    def test_silence_beyond_the_bound_ends_freshness_and_a_tick_brings_it_back(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.clock.now_s += 5.0
        assert self.number() == 1
        self.clock.now_s += 0.1
        assert self.number() is None
        self.cache.hear(AliasWord(11))
        assert self.number() == 1

    def test_a_gap_in_the_watch_ends_freshness_of_older_entries_for_good(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.cache.begin_watch()
        self.cache.hear(AliasWord(90))
        assert self.number() is None
        assert self.cache.last_known(LIVE, within_s=600) is not None
        self.fill(2, 90)
        assert self.number() == 2

    def test_a_resumed_watch_vouches_again_only_when_it_reached_the_present(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.clock.now_s += 60
        self.cache.resume_watch()
        self.cache.hear(AliasWord(20))  # old news, a minute late
        assert self.number() is None
        self.fill(1, 30, name=OTHER)  # the present is at 30
        self.cache.hear(AliasWord(29))
        assert self.number() is None
        self.cache.hear(AliasWord(30))
        assert self.number() == 1

    def test_an_answer_asked_for_before_the_cut_does_not_tell_the_present(self) -> None:
        self.cache.hear(AliasWord(10))
        asked_at_s = self.clock.now_s
        self.clock.now_s += 1
        self.cache.resume_watch()
        self.cache.fill(LIVE, resolution(1, 10), asked_at_s=asked_at_s)
        assert self.number() is None

    def test_min_revision(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        assert self.number(consistency=Consistency(min_revision=10)) == 1
        assert self.number(consistency=Consistency(min_revision=11)) is None
        self.cache.hear(AliasWord(11, OTHER, None))  # others of revision 11 may follow
        assert self.number(consistency=Consistency(min_revision=11)) is None
        self.cache.hear(AliasWord(11))
        assert self.number(consistency=Consistency(min_revision=11)) == 1

    def test_strong_is_never_answered(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        assert self.number(consistency=STRONG) is None

    def test_it_is_bounded_and_the_least_recently_used_leaves(self) -> None:
        self.cache.hear(AliasWord(10))
        names = [AliasName("acme", f"p{number}", "live") for number in range(5)]
        for name in names[:4]:
            self.fill(1, 10, name=name)
        assert self.number(names[0]) == 1
        self.fill(1, 10, name=names[4])
        assert len(self.cache) == 4
        assert [self.number(name) for name in names] == [1, None, 1, 1, 1]

    def test_last_known_ages_from_when_it_was_last_vouched_for(self) -> None:
        self.cache.hear(AliasWord(10))
        self.fill(1, 10)
        self.clock.now_s += 300
        self.cache.hear(AliasWord(11))
        self.clock.now_s += 600
        assert self.cache.last_known(LIVE, within_s=600) is not None
        self.clock.now_s += 1
        assert self.cache.last_known(LIVE, within_s=600) is None


class FakeCatalog:
    """Answers from a table; the watch says what the test puts into its queue."""

    def __init__(self) -> None:
        self.revision = 10
        self.numbers: dict[object, int] = {LIVE: 1, REVISION: 1}
        self.num_asked = 0
        self.asked: list[Consistency] = []
        self.remaining_s: list[float | None] = []
        self.error: MintError | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.words: asyncio.Queue[AliasWord | MintError] = asyncio.Queue()
        self.starts: list[int] = []

    async def resolve(
        self, name: AliasName | RevisionName, consistency: Consistency, *, timeout_s: float
    ) -> Resolution:
        self.num_asked += 1
        self.asked.append(consistency)
        self.remaining_s.append(calls.remaining_s())
        number, read_at = self.numbers.get(name), self.revision
        await self.go.wait()
        if self.error is not None:
            raise self.error
        if number is None:
            raise NotFound(f"{name} does not exist")
        return resolution(number, read_at)

    async def watch_aliases(self, *, after: int) -> AsyncGenerator[AliasWord, None]:
        self.starts.append(after)
        while True:
            word = await self.words.get()
            if isinstance(word, MintError):
                raise word
            yield word

    async def list_replicas(self, *, timeout_s: float):  # type: ignore[no-untyped-def]
        return []

    async def base_digest(self, name: object, *, timeout_s: float) -> str:
        raise NotFound("no such base")


class Setting:
    def __init__(self, limits: ResolverLimits | None = None) -> None:
        self.clock = Clock()
        self.catalog = FakeCatalog()
        self.resolver = Resolver(self.catalog, limits or ResolverLimits(), now_s=self.clock)

    async def number(
        self, consistency: Consistency = DEFAULT, name: AliasName | RevisionName = LIVE, key: str = ""
    ) -> int:
        return int((await self.resolver.resolve(name, key, consistency)).digest.partition(":")[2])

    async def say(self, *words: AliasWord | MintError) -> None:
        for word in words:
            self.catalog.words.put_nowait(word)
        while not self.catalog.words.empty():  # noqa: ASYNC110 - taken by another task
            await asyncio.sleep(0)
        await settle()

    def promote(self, number: int) -> AliasWord:
        self.catalog.revision += 1
        self.catalog.numbers[LIVE] = number
        return AliasWord(self.catalog.revision, LIVE, resolution(number, self.catalog.revision))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.002)


@pytest.fixture
async def at() -> AsyncIterator[Setting]:
    setting = Setting()
    following = asyncio.ensure_future(setting.resolver.follow())
    await until(lambda: setting.catalog.starts)
    await setting.say(AliasWord(10))
    yield setting
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    await setting.resolver.close()


async def test_a_hot_alias_is_asked_for_once(at: Setting) -> None:
    assert [await at.number() for _ in range(100)] == [1] * 100
    assert at.catalog.num_asked == 1


async def test_500_cold_callers_share_one_question_free_of_any_deadline(at: Setting) -> None:
    at.catalog.go.clear()
    with calls.inbound_call("ada", 1.0):
        callers = [asyncio.ensure_future(at.number()) for _ in range(500)]
        await settle()
    callers[0].cancel()
    at.catalog.go.set()
    answers = await asyncio.gather(*callers[1:])
    assert set(answers) == {1}
    assert at.catalog.num_asked == 1
    assert at.catalog.remaining_s == [None]


async def test_a_promotion_is_seen_without_asking(at: Setting) -> None:
    await at.number()
    await at.say(at.promote(2))
    assert await at.number() == 2
    assert at.catalog.num_asked == 1


async def test_a_fill_that_loses_against_the_watch_is_asked_again(at: Setting) -> None:
    at.catalog.go.clear()
    asking = asyncio.ensure_future(at.number())
    await until(lambda: at.catalog.num_asked == 1)
    await at.say(at.promote(2))  # read before, answered after
    at.catalog.go.set()
    assert await asking == 2
    assert at.catalog.num_asked == 2
    assert at.catalog.asked[1].min_revision == 11
    assert await at.number() == 2
    assert at.catalog.num_asked == 2


async def test_a_silent_watch_sends_every_question_to_the_catalog(at: Setting) -> None:
    await at.number()
    at.clock.now_s += 6
    at.promote(2)  # nobody tells us
    assert await at.number() == 2
    assert await at.number() == 2
    assert at.catalog.num_asked == 3


@pytest.mark.parametrize("error", [Unavailable("etcd away"), DeadlineExceeded("catalog stopped")])
async def test_the_last_known_serves_marked_stale_while_the_catalog_is_away(at: Setting, error: MintError) -> None:
    assert not (await at.resolver.resolve(LIVE, "", DEFAULT)).stale
    at.catalog.error = error
    at.clock.now_s += 30
    answer = await at.resolver.resolve(LIVE, "", DEFAULT)
    assert (answer.digest, answer.stale) == ("sha256:1", True)
    num_asked = at.catalog.num_asked
    await at.resolver.resolve(LIVE, "", DEFAULT)
    assert at.catalog.num_asked == num_asked  # it does not wait for a timeout each time
    at.clock.now_s += 1.1
    await at.resolver.resolve(LIVE, "", DEFAULT)
    assert at.catalog.num_asked == num_asked + 1
    at.clock.now_s += 600
    with pytest.raises(Unavailable, match="the catalog is away"):
        await at.number()


async def test_strong_and_min_revision_are_not_answered_stale(at: Setting) -> None:
    await at.number()
    at.catalog.error = Unavailable("etcd away")
    for consistency in (STRONG, Consistency(min_revision=99)):
        with pytest.raises(Unavailable, match="cannot be told as fresh as was asked for"):
            await at.number(consistency)
    assert await at.number(Consistency(min_revision=10)) == 1  # that much is known


async def test_an_unknown_alias_is_unavailable_while_the_catalog_is_away_and_not_found_after(at: Setting) -> None:
    at.catalog.error = Unavailable("etcd away")
    with pytest.raises(Unavailable):
        await at.number(name=OTHER)
    at.catalog.error = None
    with pytest.raises(NotFound):
        await at.number(name=OTHER)
    at.catalog.numbers[OTHER] = 5
    assert await at.number(name=OTHER) == 5  # the refusal was not kept


async def test_a_deleted_alias_is_not_served_stale_later(at: Setting) -> None:
    await at.number()
    del at.catalog.numbers[LIVE]
    with pytest.raises(NotFound):
        await at.number(STRONG)
    at.catalog.error = Unavailable("etcd away")
    with pytest.raises(Unavailable):
        await at.number()


async def test_strong_asks_each_time_and_teaches_the_cache(at: Setting) -> None:
    assert await at.number(STRONG) == 1
    assert await at.number(STRONG) == 1
    assert at.catalog.num_asked == 2
    assert await at.number() == 1
    assert at.catalog.num_asked == 2


async def test_min_revision_asks_the_catalog_once_and_is_then_known(at: Setting) -> None:
    await at.number()
    at.promote(2)
    assert await at.number(Consistency(min_revision=11)) == 2
    assert await at.number() == 2
    assert at.catalog.num_asked == 2


async def test_a_catalog_that_is_behind_is_not_believed(at: Setting) -> None:
    with pytest.raises(Unavailable, match="answered at revision 10, wanted was 50"):
        await at.number(Consistency(min_revision=50))


async def test_a_revision_name_is_kept_and_rechecked_after_a_while(at: Setting) -> None:
    for _ in range(3):
        assert await at.number(name=REVISION, key="ada") == 1
    assert at.catalog.num_asked == 1
    at.clock.now_s += 61
    await at.number(name=REVISION)
    assert at.catalog.num_asked == 2
    del at.catalog.numbers[REVISION]
    at.clock.now_s += 61
    with pytest.raises(NotFound):
        await at.number(name=REVISION)


async def test_a_cut_watch_resumes_where_it_was_and_a_compacted_one_starts_anew(at: Setting) -> None:
    await at.number()
    await at.say(at.promote(2), Unavailable("catalog restarts"))
    await until(lambda: len(at.catalog.starts) == 2)
    # The move of revision 11 may have had siblings, so 11 comes again.
    assert at.catalog.starts == [0, 10]
    await at.say(RevisionCompacted("gone"))
    await until(lambda: len(at.catalog.starts) == 3)
    assert at.catalog.starts[2] == 0
    await at.say(AliasWord(50))
    at.catalog.revision = 50
    at.catalog.numbers[LIVE] = 7  # moved inside the gap
    assert await at.number() == 7


async def test_a_watch_silent_from_the_start_gives_its_place_up() -> None:
    setting = Setting(replace(ResolverLimits(), staleness_s=0.02))
    following = asyncio.ensure_future(setting.resolver.follow())
    await until(lambda: setting.catalog.starts)
    await setting.say(AliasWord(10))
    await until(lambda: len(setting.catalog.starts) >= 3)
    assert setting.catalog.starts[:3] == [0, 10, 0]
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
