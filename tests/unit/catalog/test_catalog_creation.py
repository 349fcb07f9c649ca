from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import pytest
from unit.catalog.catalog_lab import BASE, BASE_DIGEST, POLICY, Lab, digest_of

from mint_catalog.model.records import (
    AliasTarget,
    BlobRef,
    BlobState,
    Lineage,
    LoraConfig,
    Policy,
    PolicyQuota,
    Revision,
    RevisionState,
)
from mint_catalog.model.tables import Ref
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Put
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    BlobMissing,
    InvalidArgument,
    MintError,
    RequestIdReused,
    ResourceExhausted,
)
from mint_core.names import AliasName, BlobName, PolicyName, RevisionName

WANTED = Policy(POLICY, base_model=str(BASE))


def adapter(blob: BlobRef, **changes: object) -> Revision:
    return Revision(RevisionName("acme", "tone", 1), blob=blob, **changes)  # type: ignore[arg-type]


def request_of(payload: bytes = b"", request_id: str = "") -> Request | None:
    return Request.of(
        tenant="acme",
        principal="ada",
        method="mint.v1.CreatePolicyRequest",
        request_id=request_id or str(uuid.uuid4()),
        payload=payload,
    )


async def ready() -> Lab:
    lab = Lab()
    await lab.base_model()
    return lab


async def test_a_policy_comes_with_revisions_and_aliases_in_one_transaction() -> None:
    lab = await ready()
    first, second = await lab.blob("one"), await lab.blob("two")
    lineage = Lineage(f"{POLICY}/revisions/9", "tenants/acme/runs/r1", 7, digest_of("data"), "v1")
    num_txns = lab.store.num_txns
    written = await lab.policies.create(
        POLICY,
        replace(WANTED, lora=LoraConfig(rank=8)),
        revisions=[
            adapter(first, num_tensors=392, layout="packed-1", lineage=lineage),
            adapter(replace(second, size_bytes=0), base_digest=BASE_DIGEST, lora=LoraConfig(rank=4)),
        ],
        aliases={"live": 2, "old": 1},
    )
    assert lab.store.num_txns == num_txns + 1
    assert written.record.next_revision_number == 3
    one = await lab.revisions.get(RevisionName("acme", "tone", 1))
    two = await lab.revisions.get(RevisionName("acme", "tone", 2))
    assert (one.lora, two.lora) == (LoraConfig(8, 16.0), LoraConfig(4, 8.0))
    assert (one.blob, two.blob) == (first, second)
    assert (one.num_tensors, one.layout, one.lineage) == (392, "packed-1", lineage)
    assert one.object_key == (await lab.blobs.get(BlobName("acme", first.digest))).object_key
    assert one.state is RevisionState.READY
    assert one.base_digest == two.base_digest == BASE_DIGEST
    live = await lab.aliases.get(AliasName("acme", "tone", "live"))
    assert live.active == AliasTarget(2, second.digest)
    assert [entry.target for entry in live.history] == [live.active]
    assert live.resolution is not None
    assert live.resolution.object_key == two.object_key
    assert (await lab.aliases.get(AliasName("acme", "tone", "old"))).active == AliasTarget(1, first.digest)
    # What was made is no different from what was published and promoted.
    await lab.publish("three")
    assert (await lab.promote(3)).record.active == AliasTarget(3, digest_of("three"))
    assert (await lab.aliases.rollback(lab.move(0))).record.active == AliasTarget(2, second.digest)


async def test_a_name_used_before_goes_on_with_its_numbers() -> None:
    lab = await ready()
    old = (await lab.policy()).record
    await lab.publish("one")
    await lab.policies.delete(POLICY)
    blob = await lab.blob("two")
    head = (await lab.policies.create(POLICY, WANTED, revisions=[adapter(blob)], aliases={"live": 1})).record
    assert head.next_revision_number == 3
    assert (await lab.aliases.get(AliasName("acme", "tone", "live"))).active == AliasTarget(2, blob.digest)
    purge = lab.keys.purge(POLICY, old.uid)
    assert (await lab.store.get([purge])).values[0] is not None, "what the former policy left is removed"


