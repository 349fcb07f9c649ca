"""The split of an alias with a canary: computed here, as the catalog does, without asking for each sticky key."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from mint_api.v1 import inference_service_pb2 as pb
from mint_catalog.model.records import Alias, AliasTarget, Canary
from mint_catalog.model.records import Resolution as Record
from mint_catalog.serving.split import chosen
from mint_core.errors import Unavailable
from mint_core.names import AliasName, RevisionName
from mint_inference.codec import decode_generate, decode_score, encode_header
from mint_inference.model import AliasWord, Consistency, Header, Resolution, Split
from mint_inference.resolver import Resolver, ResolverLimits

LIVE = AliasName("acme", "tone", "live")
KEYS = [f"user-{number}" for number in range(200)]
DEFAULT = Consistency()


def _resolution(number: int, read_at: int = 0, **changes: object) -> Resolution:
    fields: dict[str, object] = {"digest": f"sha256:{number}", "catalog_revision": read_at}
    return Resolution("sha256:base", revision=f"{LIVE.parent}/revisions/{number}", **(fields | changes))  # type: ignore[arg-type]


def _split(weight: float, read_at: int) -> Resolution:
    split = Split(weight, "salt", _resolution(1), _resolution(2, canary=True))
    return _resolution(1, read_at, split=split)


class _Catalog:
    def __init__(self, answer: Resolution) -> None:
        self.answer = answer
        self.num_asked = 0
        self.is_away = False
        self.words: asyncio.Queue[AliasWord] = asyncio.Queue()

    async def resolve(
        self, name: AliasName | RevisionName, consistency: Consistency, *, timeout_s: float
    ) -> Resolution:
        self.num_asked += 1
        if self.is_away:
            raise Unavailable("away")
        return self.answer

    async def watch_aliases(self, *, after: int) -> AsyncGenerator[AliasWord, None]:
        while True:
            yield await self.words.get()

    async def list_replicas(self, *, timeout_s: float):  # type: ignore[no-untyped-def]
        return []

    async def base_digest(self, name: object, *, timeout_s: float) -> str:
        return "sha256:base"


@contextlib.asynccontextmanager
async def _following(catalog: _Catalog) -> AsyncGenerator[Resolver, None]:
    resolver = Resolver(catalog, ResolverLimits())
    following = asyncio.ensure_future(resolver.follow())
    await _say(catalog, AliasWord(10))
    yield resolver
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    await resolver.close()


async def _say(catalog: _Catalog, word: AliasWord) -> None:
    catalog.words.put_nowait(word)
    for _ in range(20):
        await asyncio.sleep(0)


async def _canaries(resolver: Resolver, consistency: Consistency = DEFAULT) -> set[str]:
    found = set()
    for key in KEYS:
        answer = await resolver.resolve(LIVE, key, consistency)
        assert (answer.digest == "sha256:2") == answer.canary
        if answer.canary:
            found.add(key)
    return found


async def test_one_question_answers_every_sticky_key() -> None:
    catalog = _Catalog(_split(0.3, 10))
    async with _following(catalog) as resolver:
        canaries = await _canaries(resolver)
        assert 30 < len(canaries) < 90
        assert not (await resolver.resolve(LIVE, "", DEFAULT)).canary
        assert (await resolver.resolve(LIVE, KEYS[0], DEFAULT)).catalog_revision == 10
        assert catalog.num_asked == 1


async def test_the_split_is_the_catalogs() -> None:
    active, canary = Record(revision="one"), Record(revision="two")
    alias = Alias(LIVE, resolution=active, canary=Canary(AliasTarget(2), 0.3, "salt"), canary_resolution=canary)
    async with _following(_Catalog(_split(0.3, 10))) as resolver:
        assert await _canaries(resolver) == {key for key in KEYS if chosen(alias, key).canary}


async def test_a_canary_comes_grows_and_goes_by_the_watch_alone() -> None:
    catalog = _Catalog(_resolution(1, 10))
    async with _following(catalog) as resolver:
        assert await _canaries(resolver) == set()
        await _say(catalog, AliasWord(11, LIVE, _split(0.1, 11)))
        few = await _canaries(resolver)
        await _say(catalog, AliasWord(12, LIVE, _split(0.5, 12)))
        many = await _canaries(resolver)
        assert few
        assert few < many
        await _say(catalog, AliasWord(13, LIVE, _resolution(1, 13)))
        assert await _canaries(resolver) == set()
        assert catalog.num_asked == 1


async def test_a_strong_request_is_split_too() -> None:
    catalog = _Catalog(_split(1.0, 10))
    async with _following(catalog) as resolver:
        answer = await resolver.resolve(LIVE, "ada", Consistency(strong=True))
        assert (answer.canary, catalog.num_asked) == (True, 1)


def test_the_sticky_key_of_a_request_is_heard_and_the_canary_is_reported() -> None:
    name = str(LIVE)
    prompt = pb.Prompt(text="x")
    assert decode_generate(pb.GenerateRequest(model=name, prompt=prompt, sticky_key="ada")).sticky_key == "ada"
    assert decode_score(pb.ScoreRequest(model=name, prompt=prompt, sticky_key="ada")).sticky_key == "ada"
    header = encode_header(Header(_split(1.0, 10).of("ada"), "engineReplicas/one", False, [1]))
    assert (header.resolution.canary, header.resolution.catalog_revision) == (True, 10)
    assert not header.resolution.HasField("split")


async def test_the_last_known_split_serves_while_the_catalog_is_away() -> None:
    catalog = _Catalog(_split(1.0, 10))
    resolver = Resolver(catalog, ResolverLimits())  # nobody follows: everything is asked for
    await resolver.resolve(LIVE, "", DEFAULT)
    catalog.is_away = True
    answer = await resolver.resolve(LIVE, "ada", DEFAULT)
    assert (answer.canary, answer.stale) == (True, True)
    answer = await resolver.resolve(LIVE, "", DEFAULT)
    assert (answer.canary, answer.stale) == (False, True)
    await resolver.close()
