from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, Lab

from mint_catalog.model.keys import shard_of
from mint_catalog.model.records import Policy, PolicyState
from mint_catalog.policies import policy_filter
from mint_catalog.policies.policy_listing import PolicyQuery
from mint_catalog.serving.aliases import Move
from mint_core.errors import AlreadyExists, InvalidArgument, RevisionCompacted, Unavailable
from mint_core.names import AliasName, PolicyName


async def _filled(num: int) -> Lab:
    lab = Lab()
    await lab.base_model()
    for number in range(num):
        name = PolicyName("acme", f"p{number:03d}")
        labels = {"team": "search" if number % 10 == 0 else "ads"}
        await lab.policies.create(name, Policy(name, base_model=str(BASE), labels=labels))
    await lab.policy(PolicyName("acme-2", "other"))
    return lab


async def _all_pages(
    lab: Lab, page_size: int, filter_: str = "", *, tenant: str = "acme", order_by: str = ""
) -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = await lab.policies.list(PolicyQuery(tenant, page_size, token, filter_, order_by))
        pages.append([policy.name.policy for policy in page.records])
        token = page.next_page_token
        if not token:
            return pages


@pytest.mark.parametrize("page_size", [1, 7, 50, 120, 1000])
async def test_pages_hold_everything_once(page_size: int) -> None:
    lab = await _filled(120)
    pages = await _all_pages(lab, page_size)
    names = [name for page in pages for name in page]
    assert sorted(names) == [f"p{number:03d}" for number in range(120)]
    assert all(len(page) == page_size for page in pages[:-1])
    assert len(pages) == -(-120 // page_size), "no empty page at the end"


@pytest.mark.parametrize("page_size", [1, 7, 50, 120, 1000])
async def test_pages_by_name_are_in_order(page_size: int) -> None:
    lab = await _filled(120)
    pages = await _all_pages(lab, page_size, order_by="name")
    assert [name for page in pages for name in page] == [f"p{number:03d}" for number in range(120)]
    assert len(pages) == -(-120 // page_size), "no empty page at the end"


async def test_pages_by_name_of_uneven_shards() -> None:
    """Shard 00 tells how far to read: it may be empty, or hold what all others do not."""
    lab = Lab()
    await lab.base_model()
    numbers = [number for number in range(3000) if shard_of(f"n{number:04d}") in ("00", "7f", "ff")]
    others = [number for number in numbers if shard_of(f"n{number:04d}") != "00"]
    for chosen in (others, numbers):
        for number in chosen:
            with contextlib.suppress(AlreadyExists):
                await lab.policies.create(PolicyName("acme", f"n{number:04d}"), Policy(POLICY, base_model=str(BASE)))
        pages = await _all_pages(lab, 4, order_by="name")
        assert [name for page in pages for name in page] == [f"n{number:04d}" for number in chosen]


@pytest.mark.parametrize("page_size", [1, 4, 100])
async def test_all_tenants_are_listed(page_size: int) -> None:
    lab = await _filled(6)
    await lab.policy(PolicyName("zeta", "last"))
    pages = await _all_pages(lab, page_size, tenant="-")
    assert sorted(name for page in pages for name in page) == ["last", "other", *(f"p00{n}" for n in range(6))]
    one = await _all_pages(lab, page_size, "tenant = acme-2", tenant="-")
    assert [name for page in one for name in page] == ["other"]
    assert not any(await _all_pages(lab, page_size, "tenant = acme-2"))


async def test_a_filter_on_an_alias_asks_for_it_at_the_listings_revision() -> None:
    lab = await _filled(0)
    for number in range(12):
        policy = PolicyName("acme", f"p{number:03d}")
        await lab.policy(policy)
        await lab.publish("w", policy=policy)
        aliases = ["live"] + (["canary"] if number % 3 == 0 else [])
        for alias in aliases:
            await lab.aliases.promote(Move(AliasName("acme", policy.policy, alias), 1, "", "", "ada"))
    first = await lab.policies.list(PolicyQuery("acme", 2, "", "alias = canary"))
    await lab.aliases.delete(AliasName("acme", "p009", "canary"))
    rest = await lab.policies.list(PolicyQuery("acme", 10, first.next_page_token, "alias = canary"))
    names = [policy.name.policy for page in (first, rest) for policy in page.records]
    assert sorted(names) == ["p000", "p003", "p006", "p009"]
    both = await _all_pages(lab, 10, "alias = canary AND alias = live")
    assert sorted(name for page in both for name in page) == ["p000", "p003", "p006"]
    assert await _all_pages(lab, 10, "alias = nobody") == [[]]


@pytest.mark.parametrize("order_by", ["", "name"])
async def test_pages_are_of_one_revision(order_by: str) -> None:
    lab = await _filled(20)
    first = await lab.policies.list(PolicyQuery("acme", 5, order_by=order_by))
    for number in range(20):
        await lab.policies.delete(PolicyName("acme", f"p{number:03d}"))
        await lab.policy(PolicyName("acme", f"q{number:03d}"))
    names, token = [policy.name.policy for policy in first.records], first.next_page_token
    while token:
        page = await lab.policies.list(PolicyQuery("acme", 5, token, order_by=order_by))
        assert page.catalog_revision == first.catalog_revision
        names += [policy.name.policy for policy in page.records]
        token = page.next_page_token
    assert sorted(names) == [f"p{number:03d}" for number in range(20)]


async def test_a_filter_restricts_and_leaves_deleted_ones_out() -> None:
    lab = await _filled(30)
    await lab.policies.delete(PolicyName("acme", "p010"))
    names = [name for page in await _all_pages(lab, 2, 'labels.team = "search"') for name in page]
    assert sorted(names) == ["p000", "p020"]
    deleted = await _all_pages(lab, 10, "state=DELETED")
    assert deleted == [["p010"]]


async def test_a_token_belongs_to_its_listing() -> None:
    lab = await _filled(10)
    token = (await lab.policies.list(PolicyQuery("acme", 3))).next_page_token
    for bad in ("!", token[:-4], token + "AAAA", "AAAA", "x" * 3000):
        with pytest.raises(InvalidArgument) as caught:
            await lab.policies.list(PolicyQuery("acme", 3, bad))
        assert caught.value.field == "page_token"
    for other in (
        PolicyQuery("acme-2", 3, token),
        PolicyQuery("-", 3, token),
        PolicyQuery("acme", 3, token, filter="state = ACTIVE"),
        PolicyQuery("acme", 3, token, order_by="name"),
    ):
        with pytest.raises(InvalidArgument):
            await lab.policies.list(other)


@pytest.mark.parametrize(
    "query", [PolicyQuery("acme", 3), PolicyQuery("acme", 3, order_by="name"), PolicyQuery("-", 3)]
)
async def test_a_token_of_compacted_history_says_list_again(query: PolicyQuery) -> None:
    lab = await _filled(10)
    token = (await lab.policies.list(query)).next_page_token
    await lab.policy(PolicyName("acme", "more"))
    await lab.store.compact(lab.store.revision)
    with pytest.raises(RevisionCompacted):
        await lab.policies.list(replace(query, page_token=token))


async def test_bad_sizes_orders_and_revisions_are_refused() -> None:
    lab = await _filled(1)
    with pytest.raises(InvalidArgument, match="page_size is -1"):
        await lab.policies.list(PolicyQuery("acme", -1))
    with pytest.raises(InvalidArgument, match=r"order_by is .create_time.: "):
        await lab.policies.list(PolicyQuery("acme", order_by="create_time"))
    with pytest.raises(InvalidArgument, match="one tenant's policies only"):
        await lab.policies.list(PolicyQuery("-", order_by="name"))
    with pytest.raises(Unavailable):
        await lab.policies.list(PolicyQuery("acme", min_revision=10_000))


async def test_a_page_of_large_policies_ends_before_it_is_too_large_to_send() -> None:
    lab = Lab()
    await lab.base_model()
    labels = {f"l{number}": "x" * 256 for number in range(64)}
    for number in range(100):
        await lab.policies.create(
            PolicyName("acme", f"p{number:03d}"), Policy(POLICY, base_model=str(BASE), labels=labels)
        )
    pages = await _all_pages(lab, 1000, order_by="name")
    assert [name for page in pages for name in page] == [f"p{number:03d}" for number in range(100)]
    assert max(map(len, pages)) < 50


def _policy(**changes: object) -> Policy:
    fields: dict[str, object] = {
        "base_model": "baseModels/b",
        "labels": {"team": "search"},
        "owner": "ada",
        "state": PolicyState.ACTIVE,
    }
    return Policy(PolicyName("t", "p"), **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        'base_model = "baseModels/b"',
        "base_model=baseModels/b AND labels.team=search",
        'owner = "ada" AND state = ACTIVE AND labels.team = "search"',
        'tenant = t AND alias = "canary"',
    ],
)
def test_filters_that_hold(text: str) -> None:
    assert policy_filter.parse(text)(_policy())


@pytest.mark.parametrize(
    "text", ['owner = "bob"', "labels.x = y", "state = PAUSED", "owner=ada AND state=DELETED", "tenant = x"]
)
def test_filters_that_do_not_hold(text: str) -> None:
    assert not policy_filter.parse(text)(_policy())


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "owner",
        "owner =",
        "owner = ada OR state = ACTIVE",
        "uid = 1",
        "state = GONE",
        "a = b AND",
        "alias = A/B",
        "tenant = -",
        "y" * 3000,
    ],
)
def test_bad_filters_name_the_place(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        policy_filter.parse(text)
    assert caught.value.field == "filter"
