from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE, BASE_DIGEST, POLICY, TENANT, Lab

from mint_catalog.model.records import BaseModel, LoraConfig, Policy, PolicyState, TrainingState
from mint_catalog.storage.store import Put
from mint_core.errors import AlreadyExists, EtagMismatch, InvalidArgument, NotFound, WrongState
from mint_core.names import PolicyName, RevisionName


async def _wanted(lab: Lab, **changes: object) -> Policy:
    await lab.base_model()
    return Policy(POLICY, base_model=str(BASE), **changes)  # type: ignore[arg-type]


async def test_a_policy_takes_its_bases_digest_and_defaults() -> None:
    lab = Lab()
    written = await lab.policy()
    policy = written.record
    assert policy.base_digest == BASE_DIGEST
    assert policy.state is PolicyState.ACTIVE
    assert policy.next_revision_number == 1
    assert policy.lora == LoraConfig(rank=16, alpha=32.0)
    assert policy.mod_revision == written.catalog_revision
    assert await lab.policies.get(POLICY) == policy


async def test_a_name_is_taken_once_also_in_a_race() -> None:
    lab = Lab()
    await lab.base_model()
    results = await asyncio.gather(*(lab.policy() for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(result, AlreadyExists) for result in results) == 9


async def test_a_policy_needs_a_registered_base() -> None:
    lab = Lab()
    with pytest.raises(NotFound, match="baseModels/other"):
        await lab.policies.create(POLICY, Policy(POLICY, base_model="baseModels/other"))


async def test_a_base_model_never_changes() -> None:
    lab = Lab()
    first = await lab.base_models.register(BaseModel(BASE, digest=BASE_DIGEST))
    assert (await lab.base_models.register(BaseModel(BASE, digest=BASE_DIGEST))).record == first.record
    with pytest.raises(AlreadyExists, match="never"):
        await lab.base_models.register(BaseModel(BASE, digest="sha256:" + "c" * 64))
    with pytest.raises(InvalidArgument):
        await lab.base_models.register(BaseModel(BASE, digest="md5:1"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lora": LoraConfig(rank=0)}, "policy.lora.rank"),
        ({"lora": LoraConfig(rank=513)}, "policy.lora.rank"),
        ({"lora": LoraConfig(rank=8, alpha=-1)}, "policy.lora.alpha"),
        ({"lora": LoraConfig(rank=8, alpha=float("nan"))}, "policy.lora.alpha"),
        ({"lora": LoraConfig(rank=8, dropout=1.0)}, "policy.lora.dropout"),
        ({"lora": LoraConfig(rank=8, target_modules=("a", "a"))}, "policy.lora.target_modules"),
        ({"lora": LoraConfig(rank=8, target_modules=("../x",))}, "policy.lora.target_modules"),
        ({"labels": {"Bad Key": "x"}}, "policy.labels['Bad Key']"),
        ({"labels": {"k": "x" * 257}}, "policy.labels['k']"),
        ({"labels": {f"k{number}": "" for number in range(65)}}, "policy.labels"),
        ({"owner": "a\nb"}, "policy.owner"),
        ({"description": "x" * 1025}, "policy.description"),
        ({"base_model": "tiny"}, "policy.base_model"),
    ],
)
async def test_bad_fields_are_named(changes: dict[str, object], field: str) -> None:
    lab = Lab()
    await lab.base_model()
    wanted = Policy(POLICY, **({"base_model": str(BASE)} | changes))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        await lab.policies.create(POLICY, wanted)
    assert caught.value.field == field


async def test_an_update_takes_the_masked_fields_alone() -> None:
    lab = Lab()
    created = (await lab.policy()).record
    wanted = await _wanted(lab, owner="ada", description="not taken", labels={"a": "b"}, lora=LoraConfig(rank=2))
    written = await lab.policies.update(POLICY, wanted, {"owner", "labels", "lora"})
    assert written.record.owner == "ada"
    assert written.record.labels == {"a": "b"}
    assert written.record.lora == LoraConfig(rank=2, alpha=4.0)
    assert written.record.description == ""
    assert written.record.uid == created.uid
    assert written.record.mod_revision > created.mod_revision


@pytest.mark.parametrize("mask", [set(), {"uid"}, {"labels.a"}, {"base_model"}])
async def test_only_some_fields_can_change(mask: set[str]) -> None:
    lab = Lab()
    await lab.policy()
    with pytest.raises(InvalidArgument) as caught:
        await lab.policies.update(POLICY, await _wanted(lab), mask)
    assert caught.value.field == "update_mask"


async def test_an_etag_guards() -> None:
    lab = Lab()
    created = (await lab.policy()).record
    etag = str(created.mod_revision)
    await lab.policies.update(POLICY, await _wanted(lab, owner="ada"), {"owner"}, etag)
    with pytest.raises(EtagMismatch):
        await lab.policies.update(POLICY, await _wanted(lab, owner="bob"), {"owner"}, etag)
    with pytest.raises(EtagMismatch):
        await lab.policies.delete(POLICY, etag)
    with pytest.raises(InvalidArgument):
        await lab.policies.delete(POLICY, "W/abc")
    assert (await lab.policies.get(POLICY)).owner == "ada"


async def test_lora_is_fixed_once_trained() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    with pytest.raises(WrongState):
        await lab.policies.update(POLICY, await _wanted(lab, lora=LoraConfig(rank=2)), {"lora"})
    same = await lab.policies.update(POLICY, await _wanted(lab, lora=LoraConfig(rank=16)), {"lora"})
    assert same.record.lora == LoraConfig(rank=16, alpha=32.0)


async def test_lora_is_fixed_once_a_state_is_saved() -> None:
    lab = Lab()
    created = (await lab.policy()).record
    ref = lab.tables.policy(POLICY)
    trained = replace(created, latest_training_state=TrainingState(step=1))
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(trained))])
    with pytest.raises(WrongState):
        await lab.policies.update(POLICY, await _wanted(lab, lora=LoraConfig(rank=2)), {"lora"})


