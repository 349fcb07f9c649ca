"""Garbage collection: what goes, what stays."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from unit.catalog.catalog_lab import BASE_DIGEST, POLICY, TENANT, Lab, digest_of, rollout
from unit.catalog.garbage_lab import NO_GRACE, GarbageLab

from mint_blobs.objects import PartUpload
from mint_catalog.model.records import (
    BlobRef,
    BlobState,
    Evaluation,
    Lineage,
    LoraConfig,
    PolicyState,
    Revision,
    TrainingState,
    now,
)
from mint_catalog.model.run_records import Run, RunState, SftRecipe
from mint_catalog.storage.duty import Duties
from mint_catalog.storage.store import Delete, Put, prefix_end
from mint_catalog.upkeep.garbage import GarbageCollector, Grace
from mint_core.errors import Aborted, BlobMissing, FailedPrecondition, LeaseHeld, NotFound, WrongState
from mint_core.names import BlobName, EvaluationName, PolicyName, RevisionName, RunName

DAY = timedelta(days=1)


async def publish(lab: GarbageLab, text: str, policy: PolicyName = POLICY, *, run: str = "", step: int = 0) -> Revision:
    blob = await lab.put(text, policy.tenant)
    wanted = Revision(
        RevisionName(policy.tenant, policy.policy, 1),
        blob=BlobRef(blob.digest),
        base_digest=BASE_DIGEST,
        lora=LoraConfig(rank=4),
        lineage=Lineage(run=run, step=step),
    )
    return (await lab.revisions.publish(policy, wanted, None, unfenced=True)).record


async def test_unreferenced_blob_is_condemned_then_deleted_and_can_be_put_again() -> None:
    lab = GarbageLab()
    await lab.policy()
    kept, lost = await publish(lab, "kept"), await lab.put("lost")
    old_key = (await lab.records())[lost.digest].object_key

    first = await lab.collect()
    assert (first.num_blobs, first.num_blobs_condemned, first.num_bytes_condemned) == (2, 1, 4)
    assert first.examples == (str(lost),)
    assert (await lab.records())[lost.digest].state is BlobState.CONDEMNED
    assert old_key in await lab.object_keys()  # for who resolved it a moment ago
    with pytest.raises(BlobMissing):
        await lab.runs.create(
            TENANT,
            "r1",
            Run(RunName("acme", "x"), str(POLICY), sft=SftRecipe(BlobRef(lost.digest), num_steps=1)),
        )

    second = await lab.collect()
    assert (second.num_blobs_deleted, second.num_blobs_condemned) == (1, 0)
    assert await lab.object_keys() == {kept.object_key}
    assert list(await lab.records()) == [kept.blob.digest if kept.blob else ""]

    await lab.put("lost")
    assert (await lab.records())[lost.digest].object_key != old_key
    await publish(lab, "lost")
    await lab.collect()
    assert await lab.check_revisions_have_blobs() == 2


async def test_a_put_that_meets_condemned_uploads_anew_and_the_old_object_goes() -> None:
    lab = GarbageLab()
    await lab.policy()
    await lab.put("weights")
    await lab.collect()
    revision = await publish(lab, "weights")
    assert len(await lab.object_keys()) == 2
    report = await lab.collect()
    assert (report.num_objects_deleted, report.num_blobs_condemned, report.num_blobs_deleted) == (1, 0, 0)
    assert await lab.object_keys() == {revision.object_key}


@pytest.mark.parametrize(
    ("age", "condemned"), [(timedelta(days=29), 0), (timedelta(days=31), 1), (timedelta(days=400), 1)]
)
async def test_grace_period(age: timedelta, condemned: int) -> None:
    lab = GarbageLab(Grace())
    await lab.age(await lab.put("data"), age)
    assert (await lab.collect()).num_blobs_condemned == condemned
    assert (await lab.collect()).num_blobs_deleted == 0  # not within an hour


async def test_asking_for_a_blob_renews_it() -> None:
    lab = GarbageLab(Grace())
    data = await lab.put("data")
    await lab.age(data, 31 * DAY)
    assert (await lab.blobs.stage(data, 4)).state is BlobState.VERIFIED
    assert (await lab.collect()).num_blobs_condemned == 0


async def test_record_of_before_has_its_age_from_the_first_collection() -> None:
    lab = GarbageLab()
    data = await lab.put("data")
    ref = lab.tables.blob(data)
    old = replace(await lab.blobs.get(data), update_time=None)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(old))])
    assert (await lab.collect(dry_run=True)).num_blobs_condemned == 0
    assert (await lab.blobs.get(data)).update_time is None
    assert (await lab.collect()).num_blobs_condemned == 0
    assert (await lab.blobs.get(data)).update_time is not None
    assert (await lab.collect()).num_blobs_condemned == 1


@pytest.mark.parametrize(
    ("state", "held"),
    [
        (RunState.QUEUED, True),
        (RunState.RUNNING, True),
        (RunState.FAILED, True),
        (RunState.SUCCEEDED, False),
        (RunState.CANCELLED, False),
    ],
)
async def test_data_of_runs(state: RunState, held: bool) -> None:
    lab = GarbageLab(Grace())
    await lab.policy()
    train, evaluation = await lab.put("train"), await lab.put("eval")
    recipe = SftRecipe(BlobRef(train.digest), BlobRef(evaluation.digest), num_steps=2)
    created = await lab.runs.create(TENANT, "r1", Run(RunName("acme", "x"), str(POLICY), sft=recipe))
    for blob in (train, evaluation):
        await lab.age(blob, 60 * DAY)
    assert (await lab.collect()).num_blobs_condemned == 0
    ref = lab.tables.run(created.record.name)
    for days, condemned in ((29, 0), (31, 0 if held else 2)):
        end_time = now() - days * DAY if state >= RunState.SUCCEEDED else None
        ended = replace(created.record, state=state, end_time=end_time)
        await lab.store.txn([], [Put(ref.key, ref.codec.encode(ended))])
        assert (await lab.collect()).num_blobs_condemned == condemned


async def test_evaluation_holds_no_data() -> None:
    lab = GarbageLab()
    await lab.policy()
    await publish(lab, "a")
    data = await lab.put("data")
    name = EvaluationName("acme", "tone", "e1")
    wanted = Evaluation(name, f"{POLICY}/revisions/1", scorer="exact_match", data_digest=data.digest, num_examples=1)
    await lab.evaluations.create(wanted, None)
    assert (await lab.collect()).num_blobs_condemned == 1


async def test_unfinished_upload_goes_with_what_was_uploaded() -> None:
    lab = GarbageLab(Grace())
    name = BlobName("acme", digest_of("half"))
    record = await lab.blobs.stage(name, 4)
    await lab.objects.put_bytes(record.object_key, b"half")
    assert (await lab.collect()).num_uploads_deleted == 0
    await lab.age(name, 31 * DAY)
    assert (await lab.collect(dry_run=True)).num_uploads_deleted == 1
    assert (await lab.collect()).num_uploads_deleted == 1
    assert (await lab.records(), await lab.object_keys()) == ({}, set())
    with pytest.raises((Aborted, NotFound)):
        await lab.blobs.verify(name, record.object_key)


async def test_part_uploads_are_aborted() -> None:
    lab = GarbageLab(Grace())
    await lab.put("x")
    key = "tenants/acme/blobs/aa/s1"
    old, young = PartUpload(key, "1", now() - 31 * DAY), PartUpload(key, "2", now() - 29 * DAY)
    foreign = PartUpload("tenants/other/blobs/aa/s1", "3", now() - 31 * DAY)
    lab.objects.part_uploads += [old, young, foreign]
    assert (await lab.collect(dry_run=True)).num_part_uploads_aborted == 1
    assert (await lab.collect()).num_part_uploads_aborted == 1
    assert lab.objects.part_uploads == [young, foreign]  # of tenants that the catalog does not know nothing is touched


async def test_tenants_are_apart_and_chunks_do_not_matter() -> None:
    lab = GarbageLab(chunk=10)
    other = PolicyName("other", "tone")
    await lab.policy()
    await lab.policy(other)
    for number in range(30):
        await publish(lab, f"acme-{number}")
        await lab.put(f"acme-{number}", "other")
        await lab.put(f"unused-{number}")
    await publish(lab, "acme-0", other)
    report = await lab.collect()
    assert (report.num_blobs, report.num_blobs_condemned, report.num_races_lost) == (90, 59, 0)
    assert await lab.check_revisions_have_blobs() == 31
    assert (await lab.collect()).num_blobs_deleted == 59
    assert await lab.check_revisions_have_blobs() == 31


async def test_dry_run_tells_and_does_nothing() -> None:
    lab = GarbageLab()
    await lab.policy()
    await publish(lab, "a")
    await lab.put("b")
    await lab.policies.delete(POLICY)
    await lab.objects.put_bytes(f"tenants/acme/blobs/{'a' * 64}/stage", b"orphan")
    objects = await lab.object_keys()
    whole = (await lab.store.scan(b"/mint/", b"/mint0", limit=1000)).values
    report = await lab.collect(dry_run=True)
    assert (report.num_policies_purged, report.num_blobs_condemned, report.num_objects_deleted) == (1, 1, 1)
    assert (await lab.store.scan(b"/mint/", b"/mint0", limit=1000)).values == whole
    assert await lab.object_keys() == objects


async def test_deleted_policy_keeps_its_blobs_until_it_is_purged() -> None:
    lab = GarbageLab(replace(NO_GRACE, undelete_s=7 * 86_400))
    await lab.policy()
    await publish(lab, "a")
    await lab.policies.delete(POLICY)
    report = await lab.collect()
    assert (report.num_blobs_condemned, report.num_policies_purged) == (0, 0)
    assert await lab.check_revisions_have_blobs() == 1


async def filled(lab: GarbageLab) -> None:
    """A policy with everything that lies below one."""
    await lab.policy()
    fence = await lab.fence()
    for step in (1, 2):
        blob = await lab.put(f"weights-{step}")
        wanted = Revision(
            RevisionName("acme", "tone", 1),
            blob=BlobRef(blob.digest),
            base_digest=BASE_DIGEST,
            lora=LoraConfig(rank=4),
            lineage=Lineage(run="tenants/acme/runs/r1", step=step),
        )
        await lab.revisions.publish(POLICY, wanted, fence)
    await lab.promote(1)
    await lab.evaluations.create(
        Evaluation(EvaluationName("acme", "tone", "e1"), f"{POLICY}/revisions/1", scorer="s", num_examples=1), None
    )
    batch = rollout(expire_time=now() + DAY)
    await lab.objects.put_bytes(batch.object_key, b"batch")
    await lab.rollouts.create(batch, fence)


async def below(lab: Lab, *families: str) -> list[bytes]:
    found: list[bytes] = []
    for family in families:
        prefix = lab.keys.family(family)
        found += [kv.key for kv in (await lab.store.scan(prefix, prefix_end(prefix), limit=1000)).values]
    return found


async def test_policy_past_its_grace_is_purged_and_its_numbers_are_not_given_again() -> None:
    lab = GarbageLab()
    await filled(lab)
    await lab.policies.delete(POLICY)
    report = await lab.collect()
    assert (report.num_policies_purged, report.num_rollouts_deleted) == (1, 1)
    families = ("revisions", "published", "evaluations", "graves", "rollouts", "purges", "aliases")
    assert await below(lab, *families) == []
    tombstone = lab.codecs.policy.decode((await lab.store.get([lab.keys.policy(POLICY)])).values[0])
    assert (tombstone.uid, tombstone.state, tombstone.next_revision_number) == ("", PolicyState.DELETED, 3)
    # The blobs' own time began when the policy was removed.
    assert report.num_blobs_condemned == 0
    assert (await lab.collect()).num_blobs_condemned == 2
    assert (await lab.collect()).num_blobs_deleted == 2
    assert await lab.object_keys() == set()
    assert (await lab.collect()).num_policies_purged == 0

    await lab.policy()
    assert (await publish(lab, "new")).number == 3


async def test_policy_that_never_had_a_revision_leaves_nothing() -> None:
    lab = GarbageLab()
    await lab.policy()
    await lab.policies.delete(POLICY)
    assert (await lab.collect()).num_policies_purged == 1
    assert await below(lab, "policies", "purges") == []


async def test_predecessor_of_a_policy_made_again_is_removed() -> None:
    lab = GarbageLab()
    await filled(lab)
    await lab.policies.delete(POLICY)
    await lab.policy()
    new = await publish(lab, "new", run="tenants/acme/runs/r2", step=1)
    await lab.collect()
    assert await below(lab, "purges", "graves", "evaluations", "rollouts") == []
    assert [each.number for each in (await lab.revisions.list(POLICY, page_size=9, page_token="")).records] == [3]
    assert len(await below(lab, "revisions")) == len(await below(lab, "published")) == 1
    await lab.collect()
    await lab.collect()
    assert await lab.object_keys() == {new.object_key}


async def test_rollouts_past_their_expiry_go_object_first() -> None:
    lab = GarbageLab(Grace())
    await lab.policy()
    await publish(lab, "a")
    fence = await lab.fence()
    for rollout_id, days in (("old", -1), ("young", 1)):
        batch = rollout(rollout_id, expire_time=now() + days * DAY)
        await lab.objects.put_bytes(batch.object_key, rollout_id.encode())
        await lab.rollouts.create(batch, fence)
    assert (await lab.collect()).num_rollouts_deleted == 1
    assert [each.name.rollout for each in (await lab.rollouts.list(POLICY, page_size=9, page_token="")).records] == [
        "young"
    ]
    assert {key for key in await lab.object_keys() if "rollouts" in key} == {rollout("young").object_key}


async def test_objects_that_no_record_names() -> None:
    lab = GarbageLab()
    await lab.policy()
    await publish(lab, "a")
    fence = await lab.fence()
    kept = rollout("kept", expire_time=now() + DAY)
    await lab.rollouts.create(kept, fence)
    folder = "tenants/acme/states/tone"
    for key in (
        kept.object_key,
        "tenants/acme/rollouts/tone/r1/00000001-7",
        *(
            f"{folder}/{run}/{step:08d}-5/weights.safetensors"
            for run in ("r1", "r2", "session-1")
            for step in (1, 2, 3)
        ),
    ):
        await lab.objects.put_bytes(key, b"x")

    def state(run: str, step: int) -> TrainingState:
        key = f"{folder}/{run}/{step:08d}-5/weights.safetensors"
        return TrainingState(f"tenants/acme/runs/{run}", step, 5, weights_key=key)

    head_ref = lab.tables.policy(POLICY)
    head = await lab.policies.get(POLICY)
    await lab.store.txn(
        [], [Put(head_ref.key, head_ref.codec.encode(replace(head, latest_training_state=state("r1", 3))))]
    )
    for run, run_state in (("r1", RunState.SUCCEEDED), ("r2", RunState.RUNNING)):
        record = Run(
            RunName("acme", run),
            str(POLICY),
            state=run_state,
            policy_uid=head.uid,
            initial_training_state=state("r1", 1) if run == "r2" else None,
            end_time=now(),
        )
        ref = lab.tables.run(record.name)
        await lab.store.txn([], [Put(ref.key, ref.codec.encode(record))])
    report = await lab.collect()
    assert report.num_objects_deleted == 2
    assert set(report.examples) == {
        "tenants/acme/rollouts/tone/r1/00000001-7",  # no pointer
        f"{folder}/r1/00000002-5/weights.safetensors",  # 1 began r2, 3 is the policy's, r2 is under way, no run is
    }
    assert (await lab.collect()).num_objects_deleted == 0


async def test_one_at_a_time_and_not_without_a_store() -> None:
    lab = GarbageLab()
    async with Duties(lab.store, lab.keys).hold("gc"):
        with pytest.raises(LeaseHeld):
            await lab.collect()
    without = GarbageCollector(lab.store, lab.tables, None, lab.duties, Grace())
    with pytest.raises(FailedPrecondition, match=r"catalog\.object_store"):
        async for _ in without.collect(dry_run=False):
            pass
    async with lab.duties.hold("gc") as duty:
        await without.run(duty)


async def test_not_while_a_backup_is_restored() -> None:
    lab = GarbageLab()
    await lab.store.txn([], [Put(lab.keys.restoring, b"")])
    with pytest.raises(WrongState, match="being restored"):
        await lab.collect()


async def test_tenant_that_is_being_erased_is_left_to_its_erasure() -> None:
    lab = GarbageLab()
    await filled(lab)
    await lab.policies.delete(POLICY)
    other = PolicyName("other", "tone")
    await lab.policy(other)
    await lab.policies.delete(other)
    await lab.store.txn([], [Put(lab.keys.erasing("acme"), b"")])
    assert (await lab.collect()).num_policies_purged == 1
    assert len(await below(lab, "revisions")) == 2
    await lab.store.txn([], [Delete(lab.keys.erasing("acme"))])
    assert (await lab.collect()).num_policies_purged == 1
    assert await below(lab, "revisions", "purges") == []


async def test_progress_names_each_step() -> None:
    lab = GarbageLab()
    steps = [progress.step async for progress in lab.garbage.collect(dry_run=True)]
    assert len(steps) == 6
    assert steps[-1] == "done"
