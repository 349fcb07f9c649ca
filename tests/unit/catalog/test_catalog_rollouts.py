from __future__ import annotations

from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import POLICY, Lab, digest_of, rollout

from mint_catalog.model.records import BlobRef, Fence, Numerics
from mint_core.errors import AlreadyExists, InvalidArgument, LeaseLost, NotFound
from mint_core.names import RolloutName

OTHER = "tenants/acme/policies/other"


async def _lab() -> tuple[Lab, Fence]:
    """A policy with one revision, leased."""
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    return lab, await lab.fence()


async def _ids(lab: Lab, run: str = "", page_size: int = 0) -> list[str]:
    ids, token = [], ""
    while True:
        page = await lab.rollouts.list(POLICY, page_size=page_size, page_token=token, run=run)
        ids += [each.name.rollout for each in page.records]
        token = page.next_page_token
        if not token:
            return ids


async def test_a_rollout_takes_its_revisions_digest_and_leaves_the_head_alone() -> None:
    lab, fence = await _lab()
    head = await lab.policies.get(POLICY)
    numerics = Numerics("sha256:" + "b" * 64, "float32", "", "sglang 0.5.23")
    written = await lab.rollouts.create(rollout(numerics=numerics), fence)
    assert written.record.revision_digest == digest_of("one")
    assert written.record.create_time is not None
    assert written.record.numerics == numerics
    assert await lab.rollouts.get(written.record.name) == written.record
    assert written.catalog_revision == written.record.mod_revision
    assert await lab.policies.get(POLICY) == head


async def test_the_same_batch_again_is_answered_and_another_one_is_refused() -> None:
    lab, fence = await _lab()
    first = await lab.rollouts.create(rollout(), fence)
    before = lab.store.revision
    again = await lab.rollouts.create(rollout(), fence)
    said = await lab.rollouts.create(rollout(revision_digest=digest_of("one")), fence)
    assert again.record == said.record == first.record
    for change in ({"step": 2}, {"blob": BlobRef(digest_of("other"), 1000)}, {"reward_mean": 0.25}):
        with pytest.raises(AlreadyExists, match=next(iter(change))) as caught:
            await lab.rollouts.create(rollout(**change), fence)
        assert caught.value.metadata["digest"] == digest_of("r1-1")
    assert lab.store.revision == before


async def test_a_lost_answer_is_repeated_also_when_the_lease_was_given_back() -> None:
    lab, fence = await _lab()
    first = await lab.rollouts.create(rollout(), fence)
    await lab.leases.release(POLICY, fence.token)
    assert (await lab.rollouts.create(rollout(), fence)).record == first.record
    with pytest.raises(LeaseLost):
        await lab.rollouts.create(rollout(reward_mean=0.25), fence)


async def test_a_superseded_fence_writes_no_rollout_and_deletes_none() -> None:
    lab, stale = await _lab()
    await lab.rollouts.create(rollout("r1-1"), stale)
    await lab.store.pass_time(31)
    fence = await lab.fence("worker-2")
    before = lab.store.revision
    for write in (
        lab.rollouts.create(rollout("r1-2"), stale),
        lab.rollouts.create(rollout("r1-2"), Fence(str(POLICY), fence.token + 1)),
        lab.rollouts.create(rollout("r1-2"), Fence(str(POLICY))),
        lab.rollouts.delete(RolloutName("acme", "tone", "r1-1"), stale),
        lab.rollouts.delete(RolloutName("acme", "tone", "none"), stale),
    ):
        with pytest.raises(LeaseLost):
            await write
    for foreign in (Fence(OTHER, fence.token), Fence("tenants/acme/runs/r1", fence.token), Fence()):
        with pytest.raises(InvalidArgument, match=r"fence\.resource"):
            await lab.rollouts.create(rollout("r1-2"), foreign)
    assert lab.store.revision == before
    await lab.rollouts.create(rollout("r1-2"), fence)
    assert await _ids(lab) == ["r1-1", "r1-2"]


async def test_a_batch_whose_run_was_taken_over_is_gone_on_from() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.run("r1")
    _, first = await lab.claimed("worker-1")
    written = await lab.rollouts.create(rollout(), first)
    await lab.store.pass_time(31)
    await lab.queue.reap()
    _, second = await lab.claimed("worker-2")
    assert await lab.rollouts.get(written.record.name) == written.record
    with pytest.raises(AlreadyExists):
        await lab.rollouts.create(rollout(object_key="tenants/acme/rollouts/second"), second)


