"""Deletion of revisions: what forbids it, and what is left of a deleted one."""

from __future__ import annotations

import uuid

import pytest
from unit.catalog.catalog_lab import POLICY, Lab, digest_of

from mint_catalog.model.records import AliasTarget, BlobRef, Canary, RevisionState
from mint_catalog.serving.aliases import Edit
from mint_catalog.storage.requests import Request
from mint_core.errors import EtagMismatch, NotFound, RequestIdReused, WrongState
from mint_core.names import AliasName, BlobName, RevisionName

FIRST, SECOND = RevisionName("acme", "tone", 1), RevisionName("acme", "tone", 2)


def request(request_id: str, payload: bytes = b"1") -> Request:
    made = Request.of(tenant="acme", principal="ada", method="Delete", request_id=request_id, payload=payload)
    assert made is not None
    return made


@pytest.fixture
async def lab() -> Lab:
    """A policy with two revisions, the first of them retired."""
    made = Lab()
    await made.policy()
    for text in ("one", "two"):
        await made.publish(text)
    return made


async def test_only_a_retired_one_is_deleted(lab: Lab) -> None:
    with pytest.raises(WrongState, match="is READY: retire it before"):
        await lab.revisions.delete(FIRST)
    await lab.revisions.retire(FIRST)
    await lab.revisions.delete(FIRST)
    with pytest.raises(NotFound):
        await lab.revisions.delete(FIRST)
    with pytest.raises(NotFound):
        await lab.revisions.delete(RevisionName("acme", "tone", 9))


async def test_what_an_alias_names_is_not_deleted(lab: Lab) -> None:
    alias = AliasName("acme", "tone", "live")
    await lab.promote(1)
    await lab.revisions.retire(FIRST)
    with pytest.raises(WrongState, match=r"aliases/live points at it"):
        await lab.revisions.delete(FIRST)
    await lab.promote(2)
    with pytest.raises(WrongState, match=r"aliases/live has it in its history") as refused:
        await lab.revisions.delete(FIRST)
    assert refused.value.metadata["alias"] == str(alias)
    await lab.aliases.delete(alias)
    await lab.revisions.delete(FIRST)
    assert (await lab.revisions.get(SECOND)).number == 2


async def test_what_a_canary_names_is_not_deleted(lab: Lab) -> None:
    await lab.promote(1)
    edit = Edit(AliasName("acme", "tone", "live"), "", "try it")
    await lab.aliases.set_canary(edit, Canary(AliasTarget(2, digest_of("two")), 0.5))
    await lab.revisions.retire(SECOND)
    with pytest.raises(WrongState, match=r"aliases/live has it as its canary: clear the canary"):
        await lab.revisions.delete(SECOND)
    await lab.aliases.set_canary(edit, None)
    await lab.revisions.delete(SECOND)


async def test_etag_and_request_id(lab: Lab) -> None:
    retired = (await lab.revisions.retire(FIRST)).record
    with pytest.raises(EtagMismatch):
        await lab.revisions.delete(FIRST, etag=str(retired.mod_revision + 1))
    request_id = str(uuid.uuid4())
    revision = await lab.revisions.delete(FIRST, str(retired.mod_revision), request(request_id))
    assert await lab.revisions.delete(FIRST, str(retired.mod_revision), request(request_id)) == revision
    with pytest.raises(RequestIdReused):
        await lab.revisions.delete(FIRST, "", request(request_id, b"2"))


async def test_number_and_digest_stay_and_readers_find_nothing(lab: Lab) -> None:
    await lab.revisions.retire(FIRST)
    await lab.revisions.delete(FIRST)
    stored = lab.codecs.revision.decode((await lab.store.get([lab.keys.revision(FIRST)])).values[0])
    assert (stored.state, stored.blob) == (RevisionState.DELETED, BlobRef(digest_of("one"), 3))
    for read in (
        lab.revisions.get(FIRST),
        lab.resolver.resolve(str(FIRST)),
        lab.promote(1),
        lab.revisions.retire(FIRST),
    ):
        with pytest.raises(NotFound):
            await read
    page = await lab.revisions.list(POLICY, page_size=9, page_token="")
    assert [each.number for each in page.records] == [2]
    assert (await lab.publish("one")).record.number == 3


async def test_run_and_step_of_a_deleted_one_are_not_published_again(lab: Lab) -> None:
    fence = await lab.fence()
    run = "tenants/acme/runs/r1"
    published = (await lab.publish("three", fence, run=run, step=1)).record
    assert (await lab.publish("three", fence, run=run, step=1)).record.number == published.number
    await lab.revisions.retire(published.name)
    await lab.revisions.delete(published.name)
    with pytest.raises(NotFound, match="was published as it, and it was deleted; publish a later step"):
        await lab.publish("three", fence, run=run, step=1)


async def test_grace_period_of_its_blob_begins_anew(lab: Lab) -> None:
    name = BlobName("acme", digest_of("one"))
    before = await lab.blobs.get(name)
    await lab.revisions.retire(FIRST)
    await lab.revisions.delete(FIRST)
    after = await lab.blobs.get(name)
    assert before.update_time is not None
    assert after.update_time is not None
    assert after.update_time > before.update_time
