from __future__ import annotations

import asyncio

import pytest
from unit.catalog.catalog_lab import BASE, BASE_DIGEST, POLICY, Lab, digest_of

from mint_catalog.model.records import Resolution
from mint_catalog.serving.resolve import Freshness
from mint_core.errors import (
    EtagMismatch,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WrongState,
)
from mint_core.names import AliasName, RevisionName

LIVE = AliasName("acme", "tone", "live")


async def _lab(num_revisions: int = 3) -> Lab:
    lab = Lab()
    await lab.policy()
    for number in range(1, num_revisions + 1):
        await lab.publish(f"bytes {number}")
    return lab


async def _history(lab: Lab) -> list[int]:
    alias = await lab.aliases.get(LIVE)
    return [entry.target.revision_number for entry in alias.history if entry.target]


async def test_promotion_creates_moves_and_remembers() -> None:
    lab = await _lab()
    first = (await lab.aliases.promote(lab.move(1, reason="start"))).record
    second = (await lab.aliases.promote(lab.move(2, etag=str(first.mod_revision), reason="better"))).record
    assert second.active is not None
    assert (second.active.revision_number, second.active.digest) == (2, digest_of("bytes 2"))
    assert await _history(lab) == [2, 1]
    attribution = second.history[0].attribution
    assert attribution is not None
    assert (attribution.principal, attribution.reason) == ("ada", "better")
    assert attribution.time is not None
    assert await lab.aliases.get(LIVE) == second


async def test_resolution_is_complete() -> None:
    lab = await _lab(1)
    promoted = await lab.promote(1)
    revision = await lab.revisions.get(RevisionName("acme", "tone", 1))
    expected = Resolution(
        revision=f"{POLICY}/revisions/1",
        blob=revision.blob,
        object_key=revision.object_key,
        base_model=str(BASE),
        base_digest=BASE_DIGEST,
        catalog_revision=promoted.catalog_revision,
    )
    assert await lab.resolver.resolve(str(LIVE)) == expected
    assert await lab.resolver.resolve(f"{POLICY}/revisions/1") == expected


async def test_an_alias_resolves_in_one_read() -> None:
    lab = await _lab(1)
    await lab.promote(1)
    num_keys = []
    get = lab.store.get

    async def counting(keys: list[bytes], *, revision: int = 0) -> object:
        num_keys.append(len(keys))
        return await get(keys, revision=revision)

    lab.store.get = counting  # type: ignore[method-assign, assignment]
    await lab.resolver.resolve(str(LIVE))
    assert num_keys == [1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tenants/acme/policies/tone/aliases/none", NotFound),
        ("tenants/acme/policies/none/aliases/live", NotFound),
        ("tenants/acme/policies/tone/revisions/99", NotFound),
        ("tenants/other/policies/tone/aliases/live", NotFound),
        ("tenants/acme/policies/tone", InvalidArgument),
        ("tenants/acme/policies/../aliases/live", InvalidArgument),
        ("tenants/acme/policies/tone/revisions/0", InvalidArgument),
        ("", InvalidArgument),
        ("a/b/c/d/aliases/x", InvalidArgument),
    ],
)
async def test_what_does_not_resolve(name: str, error: type[Exception]) -> None:
    lab = await _lab(1)
    await lab.promote(1)
    with pytest.raises(error):
        await lab.resolver.resolve(name)


async def test_a_read_never_goes_behind_what_was_asked() -> None:
    lab = await _lab(1)
    written = await lab.promote(1)
    fresh = await lab.resolver.resolve(str(LIVE), freshness=Freshness(min_revision=written.catalog_revision))
    assert fresh.catalog_revision >= written.catalog_revision
    with pytest.raises(Unavailable):
        await lab.resolver.resolve(str(LIVE), freshness=Freshness(min_revision=written.catalog_revision + 100))


async def test_a_batch_answers_each() -> None:
    lab = await _lab(1)
    await lab.promote(1)
    good, missing, bad = await lab.resolver.resolve_batch([str(LIVE), f"{POLICY}/aliases/none", "x"])
    assert isinstance(good, Resolution)
    assert isinstance(missing, NotFound)
    assert isinstance(bad, InvalidArgument)
    for names in ([], ["x"] * 1001):
        with pytest.raises(InvalidArgument):
            await lab.resolver.resolve_batch(names)


async def test_rollback_goes_to_the_previous_distinct_ready_revision() -> None:
    lab = await _lab(3)
    for number in (1, 2, 2, 3):
        await lab.promote(number)
    assert await _history(lab) == [3, 2, 1]
    back = (await lab.aliases.rollback(lab.move(0, reason="worse"))).record
    assert back.active is not None
    assert back.active.revision_number == 2
    assert await _history(lab) == [2, 3, 2, 1]
    assert (await lab.resolver.resolve(str(LIVE))).revision == f"{POLICY}/revisions/2"