@pytest.mark.parametrize(
    ("revisions", "aliases", "field"),
    [
        ([{"blob": BlobRef("sha256:1")}], {}, "revisions[0].blob.digest"),
        ([{"blob": None}], {}, "revisions[0].blob.digest"),
        ([{}, {"base_digest": "x"}], {}, "revisions[1].base_digest"),
        ([{"lora": LoraConfig(rank=0)}], {}, "revisions[0].lora.rank"),
        ([{"num_tensors": -1}], {}, "revisions[0].num_tensors"),
        ([{"layout": "x" * 65}], {}, "revisions[0].layout"),
        ([{"lineage": Lineage(step=-1)}], {}, "revisions[0].lineage.step"),
        ([{"lineage": Lineage(run="tenants/b/runs/r")}], {}, "revisions[0].lineage.run"),
        ([{"lineage": Lineage(parent_revision="x")}], {}, "revisions[0].lineage.parent_revision"),
        ([{"blob": BlobRef(digest_of("one"), 99)}], {}, "revisions[0].blob.size_bytes"),
        ([{}] * 17, {}, "revisions"),
        ([{}], {"live": 2}, "aliases['live']"),
        ([{}], {"live": 0}, "aliases['live']"),
        ([], {"live": 1}, "aliases['live']"),
        ([{}], {"LIVE": 1}, "aliases"),
        ([{}], {f"a{number}": 1 for number in range(17)}, "aliases"),
    ],
)
async def test_bad_revisions_and_aliases_are_named(
    revisions: list[dict[str, Any]], aliases: dict[str, int], field: str
) -> None:
    lab = await ready()
    blob = await lab.blob("one")
    wanted = [adapter(**({"blob": blob} | changes)) for changes in revisions]
    with pytest.raises(InvalidArgument) as caught:
        await lab.policies.create(POLICY, WANTED, revisions=wanted, aliases=aliases)
    assert caught.value.field == field
    assert await _nothing(lab)


async def _nothing(lab: Lab) -> bool:
    prefix = lab.keys.family("policies")
    return not (await lab.store.scan(prefix, prefix[:-1] + b"0", limit=10)).values


async def test_what_the_store_does_not_allow_makes_nothing() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    missing, staged = BlobRef(digest_of("missing"), 3), BlobRef(digest_of("staged"), 6)
    await lab.blobs.stage(BlobName("acme", staged.digest), 6)
    other_base = adapter(blob, base_digest=digest_of("other"))
    cases: list[tuple[type[MintError], Policy, list[Revision]]] = [
        (BlobMissing, WANTED, [adapter(blob), adapter(missing)]),
        (BlobMissing, WANTED, [adapter(staged)]),
        (BaseModelMismatch, WANTED, [other_base]),
        (ResourceExhausted, replace(WANTED, quota=PolicyQuota(max_revisions=1)), [adapter(blob), adapter(blob)]),
    ]
    for error, wanted, revisions in cases:
        with pytest.raises(error):
            await lab.policies.create(POLICY, wanted, revisions=revisions)
    assert await _nothing(lab)


async def test_the_largest_creation_fits_one_transaction() -> None:
    lab = await ready()
    blobs = [await lab.blob(f"w{number}") for number in range(16)]
    request = request_of()
    await lab.policies.create(
        POLICY,
        WANTED,
        request,
        revisions=[adapter(blob) for blob in blobs],
        aliases={f"a{number}": number for number in range(1, 17)},
    )
    assert len((await lab.aliases.list(POLICY))[0]) == 16


async def test_a_condemnation_loses_against_a_creation_and_wins_before_it() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    ref: Ref[Any] = lab.tables.blob(BlobName("acme", blob.digest))
    before = (await lab.store.get([ref.key])).values[0]
    await lab.policies.create(POLICY, WANTED, revisions=[adapter(blob)])
    after = (await lab.store.get([ref.key])).values[0]
    assert after.mod_revision > before.mod_revision, "whoever compares the record's revision loses"
    assert after.value == before.value, "whoever compares its value does not"
    condemned = replace(ref.codec.decode(after), state=BlobState.CONDEMNED)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(condemned))])
    with pytest.raises(BlobMissing):
        await lab.policies.create(PolicyName("acme", "two"), WANTED, revisions=[adapter(blob)])


async def test_creations_that_share_a_blob_do_not_conflict() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    num_txns = lab.store.num_txns
    names = [PolicyName("acme", f"p{number}") for number in range(20)]
    await asyncio.gather(*(lab.policies.create(name, WANTED, revisions=[adapter(blob)]) for name in names))
    assert lab.store.num_txns == num_txns + 20


async def test_a_request_id_applies_a_creation_once() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    request = request_of(b"payload", "6f1c1e4e-2a39-4c0e-9a77-0a8f3a1d9b10")
    lab.store.fail_next_txn = "after"
    with pytest.raises(MintError):
        await lab.policies.create(POLICY, WANTED, request, revisions=[adapter(blob)])
    again = await lab.policies.create(POLICY, WANTED, request, revisions=[adapter(blob)])
    assert again.record.next_revision_number == 2
    other = request_of(b"other", "6f1c1e4e-2a39-4c0e-9a77-0a8f3a1d9b10")
    with pytest.raises(RequestIdReused):
        await lab.policies.create(POLICY, WANTED, other)
    with pytest.raises(AlreadyExists):
        await lab.policies.create(POLICY, WANTED, request_of())
