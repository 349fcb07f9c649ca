"""Undelete, pause and quotas of policies."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from unit.catalog.catalog_lab import BASE, POLICY, Lab

from mint_catalog.model.records import Policy, PolicyQuota, PolicyState
from mint_catalog.policies import heads as policies_module
from mint_catalog.policies.heads import Policies
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Put
from mint_core.errors import InvalidArgument, MintError, NotFound, ResourceExhausted, WrongState
from mint_core.names import AliasName, RevisionName

WANTED = Policy(POLICY, base_model=str(BASE))


def _request(payload: bytes = b"") -> Request | None:
    return Request.of(
        tenant="acme", principal="ada", method="m", request_id="6f1c1e4e-2a39-4c0e-9a77-0a8f3a1d9b10", payload=payload
    )


@pytest.mark.parametrize("state", [PolicyState.ACTIVE, PolicyState.PAUSED])
async def test_an_undelete_brings_everything_back(state: PolicyState) -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    for number in range(49):
        await lab.promote(1, alias=f"a{number:02d}")
    await lab.publish("two")
    await lab.promote(2)
    await lab.promote(1)
    head = (await lab.policies.update(POLICY, replace(WANTED, state=state), {"state"})).record
    aliases = (await lab.aliases.list(POLICY))[0]
    await lab.policies.delete(POLICY)
    with pytest.raises(NotFound):
        await lab.policies.get(POLICY)
    written = await lab.policies.undelete(POLICY, _request())
    assert replace(written.record, update_time=head.update_time, mod_revision=head.mod_revision) == head
    assert await lab.policies.get(POLICY) == written.record
    back = (await lab.aliases.list(POLICY))[0]
    assert [replace(alias, mod_revision=0) for alias in back] == [replace(alias, mod_revision=0) for alias in aliases]
    assert (await lab.revisions.get(RevisionName("acme", "tone", 2))).number == 2
    graves = lab.keys.family("graves")
    assert await lab.store.count(graves, graves[:-1] + b"0") == 0
    # It goes on as if nothing had been, and the request id answers again.
    assert (await lab.aliases.rollback(lab.move(0))).record.active is not None
    assert (await lab.policies.undelete(POLICY, _request())).record == written.record


async def test_only_what_is_deleted_can_be_undeleted() -> None:
    lab = Lab()
    with pytest.raises(NotFound):
        await lab.policies.undelete(POLICY)
    await lab.policy()
    with pytest.raises(WrongState, match="is ACTIVE"):
        await lab.policies.undelete(POLICY)
    await lab.policies.delete(POLICY)
    await lab.policy()
    with pytest.raises(WrongState, match="is ACTIVE"):
        await lab.policies.undelete(POLICY)


async def test_after_the_grace_period_nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    await lab.policy()
    await lab.policies.delete(POLICY)
    policies = Policies(lab.store, lab.tables, undelete_grace_s=3600)
    monkeypatch.setattr(policies_module, "now", lambda: datetime.now(UTC) + timedelta(minutes=61))
    with pytest.raises(NotFound, match="more than 1:00:00 ago"):
        await policies.undelete(POLICY)
    monkeypatch.setattr(policies_module, "now", lambda: datetime.now(UTC) + timedelta(minutes=59))
    assert (await policies.undelete(POLICY)).record.state is PolicyState.ACTIVE


async def test_a_purged_policy_does_not_come_back() -> None:
    lab = Lab()
    await lab.policy()
    await lab.policies.delete(POLICY)
    ref = lab.tables.policy(POLICY)
    kv = (await lab.store.get([ref.key])).values[0]
    purged = replace(ref.codec.decode(kv), uid="")
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(purged))])
    with pytest.raises(NotFound):
        await lab.policies.undelete(POLICY)


async def test_one_of_an_undelete_and_a_new_policy_wins() -> None:
    lab = Lab()
    uid = (await lab.policy()).record.uid
    await lab.policies.delete(POLICY)
    results = await asyncio.gather(
        lab.policies.undelete(POLICY), lab.policies.create(POLICY, WANTED), return_exceptions=True
    )
    assert sum(isinstance(result, MintError) for result in results) == 1
    assert ((await lab.policies.get(POLICY)).uid == uid) == isinstance(results[1], MintError)


async def test_a_paused_policy_takes_no_promotions_until_it_is_resumed() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    paused = await lab.policies.update(POLICY, replace(WANTED, state=PolicyState.PAUSED), {"state"})
    assert paused.record.state is PolicyState.PAUSED
    with pytest.raises(WrongState, match="PAUSED"):
        await lab.promote(1)
    await lab.policies.update(POLICY, replace(WANTED, state=PolicyState.ACTIVE), {"state"})
    await lab.promote(1)


@pytest.mark.parametrize("state", [PolicyState.UNSPECIFIED, PolicyState.DELETED])
async def test_other_states_are_not_set(state: PolicyState) -> None:
    lab = Lab()
    await lab.policy()
    with pytest.raises(InvalidArgument) as caught:
        await lab.policies.update(POLICY, replace(WANTED, state=state), {"state"})
    assert caught.value.field == "policy.state"


@pytest.mark.parametrize("field", ["max_revisions", "max_open_runs"])
async def test_a_bad_quota_is_named(field: str) -> None:
    lab = Lab()
    await lab.policy()
    wanted: Any = replace(WANTED, quota=replace(PolicyQuota(), **{field: -1}))
    with pytest.raises(InvalidArgument) as caught:
        await lab.policies.update(POLICY, wanted, {"quota"})
    assert caught.value.field == f"policy.quota.{field}"


async def _quota(lab: Lab, quota: PolicyQuota | None) -> None:
    await lab.policies.update(POLICY, replace(WANTED, quota=quota), {"quota"})


async def test_revisions_are_bounded_by_the_quota() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("old")
    await lab.policies.delete(POLICY)
    await lab.policy()  # the former policy's revisions do not count
    await _quota(lab, PolicyQuota(max_revisions=2))
    await lab.publish("one")
    await lab.publish("two")
    with pytest.raises(ResourceExhausted, match="has 2 revisions"):
        await lab.publish("three")
    await lab.revisions.retire(RevisionName("acme", "tone", 2))
    with pytest.raises(ResourceExhausted):
        await lab.publish("three")
    await lab.revisions.delete(RevisionName("acme", "tone", 2))
    await lab.publish("three")
    await _quota(lab, None)
    await lab.publish("four")


async def test_publications_at_once_do_not_go_over_the_quota() -> None:
    lab = Lab()
    await lab.policy()
    await _quota(lab, PolicyQuota(max_revisions=3))
    results = await asyncio.gather(*(lab.publish(f"w{n}") for n in range(8)), return_exceptions=True)
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 5


async def test_open_runs_are_bounded_by_the_quota() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    other = replace(POLICY, policy="other")
    await lab.policy(other)
    await lab.run("other-1", policy=other)
    await _quota(lab, PolicyQuota(max_open_runs=2))
    await lab.run("r1")
    await lab.claimed()  # the other policy's, which came first
    claim, fence = await lab.claimed("worker-2")
    assert claim.run.name.run == "r1", "a claimed run is open"
    await lab.evaluation("e1")
    with pytest.raises(ResourceExhausted, match="has 2 open runs"):
        await lab.run("r2")
    await lab.runs.cancel(replace(claim.run.name, run="e1"), "enough")
    await lab.run("r2")
    with pytest.raises(ResourceExhausted):
        await lab.run("r3")
    await _quota(lab, PolicyQuota(max_open_runs=3))
    results = await asyncio.gather(*(lab.run(f"x{n}") for n in range(4)), return_exceptions=True)
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 3
    assert fence.token


async def test_an_alias_of_a_deleted_policy_is_not_found_until_it_is_back() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.promote(1)
    await lab.policies.delete(POLICY)
    name = AliasName("acme", "tone", "live")
    with pytest.raises(NotFound):
        await lab.aliases.get(name)
    await lab.policies.undelete(POLICY)
    assert (await lab.aliases.get(name)).resolution is not None
    assert uuid.UUID((await lab.policies.get(POLICY)).uid)