async def test_rollback_skips_what_is_retired() -> None:
    lab = await _lab(3)
    for number in (1, 2, 3):
        await lab.promote(number)
    await lab.revisions.retire(RevisionName("acme", "tone", 2))
    back = (await lab.aliases.rollback(lab.move(0))).record
    assert back.active is not None
    assert back.active.revision_number == 1
    await lab.revisions.retire(RevisionName("acme", "tone", 3))
    with pytest.raises(WrongState, match="no earlier READY"):
        await lab.aliases.rollback(lab.move(0))


async def test_rollback_to_a_named_revision() -> None:
    lab = await _lab(3)
    await lab.promote(3)
    with pytest.raises(WrongState):
        await lab.aliases.rollback(lab.move(0))
    back = (await lab.aliases.rollback(lab.move(1))).record
    assert back.active is not None
    assert back.active.revision_number == 1
    with pytest.raises(NotFound):
        await lab.aliases.rollback(lab.move(9))
    with pytest.raises(NotFound):
        await lab.aliases.rollback(lab.move(0, alias="none"))


async def test_history_is_bounded() -> None:
    lab = await _lab(2)
    for number in range(40):
        await lab.promote(1 + number % 2)
    assert len(await _history(lab)) == 32


async def test_promotion_of_the_present_revision_changes_nothing() -> None:
    lab = await _lab(1)
    first = await lab.promote(1)
    before = lab.store.revision
    assert (await lab.promote(1)).record == first.record
    assert lab.store.revision == before


async def test_only_ready_revisions_can_be_promoted() -> None:
    lab = await _lab(1)
    await lab.revisions.retire(RevisionName("acme", "tone", 1))
    with pytest.raises(WrongState):
        await lab.promote(1)
    with pytest.raises(NotFound):
        await lab.promote(2)
    for number in (0, -1):
        with pytest.raises(InvalidArgument):
            await lab.promote(number)


async def test_of_rivals_with_one_etag_one_wins() -> None:
    lab = await _lab(3)
    etag = str((await lab.promote(1)).record.mod_revision)
    results = await asyncio.gather(
        *(lab.promote(2 + number % 2, etag=etag) for number in range(10)), return_exceptions=True
    )
    won = [result for result in results if not isinstance(result, MintError)]
    assert len(won) == 1
    assert all(isinstance(result, EtagMismatch) for result in results if isinstance(result, MintError))
    assert len(await _history(lab)) == 2


async def test_rivals_without_etags_all_move_it() -> None:
    lab = await _lab(20)
    await asyncio.gather(*(lab.promote(number) for number in range(1, 21)))
    assert sorted(await _history(lab)) == list(range(1, 21))


async def test_a_retirement_that_races_with_a_promotion_never_both() -> None:
    for _ in range(10):
        lab = await _lab(1)
        promoted, retired = await asyncio.gather(
            lab.promote(1), lab.revisions.retire(RevisionName("acme", "tone", 1)), return_exceptions=True
        )
        assert not isinstance(retired, BaseException)
        if not isinstance(promoted, BaseException):
            assert promoted.catalog_revision < retired.catalog_revision


async def test_every_move_bumps_the_head() -> None:
    lab = await _lab(2)
    for write in (lab.promote(1), lab.promote(2), lab.aliases.rollback(lab.move(0))):
        written = await write
        assert (await lab.policies.get(POLICY)).mod_revision == written.catalog_revision
    revision = await lab.aliases.delete(LIVE)
    assert (await lab.policies.get(POLICY)).mod_revision == revision


async def test_deletion_and_listing() -> None:
    lab = await _lab(1)
    for alias in ("live", "canary"):
        await lab.promote(1, alias=alias)
    aliases, _ = await lab.aliases.list(POLICY)
    assert [alias.name.alias for alias in aliases] == ["canary", "live"]
    with pytest.raises(EtagMismatch):
        await lab.aliases.delete(LIVE, "1")
    await lab.aliases.delete(LIVE, str(aliases[1].mod_revision))
    with pytest.raises(NotFound):
        await lab.aliases.delete(LIVE)
    assert len((await lab.aliases.list(POLICY))[0]) == 1


async def test_a_policy_has_at_most_fifty_aliases() -> None:
    lab = await _lab(1)
    for number in range(50):
        await lab.promote(1, alias=f"a{number}")
    with pytest.raises(ResourceExhausted):
        await lab.promote(1, alias="one-more")
