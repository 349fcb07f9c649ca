from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE_DIGEST, POLICY, Lab, digest_of

from mint_catalog.model.records import (
    AdapterSignature,
    BlobRef,
    BlobState,
    Fence,
    Lineage,
    LoraConfig,
    Revision,
    RevisionState,
)
from mint_catalog.storage.store import Put
from mint_core.errors import (
    Aborted,
    AlreadyExists,
    BaseModelMismatch,
    BlobMissing,
    DigestMismatch,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
    NotFound,
    WrongState,
)
from mint_core.names import AliasName, BlobName, PolicyName, RevisionName

RUN = "tenants/acme/runs/r1"
FIRST = RevisionName("acme", "tone", 1)


def _wanted(**changes: object) -> Revision:
    fields: dict[str, object] = {
        "blob": BlobRef(digest_of("one")),
        "base_digest": BASE_DIGEST,
        "lora": LoraConfig(rank=4),
    }
    return Revision(FIRST, **(fields | changes))  # type: ignore[arg-type]


async def _lab() -> Lab:
    lab = Lab()
    await lab.policy()
    return lab


async def _leased(lab: Lab, holder: str = "worker-1", ttl_s: int = 30) -> Fence:
    held = await lab.leases.acquire(POLICY, holder, ttl_s)
    return Fence(str(POLICY), held.token)


async def test_a_publication_allocates_the_number_and_takes_the_blob() -> None:
    lab = await _lab()
    fence = await _leased(lab)
    first = await lab.publish("one", fence, run=RUN, step=5)
    second = await lab.publish("two", fence, run=RUN, step=10)
    assert [first.record.number, second.record.number] == [1, 2]
    assert first.record.state is RevisionState.READY
    assert first.record.blob == BlobRef(digest_of("one"), 3)
    assert first.record.object_key.startswith(f"tenants/acme/blobs/{digest_of('one')[7:]}/")
    assert (await lab.policies.get(POLICY)).next_revision_number == 3
    assert await lab.revisions.get(first.record.name) == first.record


async def test_a_signature_goes_with_the_revision_and_every_alias_of_it() -> None:
    lab = await _lab()
    fence = await _leased(lab)
    await lab.publish("one", fence, run=RUN, step=5)
    blob = (await lab.revisions.get(FIRST)).blob
    signature = AdapterSignature(digest_of("key"), b"\x01" * 64)
    signed = await lab.revisions.publish(POLICY, _wanted(blob=blob, signature=signature), fence)
    assert [(await lab.revisions.get(each)).signature for each in (FIRST, signed.record.name)] == [None, signature]
    alias = AliasName("acme", "tone", "live")
    for number, expected in ((1, None), (2, signature), (1, None)):
        moved = await lab.promote(number)
        assert moved.record.resolution is not None
        assert moved.record.resolution.signature == expected
        for name in (alias, RevisionName("acme", "tone", number)):
            assert (await lab.resolver.resolve(str(name))).signature == expected


@pytest.mark.parametrize(
    ("signature", "field"),
    [
        (AdapterSignature("key", b"\0" * 64), "key_id"),
        (AdapterSignature(digest_of("key"), b"\0" * 63), "value"),
    ],
)
async def test_a_signature_of_another_form_is_refused(signature: AdapterSignature, field: str) -> None:
    lab = await _lab()
    with pytest.raises(InvalidArgument) as caught:
        await lab.revisions.publish(POLICY, _wanted(signature=signature), None, unfenced=True)
    assert caught.value.field == f"revision.signature.{field}"


