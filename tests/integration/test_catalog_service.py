"""The catalog as its callers see it: every service over gRPC, over a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mint_api.runtime.v1 import publish_service_pb2, registry_service_pb2, work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    base_model_service_pb2,
    common_pb2,
    engine_replica_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    rollout_service_pb2,
    run_service_pb2,
)
from mint_core import errors
from support.catalog_rig import BASE, BASE_DIGEST, Rig, digest_of, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture
async def rig(etcd: EtcdServer) -> AsyncIterator[Rig]:
    async with running_catalog(etcd) as running:
        yield running


async def _take(responses: Any, count: int) -> list[Any]:
    taken = []
    async with asyncio.timeout(20), contextlib.aclosing(responses):
        async for response in responses:
            taken.append(response)
            if len(taken) == count:
                break
    return taken


async def test_a_policys_whole_life(rig: Rig) -> None:
    policy = await rig.policy()
    got = (await rig.call(rig.policies.GetPolicy, policy_service_pb2.GetPolicyRequest(name=policy))).policy
    assert (got.base_digest, got.state, got.next_revision_number) == (
        BASE_DIGEST,
        policy_service_pb2.POLICY_STATE_ACTIVE,
        1,
    )
    assert got.lora.rank == 16
    update = policy_service_pb2.UpdatePolicyRequest(policy=got)
    update.policy.owner = "ada"
    update.policy.labels["team"] = "search"
    update.update_mask.paths.extend(["owner", "labels"])
    updated = await rig.call(rig.policies.UpdatePolicy, update)
    assert updated.policy.owner == "ada"
    with pytest.raises(errors.EtagMismatch):
        await rig.call(rig.policies.UpdatePolicy, update)
    first = await rig.revision(policy, "one")
    second = await rig.revision(policy, "two")
    assert [each.revision.number for each in (first, second)] == [1, 2]
    await rig.promote(policy, 1)
    promoted = await rig.promote(policy, 2)
    resolution = await rig.resolve(policy)
    assert (resolution.revision, resolution.blob.digest) == (f"{policy}/revisions/2", digest_of("two"))
    assert resolution.object_key == second.revision.object_key
    rollback = alias_service_pb2.RollbackAliasRequest(
        name=promoted.alias.name, etag=promoted.alias.etag, reason="worse"
    )
    back = await rig.call(rig.aliases.RollbackAlias, rollback)
    assert back.alias.active.revision_number == 1
    assert [entry.target.revision_number for entry in back.alias.history] == [1, 2, 1]
    assert back.alias.history[0].attribution.reason == "worse"
    assert (await rig.resolve(policy)).blob.digest == digest_of("one")
    retire = revision_service_pb2.RetireRevisionRequest(name=f"{policy}/revisions/2")
    retired = await rig.call(rig.revisions.RetireRevision, retire)
    assert retired.revision.state == revision_service_pb2.REVISION_STATE_RETIRED
    with pytest.raises(errors.WrongState):
        await rig.promote(policy, 2)
    await rig.call(rig.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=policy))
    with pytest.raises(errors.NotFound):
        await rig.resolve(policy)


async def test_consistency_and_batches(rig: Rig) -> None:
    policy = await rig.policy()
    await rig.revision(policy, "one")
    written = await rig.promote(policy, 1)
    request = alias_service_pb2.ResolveRequest(name=f"{policy}/aliases/live")
    request.consistency.min_catalog_revision = written.catalog_revision
    assert (await rig.call(rig.aliases.Resolve, request)).resolution.catalog_revision >= written.catalog_revision
    request.consistency.strong = True
    await rig.call(rig.aliases.Resolve, request)
    request.consistency.min_catalog_revision = 10**12
    with pytest.raises(errors.Unavailable):
        await rig.call(rig.aliases.Resolve, request)
    names = [f"{policy}/aliases/live", f"{policy}/revisions/1", f"{policy}/aliases/none", "nonsense"]
    batch = await rig.call(rig.aliases.BatchResolve, alias_service_pb2.BatchResolveRequest(names=names))
    assert [result.status.code for result in batch.results] == [0, 0, 5, 3]
    assert batch.results[0].resolution.revision == batch.results[1].resolution.revision


async def test_a_run_through_the_queue(rig: Rig) -> None:
    policy = await rig.policy()
    run = await rig.run(policy, "r1")
    watch = rig.stream(rig.runs.WatchRun, run_service_pb2.WatchRunRequest(name=run.name))
    assert (await anext(watch)).run == run
    watching = asyncio.create_task(_rest_of_run(watch))
    claim = await rig.claim("worker-0001")
    assert claim.run.name == run.name
    fence = claim.lease.fence
    report = work_service_pb2.ReportRunRequest(name=run.name, fence=fence)
    report.progress.step, report.progress.loss = 3, 0.5
    assert not (await rig.call(rig.work.ReportRun, report)).cancel_requested
    commit = work_service_pb2.CommitTrainingStateRequest(name=run.name, fence=fence)
    commit.state.step = 3
    commit.state.weights_key = commit.state.optimizer_key = f"tenants/{policy.split('/')[1]}/states/x"
    commit.state.weights.digest = commit.state.optimizer.digest = digest_of("state")
    await rig.call(rig.work.CommitTrainingState, commit)
    head = (await rig.call(rig.policies.GetPolicy, policy_service_pb2.GetPolicyRequest(name=policy))).policy
    assert (head.latest_training_state.step, head.latest_training_state.run) == (3, run.name)
    await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=fence))
    revision = await rig.revision(policy, "one", fence, run=run.name, step=3)
    finish = work_service_pb2.FinishRunRequest(
        name=run.name,
        fence=fence,
        state=run_service_pb2.RUN_STATE_SUCCEEDED,
        published_revision=revision.revision.name,
    )
    finished = await rig.call(rig.work.FinishRun, finish)
    assert finished.run.published_revision == revision.revision.name
    states = await asyncio.wait_for(watching, 20)
    assert set(states) == {"RUN_STATE_RUNNING", "RUN_STATE_SUCCEEDED"}
    assert states[-1] == "RUN_STATE_SUCCEEDED"
    parent = "/".join(policy.split("/")[:2])
    leases = await rig.call(rig.work.ListLeases, work_service_pb2.ListLeasesRequest(parent=parent))
    assert not leases.leases
    listed = await rig.call(rig.runs.ListRuns, run_service_pb2.ListRunsRequest(parent=parent, policy=policy))
    assert [each.name for each in listed.runs] == [run.name]


async def _rest_of_run(watch: Any) -> list[str]:
    return [run_service_pb2.RunState.Name(response.run.state) async for response in watch]


async def test_a_claim_waits_and_wakes(rig: Rig) -> None:
    policy = await rig.policy()
    nothing = await rig.claim("worker-0001", wait_s=0.3)
    assert not nothing.HasField("run")
    waiting = asyncio.create_task(rig.claim("worker-0001", wait_s=10))
    await asyncio.sleep(0.3)
    run = await rig.run(policy)
    claim = await asyncio.wait_for(waiting, 5)
    assert claim.run.name == run.name


async def test_an_expired_worker_is_refused_and_changes_nothing(rig: Rig) -> None:
    policy = await rig.policy()
    run = await rig.run(policy)
    first = await rig.claim("worker-0001", ttl_s=2)
    assert first.run.name == run.name
    second = await rig.claim("worker-0002", wait_s=15)
    assert second.run.name == run.name
    assert second.run.num_attempts == 2
    assert second.lease.fence.token > first.lease.fence.token
    await rig.blob(policy, "stale bytes")
    get = policy_service_pb2.GetPolicyRequest(name=policy)
    before = (await rig.call(rig.policies.GetPolicy, get)).policy
    with pytest.raises(errors.LeaseLost):
        await rig.revision(policy, "stale bytes", first.lease.fence, run=run.name, step=5)
    report = work_service_pb2.ReportRunRequest(name=run.name, fence=first.lease.fence)
    with pytest.raises(errors.LeaseLost):
        await rig.call(rig.work.ReportRun, report)
    with pytest.raises(errors.LeaseLost):
        await rig.call(rig.work.RenewLease, work_service_pb2.RenewLeaseRequest(fence=first.lease.fence))
    assert (await rig.call(rig.policies.GetPolicy, get)).policy == before
    revisions = revision_service_pb2.ListRevisionsRequest(parent=policy)
    assert not (await rig.call(rig.revisions.ListRevisions, revisions)).revisions
    published = await rig.revision(policy, "good bytes", second.lease.fence, run=run.name, step=5)
    assert published.revision.number == 1


async def test_workers_race_to_publish_one_step(rig: Rig) -> None:
    policy = await rig.policy()
    fence = await rig.acquire(policy, "worker-0001")
    run = f"{policy.split('/policies/', maxsplit=1)[0]}/runs/r"
    results = await asyncio.gather(
        *(rig.revision(policy, f"bytes {number % 2}", fence, run=run, step=7) for number in range(10)),
        return_exceptions=True,
    )
    won = [result for result in results if not isinstance(result, BaseException)]
    assert {result.revision.number for result in won} == {1}
    assert len({result.revision.blob.digest for result in won}) == 1
    assert all(isinstance(result, errors.AlreadyExists) for result in results if isinstance(result, BaseException))
    assert len(won) == 5


async def test_one_request_id_fifty_times(rig: Rig) -> None:
    policy = await rig.policy()
    await rig.revision(policy, "one")
    request_id = str(uuid.uuid4())
    promoted = await asyncio.gather(*(rig.promote(policy, 1, request_id=request_id) for _ in range(50)))
    assert len({(each.catalog_revision, each.alias.etag) for each in promoted}) == 1
    assert len(promoted[0].alias.history) == 1
    with pytest.raises(errors.RequestIdReused):
        await rig.promote(policy, 2, request_id=request_id)
    tenant, request_id = "t" + uuid.uuid4().hex[:8], str(uuid.uuid4())
    names = await asyncio.gather(*(rig.policy(tenant, request_id=request_id) for _ in range(20)))
    assert len(set(names)) == 1
    with pytest.raises(errors.AlreadyExists):
        await rig.policy(tenant, request_id=str(uuid.uuid4()))


async def test_rivals_move_an_alias_by_compare_and_set(rig: Rig) -> None:
    policy = await rig.policy()
    for number in range(4):
        await rig.revision(policy, f"bytes {number}")
    etag = (await rig.promote(policy, 1)).alias.etag
    results = await asyncio.gather(
        *(rig.promote(policy, 2 + number % 3, etag=etag) for number in range(12)), return_exceptions=True
    )
    won = [result for result in results if not isinstance(result, BaseException)]
    assert len(won) == 1
    assert all(isinstance(result, errors.EtagMismatch) for result in results if isinstance(result, BaseException))
    resolved = await rig.resolve(policy)
    assert resolved.revision.endswith(f"/{won[0].alias.active.revision_number}")


async def test_pages_hold_still_under_writes(rig: Rig) -> None:
    tenant = "t" + uuid.uuid4().hex[:8]
    for number in range(60):
        await rig.policy(tenant, f"p{number:02d}")
    stop = asyncio.Event()

    async def writing() -> None:
        number = 0
        while not stop.is_set():
            name = f"tenants/{tenant}/policies/p{number % 60:02d}"
            with contextlib.suppress(errors.NotFound):
                await rig.call(rig.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=name))
            await rig.policy(tenant, f"new{number}")
            number += 1

    writer = asyncio.create_task(writing())
    names, token, revisions = [], "", set()
    while True:
        request = policy_service_pb2.ListPoliciesRequest(parent=f"tenants/{tenant}", page_size=7, page_token=token)
        page = await rig.call(rig.policies.ListPolicies, request)
        names += [policy.name.rsplit("/", 1)[-1] for policy in page.policies]
        revisions.add(page.catalog_revision)
        token = page.next_page_token
        await asyncio.sleep(0.01)
        if not token:
            break
    stop.set()
    await writer
    assert len(revisions) == 1
    at_start = {f"p{number:02d}" for number in range(60)}
    assert len(names) == len(set(names))
    assert len(at_start & set(names)) >= 58, "at most what was deleted before the first page is missing"


async def test_watches_list_then_follow(rig: Rig) -> None:
    policy = await rig.policy()
    tenant = "/".join(policy.split("/")[:2])
    listed = await rig.call(rig.policies.ListPolicies, policy_service_pb2.ListPoliciesRequest(parent=tenant))
    start = listed.catalog_revision
    follow = rig.stream(
        rig.aliases.WatchAliases,
        alias_service_pb2.WatchAliasesRequest(parent="tenants/-", start_after_catalog_revision=start),
    )
    taking = asyncio.create_task(_take_alias_events(follow, policy, 3))
    await rig.revision(policy, "one")
    await rig.revision(policy, "two")
    one, two = await rig.promote(policy, 1), await rig.promote(policy, 2)
    delete = alias_service_pb2.DeleteAliasRequest(name=f"{policy}/aliases/live")
    deleted = await rig.call(rig.aliases.DeleteAlias, delete)
    events = await taking
    assert [event.catalog_revision for event in events] == [each.catalog_revision for each in (one, two, deleted)]
    assert [event.alias.resolution.revision[-1:] for event in events] == ["1", "2", ""]
    assert events[0].alias == one.alias
    watch = revision_service_pb2.WatchRevisionsRequest(parent=policy, start_after_catalog_revision=start)
    revisions = await _take(rig.stream(rig.revisions.WatchRevisions, watch), 3)
    assert [event.revision.number for event in revisions[:2]] == [1, 2]
    assert revisions[2].type == common_pb2.WATCH_EVENT_TYPE_BOOKMARK
    heads = policy_service_pb2.WatchPoliciesRequest(parent=tenant, start_after_catalog_revision=start)
    policies = await _take(rig.stream(rig.policies.WatchPolicies, heads), 5)
    assert [event.policy.next_revision_number for event in policies] == [2, 3, 3, 3, 3]


async def _take_alias_events(responses: Any, policy: str, count: int) -> list[Any]:
    events = []
    async with asyncio.timeout(20), contextlib.aclosing(responses):
        async for response in responses:
            if response.alias.name.startswith(policy):
                events.append(response)
            if len(events) == count:
                break
    return events


async def test_engines_register_renew_and_vanish(rig: Rig) -> None:
    await rig.base_model()
    name = f"engineReplicas/e{uuid.uuid4().hex[:8]}"
    replica = engine_replica_service_pb2.EngineReplica(
        name=name, address="127.0.0.1:1", base_model=BASE, state=engine_replica_service_pb2.ENGINE_REPLICA_STATE_READY
    )
    replica.numerics.base_digest = BASE_DIGEST
    register = registry_service_pb2.RegisterEngineReplicaRequest(engine_replica=replica, holder="process-1")
    register.ttl.FromSeconds(2)
    token = (await rig.call(rig.registry.RegisterEngineReplica, register)).registration_token
    for _ in range(4):
        await asyncio.sleep(1)
        renew = registry_service_pb2.RenewEngineReplicaRequest(name=name, registration_token=token)
        await rig.call(rig.registry.RenewEngineReplica, renew)
    request = engine_replica_service_pb2.ListEngineReplicasRequest(base_model=BASE)
    listed = await rig.call(rig.replicas.ListEngineReplicas, request)
    assert name in [each.name for each in listed.engine_replicas]
    rival = registry_service_pb2.RegisterEngineReplicaRequest(engine_replica=replica, holder="process-2")
    with pytest.raises(errors.LeaseHeld):
        await rig.call(rig.registry.RegisterEngineReplica, rival)
    with pytest.raises(errors.NotFound):
        await asyncio.wait_for(_until_gone(rig, name), 15)
    with pytest.raises(errors.LeaseLost):
        await rig.call(rig.registry.RenewEngineReplica, renew)
    foreign = registry_service_pb2.RegisterEngineReplicaRequest(engine_replica=replica, holder="process-3")
    foreign.engine_replica.numerics.base_digest = digest_of("another base")
    with pytest.raises(errors.BaseModelMismatch):
        await rig.call(rig.registry.RegisterEngineReplica, foreign)


async def _until_gone(rig: Rig, name: str) -> None:
    while True:
        await rig.call(rig.replicas.GetEngineReplica, engine_replica_service_pb2.GetEngineReplicaRequest(name=name))
        await asyncio.sleep(0.2)


def _bad_requests(rig: Rig, policy: str) -> list[tuple[Any, Any, type[errors.MintError], str]]:
    tenant = "/".join(policy.split("/")[:2])
    create = policy_service_pb2.CreatePolicyRequest
    good = policy_service_pb2.Policy(base_model=BASE)
    publish = publish_service_pb2.PublishRevisionRequest(parent=policy, unfenced=True)
    publish.revision.blob.digest = digest_of("never staged")
    publish.revision.base_digest = BASE_DIGEST
    publish.revision.lora.rank = 4
    invalid = errors.InvalidArgument
    return [
        (rig.policies.CreatePolicy, create(parent="tenants/../x", policy_id="p", policy=good), invalid, "parent"),
        (rig.policies.CreatePolicy, create(parent=tenant, policy_id="../p", policy=good), invalid, "policy_id"),
        (rig.policies.CreatePolicy, create(parent=tenant, policy_id="P", policy=good), invalid, "policy_id"),
        (rig.policies.CreatePolicy, create(parent=tenant, policy_id="p"), invalid, "policy.base_model"),
        (
            rig.policies.CreatePolicy,
            create(parent=tenant, policy_id="p", policy=good, request_id="1"),
            invalid,
            "request_id",
        ),
        (
            rig.policies.CreatePolicy,
            create(parent=tenant, policy_id="p", policy=policy_service_pb2.Policy(base_model=BASE, name="tenants/x")),
            invalid,
            "policy.name",
        ),
        (rig.policies.GetPolicy, policy_service_pb2.GetPolicyRequest(name=f"{tenant}/policies/x"), errors.NotFound, ""),
        (
            rig.policies.DeletePolicy,
            policy_service_pb2.DeletePolicyRequest(name=policy, etag="1"),
            errors.EtagMismatch,
            "",
        ),
        (
            rig.policies.ListPolicies,
            policy_service_pb2.ListPoliciesRequest(parent=tenant, page_token="x"),
            invalid,
            "page_token",
        ),
        (
            rig.policies.ListPolicies,
            policy_service_pb2.ListPoliciesRequest(parent=tenant, filter="!"),
            invalid,
            "filter",
        ),
        (
            rig.base_models.RegisterBaseModel,
            base_model_service_pb2.RegisterBaseModelRequest(
                base_model=base_model_service_pb2.BaseModel(name=BASE, digest=digest_of("other"))
            ),
            errors.AlreadyExists,
            "",
        ),
        (rig.publish.PublishRevision, publish, errors.BlobMissing, ""),
        (
            rig.publish.StageBlob,
            publish_service_pb2.StageBlobRequest(name=f"{tenant}/blobs/md5:1", size_bytes=1),
            invalid,
            "name",
        ),
        (
            rig.aliases.PromoteAlias,
            alias_service_pb2.PromoteAliasRequest(name=f"{policy}/aliases/live", revision_number=9),
            errors.NotFound,
            "",
        ),
        (
            rig.aliases.PromoteAlias,
            alias_service_pb2.PromoteAliasRequest(
                name=f"{policy}/aliases/live", revision_number=1, min_resident_replicas=-1
            ),
            invalid,
            "min_resident_replicas",
        ),
        (rig.aliases.Resolve, alias_service_pb2.ResolveRequest(name=f"{policy}/aliases/.."), invalid, "name"),
        (
            rig.work.AcquireLease,
            work_service_pb2.AcquireLeaseRequest(resource=policy, holder="short"),
            invalid,
            "holder",
        ),
        (
            rig.work.RenewLease,
            work_service_pb2.RenewLeaseRequest(fence={"resource": policy, "token": 1}),
            errors.LeaseLost,
            "",
        ),
        (
            rig.runs.CreateRun,
            run_service_pb2.CreateRunRequest(parent=tenant, run=run_service_pb2.Run(policy=policy)),
            invalid,
            "run.recipe",
        ),
        (rig.runs.CancelRun, run_service_pb2.CancelRunRequest(name=f"{tenant}/runs/none"), errors.NotFound, ""),
        (
            rig.runs.CreateRun,
            run_service_pb2.CreateRunRequest(
                parent=tenant, run=run_service_pb2.Run(policy=policy, grpo={"loss": 99}, publish=True)
            ),
            invalid,
            "run.grpo.loss",
        ),
        (rig.runs.ListRunSteps, run_service_pb2.ListRunStepsRequest(name=f"{tenant}/runs/none"), errors.NotFound, ""),
        (
            rig.rollouts.CreateRollout,
            rollout_service_pb2.CreateRolloutRequest(parent=policy, rollout_id="R"),
            invalid,
            "rollout_id",
        ),
        (
            rig.rollouts.CreateRollout,
            rollout_service_pb2.CreateRolloutRequest(
                parent=policy, rollout_id="r", rollout={"expire_time": {"seconds": 10**15}}
            ),
            invalid,
            "expire_time",
        ),
        (
            rig.rollouts.GetRollout,
            rollout_service_pb2.GetRolloutRequest(name=f"{policy}/rollouts/none"),
            errors.NotFound,
            "",
        ),
        (
            rig.rollouts.DeleteRollout,
            rollout_service_pb2.DeleteRolloutRequest(
                name=f"{policy}/rollouts/r", fence={"resource": policy, "token": 1}
            ),
            errors.LeaseLost,
            "",
        ),
    ]


async def test_bad_requests_answer_the_documented_reason_and_good_ones_follow(rig: Rig) -> None:
    policy = await rig.policy()
    for method, request, error, field in _bad_requests(rig, policy):
        with pytest.raises(error) as caught:
            await rig.call(method, request)
        assert caught.value.reason == error.reason, request
        assert getattr(caught.value, "field", "") == field, request
        get = policy_service_pb2.GetPolicyRequest(name=policy)
        assert (await rig.call(rig.policies.GetPolicy, get)).policy.name == policy
