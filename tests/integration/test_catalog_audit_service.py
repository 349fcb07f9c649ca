"""The audit trail, usage and request ids over gRPC and a real etcd, through two catalogs."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from mint_api.runtime.v1 import usage_report_service_pb2, work_service_pb2
from mint_api.v1 import (
    alias_service_pb2,
    audit_service_pb2,
    evaluation_service_pb2,
    policy_service_pb2,
    revision_service_pb2,
    run_service_pb2,
    usage_service_pb2,
)
from mint_core import calls, errors
from mint_core.channel import connect
from mint_core.names import AliasName, PolicyName, RevisionName
from mint_inference.clients import UsageClient
from mint_inference.usage import UsageMeter
from support.catalog_rig import BASE, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture
async def rig(etcd: EtcdServer) -> AsyncIterator[Rig]:
    async with running_catalog(etcd) as running:
        yield running


async def _entries(rig: Rig, name: str, **query: Any) -> list[audit_service_pb2.AuditEntry]:
    """Entries of the tenant of a resource, newest first."""
    request = audit_service_pb2.ListAuditEntriesRequest(parent="/".join(name.split("/")[:2]), **query)
    entries: list[audit_service_pb2.AuditEntry] = []
    while True:
        page = await rig.call(rig.audit.ListAuditEntries, request)
        entries += page.audit_entries
        request.page_token = page.next_page_token
        if not request.page_token:
            return entries


def _told(entry: audit_service_pb2.AuditEntry) -> tuple[str, str, dict[str, int]]:
    return entry.method.rpartition("/")[2], entry.reason, {change.resource: change.type for change in entry.changes}


async def test_every_kind_of_call_leaves_one_entry_that_tells_all(rig: Rig) -> None:
    created, changed, deleted = 1, 2, 3
    with calls.inbound_call("ada", None):
        policy = await rig.policy()
        await rig.revision(policy, "one")
        await rig.revision(policy, "two")
        await rig.promote(policy, 1)
        request = alias_service_pb2.PromoteAliasRequest(
            name=f"{policy}/aliases/live", revision_number=2, reason="better", request_id=str(uuid.uuid4())
        )
        promoted = await rig.call(rig.aliases.PromoteAlias, request)
        await rig.call(
            rig.aliases.RollbackAlias, alias_service_pb2.RollbackAliasRequest(name=request.name, reason="worse")
        )
        retire = revision_service_pb2.RetireRevisionRequest(name=f"{policy}/revisions/2")
        await rig.call(rig.revisions.RetireRevision, retire)
        evaluation = evaluation_service_pb2.CreateEvaluationRequest(parent=policy, evaluation_id="e1")
        evaluation.evaluation.revision = f"{policy}/revisions/1"
        await rig.call(rig.evaluations.CreateEvaluation, evaluation)
        run = await rig.run(policy)
        cancel = run_service_pb2.CancelRunRequest(name=run.name, reason="changed my mind")
        await rig.call(rig.runs.CancelRun, cancel)
        fence = await rig.acquire(policy, "holder-1")
        release = work_service_pb2.ReleaseLeaseRequest(fence=fence)
        await rig.call(rig.work.ReleaseLease, release)
        await rig.call(rig.aliases.DeleteAlias, alias_service_pb2.DeleteAliasRequest(name=request.name))
        await rig.call(rig.policies.DeletePolicy, policy_service_pb2.DeletePolicyRequest(name=policy))
    with pytest.raises(errors.NotFound):
        await rig.promote(policy, 1)
    entries = await _entries(rig, policy)
    live = f"{policy}/aliases/live"
    assert [_told(entry) for entry in reversed(entries)] == [
        ("CreatePolicy", "", {policy: created}),
        ("PublishRevision", "", {policy: changed, f"{policy}/revisions/1": created}),
        ("PublishRevision", "", {policy: changed, f"{policy}/revisions/2": created}),
        ("PromoteAlias", "", {live: created}),
        ("PromoteAlias", "better", {live: changed}),
        ("RollbackAlias", "worse", {live: changed}),
        ("RetireRevision", "", {f"{policy}/revisions/2": changed}),
        ("CreateEvaluation", "", {f"{policy}/evaluations/e1": created}),
        ("CreateRun", "", {run.name: created}),
        ("CancelRun", "changed my mind", {run.name: changed}),
        ("AcquireLease", "", {f"{policy}/lease": created}),
        ("ReleaseLease", "", {f"{policy}/lease": deleted}),
        ("DeleteAlias", "", {live: deleted}),
        ("DeletePolicy", "", {policy: changed}),
    ]
    assert {entry.principal for entry in entries} == {"ada"}
    move = entries[-5]
    assert (move.method, move.request_id) == ("mint.v1.AliasService/PromoteAlias", request.request_id)
    assert move.catalog_revision == promoted.catalog_revision
    before, after = alias_service_pb2.Alias(), alias_service_pb2.Alias()
    assert move.changes[0].before.Unpack(before)
    assert move.changes[0].after.Unpack(after)
    assert before.active.revision_number == 1
    assert after == promoted.alias
    assert [_told(entry)[0] for entry in await _entries(rig, policy, resource=f"{policy}/revisions/2")] == [
        "RetireRevision",
        "PublishRevision",
    ]


async def test_the_same_request_id_fifty_times_through_two_catalogs_applies_once(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as one, running_catalog(etcd) as other:
        tenant, rigs = f"t{uuid.uuid4().hex[:10]}", (one, other)
        await one.base_model()

        async def fifty(service: str, method: str, request: Any) -> Any:
            request.request_id = str(uuid.uuid4())
            answers = await asyncio.gather(
                *(each.call(getattr(getattr(each, service), method), request) for each in rigs for _ in range(25))
            )
            # And again, as after a lost answer.
            answers += [await each.call(getattr(getattr(each, service), method), request) for each in rigs]
            assert all(answer == answers[0] for answer in answers)
            found = [entry for entry in await _entries(one, policy) if entry.request_id == request.request_id]
            assert len(found) == 1
            assert found[0].catalog_revision == answers[0].catalog_revision
            return answers[0]

        policy = f"tenants/{tenant}/policies/tone"
        create = policy_service_pb2.CreatePolicyRequest(
            parent=f"tenants/{tenant}", policy_id="tone", policy=policy_service_pb2.Policy(base_model=BASE)
        )
        assert (await fifty("policies", "CreatePolicy", create)).policy.name == policy
        await one.revision(policy, "one")
        await one.revision(policy, "two")
        promote = alias_service_pb2.PromoteAliasRequest(name=f"{policy}/aliases/live", revision_number=1)
        assert len((await fifty("aliases", "PromoteAlias", promote)).alias.history) == 1
        trial = alias_service_pb2.Canary(weight=0.25)
        trial.target.revision_number = 2
        canary = alias_service_pb2.SetCanaryRequest(name=promote.name, canary=trial, reason="a try")
        assert (await fifty("aliases", "SetCanary", canary)).alias.canary.weight == 0.25
        assert len(await _entries(one, policy)) == 5
        canary.canary.weight = 0.5
        with pytest.raises(errors.RequestIdReused):
            await other.call(other.aliases.SetCanary, canary)
        assert len(await _entries(one, policy)) == 5


async def test_pages_are_consistent_while_entries_are_written(rig: Rig) -> None:
    policy = await rig.policy()
    update = policy_service_pb2.UpdatePolicyRequest()
    update.policy.name = policy
    update.update_mask.paths.append("owner")

    async def write(number: int) -> None:
        request = policy_service_pb2.UpdatePolicyRequest()
        request.CopyFrom(update)
        request.policy.owner = f"o{number}"
        await rig.call(rig.policies.UpdatePolicy, request)

    for number in range(120):
        await write(number)
    before = await _entries(rig, policy, page_size=1000)
    writing = asyncio.create_task(_until_cancelled(write))
    try:
        request = audit_service_pb2.ListAuditEntriesRequest(parent="/".join(policy.split("/")[:2]), page_size=7)
        paged: list[audit_service_pb2.AuditEntry] = []
        revisions = set()
        while True:
            page = await rig.call(rig.audit.ListAuditEntries, request)
            paged += page.audit_entries
            revisions.add(page.catalog_revision)
            request.page_token = page.next_page_token
            if not request.page_token:
                break
    finally:
        writing.cancel()
        await asyncio.wait([writing])
    assert len(before) == 121
    assert len(revisions) == 1
    assert paged[-len(before) :] == before
    assert [entry.catalog_revision for entry in paged] == sorted(
        (entry.catalog_revision for entry in paged), reverse=True
    )
    assert len(await _entries(rig, policy, page_size=1000)) > len(paged)


async def _until_cancelled(write: Any) -> None:
    number = 1000
    while True:
        await write(number)
        number += 1


async def test_what_the_catalog_does_by_itself_is_told_as_its_own(rig: Rig) -> None:
    policy = await rig.policy()
    run = await rig.run(policy)
    with calls.inbound_call("worker", None):
        await rig.claim("worker-1", ttl_s=2)
    async with asyncio.timeout(20):
        while len(entries := await _entries(rig, policy, resource=run.name)) < 3:  # noqa: ASYNC110 - the catalog tells nobody
            await asyncio.sleep(0.1)
    assert [(entry.principal, entry.method) for entry in entries] == [
        ("catalog", "catalog/reap"),
        ("worker", "mint.runtime.v1.WorkService/ClaimRun"),
        (calls.ANONYMOUS, "mint.v1.RunService/CreateRun"),
    ]
    assert "LEASE_LOST" in entries[0].reason
    before, after = run_service_pb2.Run(), run_service_pb2.Run()
    assert entries[0].changes[0].before.Unpack(before)
    assert entries[0].changes[0].after.Unpack(after)
    assert (before.state, after.state) == (run_service_pb2.RUN_STATE_RUNNING, run_service_pb2.RUN_STATE_QUEUED)


async def test_usage_is_what_reporters_told_last(rig: Rig) -> None:
    policy = await rig.policy()
    tenant = "/".join(policy.split("/")[:2])
    day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for reporter, number in (("reporter-1", 1), ("reporter-1", 7), ("reporter-2", 100)):
        report = usage_report_service_pb2.ReportUsageRequest(reporter=reporter)
        count = report.counts.add(policy=policy, num_requests=number, num_prompt_tokens=number, num_generated_tokens=1)
        count.day.FromDatetime(day)
        await rig.call(rig.usage_reports.ReportUsage, report)
    await rig.revision(policy, "one")
    for resource in (policy, tenant):
        usage = (await rig.call(rig.usage.GetUsage, usage_service_pb2.GetUsageRequest(resource=resource))).usage
        assert (usage.num_requests, usage.num_prompt_tokens, usage.num_generated_tokens) == (107, 107, 2)
        assert (usage.num_policies, usage.num_revisions) == (1, 1)
    missing = usage_service_pb2.GetUsageRequest(resource=f"{tenant}/policies/none")
    with pytest.raises(errors.NotFound):
        await rig.call(rig.usage.GetUsage, missing)


async def test_what_inference_counts_arrives(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as rig, connect(rig.runtime_address) as channel:
        policies = [PolicyName.parse(await rig.policy(policy_id=f"p{n}")) for n in range(2)]
        meter = UsageMeter(UsageClient(channel, timeout_s=10))
        for policy in policies:
            meter.began(AliasName(policy.tenant, policy.policy, "live"), 11)
            meter.generated(RevisionName(policy.tenant, policy.policy, 3), 7)
        assert await meter.report()
        meter.generated(AliasName(policies[0].tenant, policies[0].policy, "live"), 5)
        assert await meter.report()
        for policy, num_generated in zip(policies, (12, 7), strict=True):
            usage = (await rig.call(rig.usage.GetUsage, usage_service_pb2.GetUsageRequest(resource=str(policy)))).usage
            assert (usage.num_requests, usage.num_prompt_tokens, usage.num_generated_tokens) == (1, 11, num_generated)


async def test_the_command_line_shows_the_trail_and_usage(rig: Rig) -> None:
    with calls.inbound_call("ada", None):
        policy = await rig.policy()
        await rig.revision(policy, "one")
        await rig.promote(policy, 1)
    tenant = policy.split("/")[1]

    async def mint(*arguments: str) -> str:
        command = [sys.executable, "-m", "mint_cli", *arguments, "--catalog", rig.public_address]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    trail, found, old, usage = await asyncio.gather(
        mint("audit", "list", tenant, "--since", "1h", "--limit", "2"),
        mint("audit", "list", tenant, "--resource", f"{tenant}/tone@live", "--json"),
        mint("audit", "list", tenant, "--until", "1h"),
        mint("usage", f"{tenant}/tone", "--json"),
    )
    lines = trail.splitlines()
    assert len(lines) == 3
    assert all(part in lines[1] for part in ("ada", "AliasService/PromoteAlias", f"created {tenant}/tone@live"))
    (entry,) = json.loads(found)
    after = entry["changes"][0]["after"]
    assert entry["method"] == "mint.v1.AliasService/PromoteAlias"
    assert (after["type"], after["active"]["revision_number"]) == ("mint.v1.Alias", 1)
    assert len(old.splitlines()) == 1
    counted = json.loads(usage)
    assert (counted["num_requests"], counted["num_policies"], counted["num_revisions"]) == (0, 1, 1)