async def test_deleting() -> None:
    lab, fence = await _lab()
    name = (await lab.rollouts.create(rollout(), fence)).record.name
    await lab.rollouts.delete(name, fence)
    await lab.rollouts.delete(name, fence)
    with pytest.raises(NotFound):
        await lab.rollouts.get(name)
    again = await lab.rollouts.create(rollout(reward_mean=0.25), fence)
    assert again.record.reward_mean == 0.25


async def test_an_expired_rollout_is_listed_until_it_is_deleted() -> None:
    lab, fence = await _lab()
    name = (await lab.rollouts.create(rollout(), fence)).record.name
    assert (await lab.rollouts.get(name)).expire_time is not None
    assert await _ids(lab) == ["r1-1"]


async def test_pages_of_a_policy_and_of_one_run() -> None:
    lab, fence = await _lab()
    for step in range(1, 13):
        run = f"tenants/acme/runs/{'odd' if step % 2 else 'even'}"
        await lab.rollouts.create(rollout(f"s{step:02d}", run=run, step=step), fence)
    everything = [f"s{step:02d}" for step in range(1, 13)]
    assert await _ids(lab) == await _ids(lab, page_size=5) == everything
    assert await _ids(lab, "tenants/acme/runs/odd", page_size=4) == everything[::2]
    page = await lab.rollouts.list(POLICY, page_size=2, page_token="")
    with pytest.raises(InvalidArgument) as caught:
        await lab.rollouts.list(POLICY, page_size=2, page_token=page.next_page_token, run="tenants/acme/runs/odd")
    assert caught.value.field == "page_token"
    with pytest.raises(InvalidArgument) as caught:
        await lab.rollouts.list(POLICY, page_size=2, page_token="", run="odd")
    assert caught.value.field == "run"


async def test_rollouts_do_not_outlive_their_policy() -> None:
    lab, fence = await _lab()
    name = (await lab.rollouts.create(rollout(), fence)).record.name
    await lab.policies.delete(POLICY)
    for gone in (
        lab.rollouts.get(name),
        lab.rollouts.create(rollout("r1-2"), fence),
        lab.rollouts.delete(name, fence),
        lab.rollouts.list(POLICY, page_size=0, page_token=""),
    ):
        with pytest.raises(NotFound):
            await gone
    await lab.policy()
    with pytest.raises(NotFound):
        await lab.rollouts.get(name)
    assert await _ids(lab) == []
    with pytest.raises(NotFound, match="revisions/1"):
        await lab.rollouts.create(rollout(), await lab.fence())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"revision": ""}, "rollout.revision"),
        ({"revision": f"{OTHER}/revisions/1"}, "rollout.revision"),
        ({"revision_digest": digest_of("two")}, "rollout.revision_digest"),
        ({"run": ""}, "rollout.run"),
        ({"run": "tenants/other/runs/r1"}, "rollout.run"),
        ({"step": 0}, "rollout.step"),
        ({"object_key": ""}, "rollout.object_key"),
        ({"object_key": "tenants/other/rollouts/x"}, "rollout.object_key"),
        ({"object_key": "tenants/acme/../other/x"}, "rollout.object_key"),
        ({"object_key": "tenants/acme/rollouts//x"}, "rollout.object_key"),
        ({"blob": None}, "rollout.blob"),
        ({"blob": BlobRef("md5:1", 5)}, "rollout.blob.digest"),
        ({"blob": BlobRef(digest_of("x"))}, "rollout.blob.size_bytes"),
        ({"numerics": Numerics(engine_version="a\nb")}, "rollout.numerics.engine_version"),
        ({"num_samples": -1}, "rollout.num_samples"),
        ({"num_unscored": 9}, "rollout.num_unscored"),
        ({"num_tokens": -1}, "rollout.num_tokens"),
        ({"reward_mean": float("nan")}, "rollout.reward_mean"),
        ({"expire_time": None}, "rollout.expire_time"),
    ],
)
async def test_a_bad_rollout_is_refused(changes: dict[str, object], field: str) -> None:
    lab, fence = await _lab()
    with pytest.raises(InvalidArgument) as caught:
        await lab.rollouts.create(replace(rollout(), **changes), fence)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert await _ids(lab) == []


async def test_a_rollout_needs_its_revision() -> None:
    lab, fence = await _lab()
    with pytest.raises(NotFound, match="revisions/2"):
        await lab.rollouts.create(rollout(revision=f"{POLICY}/revisions/2"), fence)