async def test_a_publication_needs_a_valid_fence() -> None:
    lab = await _lab()
    fence = await _leased(lab, ttl_s=10)
    with pytest.raises(InvalidArgument, match="fence is missing"):
        await lab.revisions.publish(POLICY, _wanted(), None)
    with pytest.raises(InvalidArgument, match=r"fence\.resource"):
        await lab.publish("one", Fence("tenants/acme/policies/other", fence.token))
    for token in (fence.token + 1, fence.token - 1, 0, -5):
        with pytest.raises(LeaseLost):
            await lab.publish("one", Fence(str(POLICY), token))
    with pytest.raises(LeaseHeld):
        await lab.publish("one")
    await lab.store.pass_time(11)
    with pytest.raises(LeaseLost):
        await lab.publish("one", fence)
    successor = await _leased(lab, "worker-2")
    before = lab.store.revision
    with pytest.raises(LeaseLost):
        await lab.publish("one", fence)
    assert lab.store.revision == before, "a refused publication changes nothing"
    assert (await lab.publish("one", successor)).record.number == 1


async def test_a_lease_lost_in_mid_publication_is_noticed() -> None:
    lab = await _lab()
    fence = await _leased(lab, ttl_s=10)
    await lab.blob("one")
    get = lab.store.get

    async def slow_get(keys: list[bytes], *, revision: int = 0) -> object:
        result = await get(keys, revision=revision)
        if lab.keys.policy(POLICY) in keys:
            await lab.store.pass_time(11)
        return result

    lab.store.get = slow_get  # type: ignore[method-assign, assignment]
    with pytest.raises(LeaseLost):
        await lab.revisions.publish(POLICY, _wanted(), fence)
    assert (await lab.store.scan(lab.keys.revisions(POLICY), b"/mint/v1/s", limit=1)).values == ()


async def test_one_step_is_one_revision() -> None:
    lab = await _lab()
    fence = await _leased(lab)
    first = await lab.publish("one", fence, run=RUN, step=5)
    assert (await lab.publish("one", fence, run=RUN, step=5)).record == first.record
    with pytest.raises(AlreadyExists, match="one step has one adapter"):
        await lab.publish("other bytes", fence, run=RUN, step=5)
    await lab.leases.release(POLICY, fence.token)
    assert (await lab.publish("one", fence, run=RUN, step=5)).record == first.record, "a late retry of what was done"
    with pytest.raises(LeaseLost):
        await lab.publish("other bytes", fence, run=RUN, step=5)
    assert (await lab.policies.get(POLICY)).next_revision_number == 2


async def test_publications_at_once_get_numbers_of_their_own() -> None:
    lab = await _lab()
    fence = await _leased(lab)
    written = await asyncio.gather(*(lab.publish(f"bytes {n}", fence, run=RUN, step=n) for n in range(20)))
    assert sorted(each.record.number for each in written) == list(range(1, 21))


async def test_a_blob_must_be_verified() -> None:
    lab = await _lab()
    with pytest.raises(BlobMissing, match="absent"):
        await lab.revisions.publish(POLICY, _wanted(), None, unfenced=True)
    name = BlobName("acme", digest_of("one"))
    staged = await lab.blobs.stage(name, 3)
    with pytest.raises(BlobMissing, match="STAGED"):
        await lab.revisions.publish(POLICY, _wanted(), None, unfenced=True)
    await lab.blobs.verify(name, staged.object_key)
    await lab.revisions.publish(POLICY, _wanted(), None, unfenced=True)


async def test_a_publication_touches_its_blob() -> None:
    lab = await _lab()
    await lab.blob("one")
    name = BlobName("acme", digest_of("one"))
    before = (await lab.blobs.get(name)).mod_revision
    written = await lab.publish("one")
    after = await lab.blobs.get(name)
    assert after.mod_revision == written.catalog_revision > before
    assert after.state is BlobState.VERIFIED