async def test_a_name_made_again_is_another_policy_and_reuses_no_number() -> None:
    lab = Lab()
    first = (await lab.policy()).record
    await lab.publish("one")
    await lab.publish("two")
    await lab.promote(2)
    await lab.policies.delete(POLICY)
    with pytest.raises(NotFound):
        await lab.policies.get(POLICY)
    with pytest.raises(NotFound):
        await lab.resolver.resolve(f"{POLICY}/aliases/live")
    with pytest.raises(NotFound):
        await lab.resolver.resolve(f"{POLICY}/revisions/2")
    again = (await lab.policy()).record
    assert again.uid != first.uid
    assert again.next_revision_number == 3
    for number in (1, 2):
        with pytest.raises(NotFound):
            await lab.revisions.get(RevisionName("acme", "tone", number))
    assert (await lab.revisions.list(POLICY, page_size=0, page_token="")).records == []
    assert (await lab.aliases.list(POLICY))[0] == []
    third = await lab.publish("one")
    assert third.record.number == 3
    page = await lab.revisions.list(POLICY, page_size=0, page_token="")
    assert [revision.number for revision in page.records] == [3]
    with pytest.raises(NotFound):
        await lab.promote(2)


async def test_lora_can_change_again_on_a_name_made_again() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.policies.delete(POLICY)
    await lab.policy()
    written = await lab.policies.update(POLICY, await _wanted(lab, lora=LoraConfig(rank=2)), {"lora"})
    assert written.record.lora == LoraConfig(rank=2, alpha=4.0)


async def test_deletion_buries_the_aliases_and_ends_the_lease() -> None:
    lab = Lab()
    policy = (await lab.policy()).record
    await lab.publish("one")
    for number in range(50):
        await lab.promote(1, alias=f"a{number}")
    await lab.leases.acquire(POLICY, "worker-1", 30)
    await lab.policies.delete(POLICY)
    assert await lab.leases.list(TENANT) == []
    graves = await lab.store.scan(lab.keys.family("graves", "acme"), b"/mint/v1/gravet", limit=1000)
    assert len(graves.values) == 50
    assert all(policy.uid in kv.key.decode() for kv in graves.values)


async def test_a_deleted_policy_takes_no_writes() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.policies.delete(POLICY)
    for write in (
        lab.policies.delete(POLICY),
        lab.policies.update(POLICY, await _wanted(lab), {"owner"}),
        lab.publish("two"),
        lab.promote(1),
        lab.run(),
        lab.leases.acquire(POLICY, "worker-1", 30),
        lab.revisions.retire(RevisionName("acme", "tone", 1)),
    ):
        with pytest.raises(NotFound):
            await write


async def test_tenants_do_not_meet() -> None:
    lab = Lab()
    await lab.policy()
    other = PolicyName("other", "tone")
    await lab.policy(other)
    await lab.publish("one")
    assert (await lab.policies.get(other)).next_revision_number == 1
    with pytest.raises(NotFound):
        await lab.resolver.resolve("tenants/other/policies/tone/revisions/1")
