from __future__ import annotations

import pytest
from unit.catalog.catalog_lab import BASE, TENANT, Lab

from mint_catalog import policy_filter
from mint_catalog.records import Policy, PolicyState
from mint_core.errors import InvalidArgument, RevisionCompacted, Unavailable
from mint_core.names import PolicyName, TenantName


async def _filled(num: int) -> Lab:
    lab = Lab()
    await lab.base_model()
    for number in range(num):
        name = PolicyName("acme", f"p{number:03d}")
        labels = {"team": "search" if number % 10 == 0 else "ads"}
        await lab.policies.create(name, Policy(name, base_model=str(BASE), labels=labels))
    await lab.policy(PolicyName("acme-2", "other"))
    return lab


async def _all_pages(lab: Lab, page_size: int, filter_: str = "") -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = await lab.policies.list(TENANT, page_size=page_size, page_token=token, filter_=filter_)
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


async def test_pages_are_of_one_revision() -> None:
    lab = await _filled(20)
    first = await lab.policies.list(TENANT, page_size=5, page_token="")
    for number in range(20):
        await lab.policies.delete(PolicyName("acme", f"p{number:03d}"))
        await lab.policy(PolicyName("acme", f"q{number:03d}"))
    names, token = [policy.name.policy for policy in first.records], first.next_page_token
    while token:
        page = await lab.policies.list(TENANT, page_size=5, page_token=token)
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
    token = (await lab.policies.list(TENANT, page_size=3, page_token="")).next_page_token
    for bad in ("!", token[:-4], token + "AAAA", "AAAA", "x" * 3000):
        with pytest.raises(InvalidArgument) as caught:
            await lab.policies.list(TENANT, page_size=3, page_token=bad)
        assert caught.value.field == "page_token"
    for tenant, filter_ in ((TenantName("acme-2"), ""), (TENANT, "state = ACTIVE")):
        with pytest.raises(InvalidArgument):
            await lab.policies.list(tenant, page_size=3, page_token=token, filter_=filter_)


async def test_a_token_of_compacted_history_says_list_again() -> None:
    lab = await _filled(10)
    token = (await lab.policies.list(TENANT, page_size=3, page_token="")).next_page_token
    await lab.policy(PolicyName("acme", "more"))
    await lab.store.compact(lab.store.revision)
    with pytest.raises(RevisionCompacted):
        await lab.policies.list(TENANT, page_size=3, page_token=token)


async def test_bad_sizes_orders_and_revisions_are_refused() -> None:
    lab = await _filled(1)
    with pytest.raises(InvalidArgument, match="page_size is -1"):
        await lab.policies.list(TENANT, page_size=-1, page_token="")
    with pytest.raises(InvalidArgument, match="order_by"):
        await lab.policies.list(TENANT, page_size=0, page_token="", order_by="name")
    with pytest.raises(Unavailable):
        await lab.policies.list(TENANT, page_size=0, page_token="", min_revision=10_000)


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
    ],
)
def test_filters_that_hold(text: str) -> None:
    assert policy_filter.parse(text)(_policy())


@pytest.mark.parametrize("text", ['owner = "bob"', "labels.x = y", "state = PAUSED", "owner=ada AND state=DELETED"])
def test_filters_that_do_not_hold(text: str) -> None:
    assert not policy_filter.parse(text)(_policy())


@pytest.mark.parametrize(
    "text",
    ["x", "owner", "owner =", "owner = ada OR state = ACTIVE", "uid = 1", "state = GONE", "a = b AND", "y" * 3000],
)
def test_bad_filters_name_the_place(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        policy_filter.parse(text)
    assert caught.value.field == "filter"