async def test_policies_publish_one_blob_at_once_without_conflicts() -> None:
    lab = await _lab()
    policies = [PolicyName("acme", f"p{n}") for n in range(20)]
    for policy in policies:
        await lab.policy(policy)
    await lab.blob("one")
    before = lab.store.num_txns
    await asyncio.gather(*(lab.revisions.publish(policy, _wanted(), None, unfenced=True) for policy in policies))
    assert lab.store.num_tried_txns - lab.store.num_txns == 0
    assert lab.store.num_txns == before + len(policies)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"base_digest": "sha256:" + "c" * 64}, BaseModelMismatch),
        ({"blob": BlobRef(digest_of("one"), 99)}, InvalidArgument),
        ({"blob": BlobRef("sha256:nonsense")}, InvalidArgument),
        ({"blob": None}, InvalidArgument),
        ({"lora": LoraConfig(rank=1000)}, InvalidArgument),
        ({"lineage": Lineage(run="tenants/other/runs/r")}, InvalidArgument),
        ({"lineage": Lineage(run=RUN, step=-1)}, InvalidArgument),
        ({"lineage": Lineage(parent_revision="nonsense")}, InvalidArgument),
        ({"num_tensors": -1}, InvalidArgument),
    ],
)
async def test_what_does_not_fit_is_refused(changes: dict[str, object], error: type[Exception]) -> None:
    lab = await _lab()
    await lab.blob("one")
    with pytest.raises(error):
        await lab.revisions.publish(POLICY, _wanted(**changes), None, unfenced=True)


async def test_retirement_is_once_and_bumps_the_head() -> None:
    lab = await _lab()
    revision = (await lab.publish("one")).record
    head = await lab.policies.get(POLICY)
    retired = await lab.revisions.retire(FIRST, str(revision.mod_revision))
    assert retired.record.state is RevisionState.RETIRED
    assert (await lab.policies.get(POLICY)).mod_revision == retired.catalog_revision > head.mod_revision
    with pytest.raises(WrongState):
        await lab.revisions.retire(FIRST)
    with pytest.raises(NotFound):
        await lab.revisions.retire(RevisionName("acme", "tone", 2))


async def test_revisions_are_listed_oldest_first() -> None:
    lab = await _lab()
    for number in range(12):
        await lab.publish(f"bytes {number}")
    numbers, token = [], ""
    for _ in itertools.count():
        page = await lab.revisions.list(POLICY, page_size=5, page_token=token)
        numbers += [revision.number for revision in page.records]
        token = page.next_page_token
        if not token:
            break
    assert numbers == list(range(1, 13))


async def test_a_blobs_life() -> None:
    lab = Lab()
    name = BlobName("acme", digest_of("one"))
    with pytest.raises(NotFound):
        await lab.blobs.verify(name, "key")
    with pytest.raises(InvalidArgument):
        await lab.blobs.stage(name, 0)
    staged = await lab.blobs.stage(name, 3)
    assert (await lab.blobs.stage(name, 3)).object_key == staged.object_key
    restaged = await lab.blobs.stage(name, 4)
    assert restaged.object_key != staged.object_key, "an unproven size gives way"
    with pytest.raises(Aborted):
        await lab.blobs.verify(name, staged.object_key)
    verified = await lab.blobs.verify(name, restaged.object_key)
    assert await lab.blobs.verify(name, restaged.object_key) == verified
    assert await lab.blobs.stage(name, 4) == verified
    with pytest.raises(DigestMismatch):
        await lab.blobs.stage(name, 5)


async def test_a_condemned_blob_is_staged_anew() -> None:
    lab = await _lab()
    await lab.blob("one")
    name = BlobName("acme", digest_of("one"))
    ref, record = lab.tables.blob(name), await lab.blobs.get(name)
    condemned = replace(record, state=BlobState.CONDEMNED)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(condemned))])
    with pytest.raises(BlobMissing, match="CONDEMNED"):
        await lab.revisions.publish(POLICY, _wanted(), None, unfenced=True)
    with pytest.raises(Aborted):
        await lab.blobs.verify(name, record.object_key)
    again = await lab.blobs.stage(name, 3)
    assert again.state is BlobState.STAGED
    assert again.object_key != record.object_key
