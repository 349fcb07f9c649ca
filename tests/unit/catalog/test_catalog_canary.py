"""Canaries: setting, splitting, ending, and what they protect."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import POLICY, Lab, digest_of

from mint_catalog.model.records import Alias, AliasTarget, Canary, PolicyState, Resolution
from mint_catalog.serving.aliases import Edit
from mint_catalog.serving.split import chosen
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Put
from mint_core.errors import (
    EtagMismatch,
    InvalidArgument,
    MintError,
    NotFound,
    RequestIdReused,
    WrongState,
)
from mint_core.names import AliasName, RevisionName

LIVE = AliasName("acme", "tone", "live")
EDIT = Edit(LIVE)
KEYS = [f"user-{number}" for number in range(1000)]


async def _lab(num_revisions: int = 3) -> Lab:
    lab = Lab()
    await lab.policy()
    for number in range(1, num_revisions + 1):
        await lab.publish(f"bytes {number}")
    await lab.promote(1)
    return lab


def _canary(number: int = 2, weight: float = 0.25, salt: str = "", digest: str = "") -> Canary:
    return Canary(AliasTarget(number, digest), weight, salt)


async def test_a_canary_is_stored_with_all_that_resolving_needs() -> None:
    lab = await _lab()
    head = await lab.policies.get(POLICY)
    written = await lab.aliases.set_canary(EDIT, _canary())
    alias = written.record
    assert alias.canary == Canary(AliasTarget(2, digest_of("bytes 2")), 0.25, str(LIVE))
    assert alias.canary_resolution == replace(await lab.resolver.resolve(f"{POLICY}/revisions/2"), catalog_revision=0)
    assert alias.active == AliasTarget(1, digest_of("bytes 1"))
    assert len(alias.history) == 1, "a trial is no move"
    assert await lab.aliases.get(LIVE) == alias
    assert (await lab.policies.get(POLICY)).mod_revision > head.mod_revision


async def test_the_split_is_by_sticky_key() -> None:
    lab = await _lab()
    alias = (await lab.aliases.set_canary(EDIT, _canary())).record
    answers = {key: await lab.resolver.resolve(str(LIVE), key) for key in KEYS}
    seen = {key for key, answer in answers.items() if answer.canary}
    assert 190 < len(seen) < 310
    for key, answer in answers.items():
        assert answer.revision == f"{POLICY}/revisions/{2 if key in seen else 1}"
        assert answer == replace(chosen(alias, key), catalog_revision=answer.catalog_revision)
    without_key = await lab.resolver.resolve(str(LIVE))
    assert (without_key.revision, without_key.canary) == (f"{POLICY}/revisions/1", False)


async def test_a_growing_weight_keeps_who_was_chosen_and_another_salt_chooses_others() -> None:
    lab = await _lab()
    seen: list[set[str]] = []
    for weight in (0.1, 0.2, 1.0):
        alias = (await lab.aliases.set_canary(EDIT, _canary(weight=weight))).record
        seen.append({key for key in KEYS if chosen(alias, key).canary})
    assert seen[0] < seen[1] < seen[2] == set(KEYS)
    alias = (await lab.aliases.set_canary(EDIT, _canary(weight=0.1, salt="autumn"))).record
    assert alias.canary is not None
    assert alias.canary.salt == "autumn"
    others = {key for key in KEYS if chosen(alias, key).canary}
    assert others - seen[0]


async def test_an_answer_with_a_canary_tells_both_sides_and_one_without_none() -> None:
    lab = await _lab()
    assert (await lab.resolver.resolve(str(LIVE), "ada")).split is None
    alias = (await lab.aliases.set_canary(EDIT, _canary())).record
    split = (await lab.resolver.resolve(str(LIVE), "ada")).split
    assert split is not None
    assert (split.weight, split.salt) == (0.25, str(LIVE))
    assert split.active is not None
    assert split.canary is not None
    assert (split.active.revision, split.canary.revision) == (f"{POLICY}/revisions/1", f"{POLICY}/revisions/2")
    assert alias.resolution is not None
    assert alias.resolution.split is None


async def test_clearing() -> None:
    lab = await _lab()
    await lab.aliases.set_canary(EDIT, _canary(weight=1.0))
    cleared = (await lab.aliases.set_canary(EDIT, None)).record
    assert (cleared.canary, cleared.canary_resolution) == (None, None)
    assert not (await lab.resolver.resolve(str(LIVE), "ada")).canary
    num_txns = lab.store.num_txns
    assert (await lab.aliases.set_canary(EDIT, None)).record == cleared
    assert lab.store.num_txns == num_txns, "clearing what is clear writes nothing"


async def test_promoting_the_canary_ends_the_trial() -> None:
    lab = await _lab()
    await lab.aliases.set_canary(EDIT, _canary())
    promoted = (await lab.promote(2)).record
    assert (promoted.canary, promoted.canary_resolution) == (None, None)
    assert promoted.active is not None
    assert promoted.active.revision_number == 2


async def test_promoting_something_else_leaves_the_canary() -> None:
    lab = await _lab()
    known = (await lab.aliases.set_canary(EDIT, _canary())).record
    promoted = (await lab.promote(3)).record
    assert (promoted.canary, promoted.canary_resolution) == (known.canary, known.canary_resolution)


async def test_rolling_back_to_the_canary_ends_the_trial() -> None:
    lab = await _lab()
    await lab.promote(2)
    await lab.aliases.set_canary(EDIT, _canary(1))
    back = (await lab.aliases.rollback(lab.move(0))).record
    assert back.canary is None
    assert back.active is not None
    assert back.active.revision_number == 1


@pytest.mark.parametrize(
    ("canary", "field"),
    [
        (Canary(None, 0.5), "canary.target.revision_number"),
        (_canary(0), "canary.target.revision_number"),
        (_canary(-1), "canary.target.revision_number"),
        (_canary(1), "canary.target.revision_number"),  # is active
        (_canary(weight=0.0), "canary.weight"),
        (_canary(weight=-0.1), "canary.weight"),
        (_canary(weight=1.0001), "canary.weight"),
        (_canary(weight=float("nan")), "canary.weight"),
        (_canary(weight=float("inf")), "canary.weight"),
        (_canary(salt="x" * 129), "canary.salt"),
        (_canary(salt="two\nlines"), "canary.salt"),
        (_canary(digest=digest_of("bytes 3")), "canary.target.digest"),
    ],
)
async def test_a_bad_canary_is_refused(canary: Canary, field: str) -> None:
    lab = await _lab()
    before = await lab.aliases.get(LIVE)
    with pytest.raises(InvalidArgument) as refused:
        await lab.aliases.set_canary(EDIT, canary)
    assert refused.value.field == field
    assert await lab.aliases.get(LIVE) == before


@pytest.mark.parametrize(
    ("edit", "canary", "error"),
    [
        (Edit(AliasName("acme", "tone", "none")), _canary(), NotFound),
        (Edit(AliasName("acme", "none", "live")), _canary(), NotFound),
        (Edit(AliasName("other", "tone", "live")), _canary(), NotFound),
        (EDIT, _canary(9), NotFound),
        (Edit(LIVE, etag="1"), _canary(), EtagMismatch),
        (Edit(LIVE, etag="x"), _canary(), InvalidArgument),
        (Edit(LIVE, reason="x" * 1025), _canary(), InvalidArgument),
        (Edit(AliasName("acme", "tone", "none")), None, NotFound),
    ],
)
async def test_what_set_canary_refuses(edit: Edit, canary: Canary | None, error: type[MintError]) -> None:
    lab = await _lab()
    with pytest.raises(error):
        await lab.aliases.set_canary(edit, canary)


async def test_only_a_ready_revision_of_an_active_policy_is_tried() -> None:
    lab = await _lab()
    await lab.revisions.retire(RevisionName("acme", "tone", 3))
    with pytest.raises(WrongState):
        await lab.aliases.set_canary(EDIT, _canary(3))
    await lab.aliases.set_canary(EDIT, _canary(2))
    ref = lab.tables.policy(POLICY)
    paused = replace(await lab.policies.get(POLICY), state=PolicyState.PAUSED)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(paused))])
    with pytest.raises(WrongState):
        await lab.aliases.set_canary(EDIT, _canary(2, 0.5))
    await lab.aliases.set_canary(EDIT, None)  # taking it back is always allowed


async def test_a_request_id_applies_once() -> None:
    lab = await _lab()

    def request(payload: bytes = b"x") -> Request | None:
        request_id = "0b6a7a33-6a0e-4d5e-9f6a-0f8f8d0c7a11"
        return Request.of(tenant="acme", principal="ada", method="SetCanary", request_id=request_id, payload=payload)

    first = await lab.aliases.set_canary(EDIT, _canary(), request())
    await lab.aliases.set_canary(EDIT, None)
    again = await lab.aliases.set_canary(EDIT, _canary(), request())
    assert again == first
    assert (await lab.aliases.get(LIVE)).canary is None
    with pytest.raises(RequestIdReused):
        await lab.aliases.set_canary(EDIT, _canary(), request(b"y"))


async def test_etag_guards_and_the_same_again_changes_nothing() -> None:
    lab = await _lab()
    first = await lab.aliases.set_canary(EDIT, _canary())
    with_etag = Edit(LIVE, etag=str(first.record.mod_revision))
    assert (await lab.aliases.set_canary(with_etag, _canary())).record == first.record
    second = await lab.aliases.set_canary(with_etag, _canary(weight=0.5))
    assert second.record.mod_revision > first.record.mod_revision
    with pytest.raises(EtagMismatch):
        await lab.aliases.set_canary(with_etag, _canary(weight=0.6))


async def test_a_canary_and_a_promotion_at_once_never_point_at_the_same() -> None:
    for _ in range(5):
        lab = await _lab()
        await asyncio.gather(lab.aliases.set_canary(EDIT, _canary(2)), lab.promote(2), return_exceptions=True)
        alias = await lab.aliases.get(LIVE)
        assert alias.active is not None
        assert alias.active.revision_number == 2
        assert alias.canary is None


async def test_history_keeps_32() -> None:
    lab = await _lab(2)
    for turn in range(40):
        await lab.promote(2 - turn % 2)
    assert len((await lab.aliases.get(LIVE)).history) == 32


def test_an_alias_that_points_nowhere_resolves_to_nothing() -> None:
    with pytest.raises(NotFound):
        chosen(Alias(LIVE), "ada")
    assert chosen(Alias(LIVE, resolution=Resolution("one")), "ada") == Resolution("one")
