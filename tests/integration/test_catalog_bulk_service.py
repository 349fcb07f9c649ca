"""Many policies at a time, undelete and listings, over gRPC and a real etcd."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from mint_api.v1 import alias_service_pb2, audit_service_pb2, common_pb2, policy_service_pb2
from mint_cli.main import run
from mint_client import Endpoints, MintClient
from mint_core import errors
from support.catalog_rig import BASE, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


@pytest.fixture
async def rig(etcd: EtcdServer) -> AsyncIterator[Rig]:
    async with running_catalog(etcd) as running:
        await running.base_model()
        yield running


def tenant_name() -> str:
    return "t" + uuid.uuid4().hex[:10]


def item(policy_id: str, blob: common_pb2.BlobRef | None = None, **fields: Any) -> Any:
    request = policy_service_pb2.CreatePolicyRequest(policy_id=policy_id, **fields)
    request.policy.base_model = BASE
    if blob is not None:
        request.revisions.add().blob.CopyFrom(blob)
        request.aliases["live"] = 1
    return request


def message(sequence: int, tenant: str, items: Sequence[Any]) -> Any:
    batch = policy_service_pb2.BatchCreatePoliciesRequest(parent=f"tenants/{tenant}", requests=items)
    return policy_service_pb2.ImportPoliciesRequest(sequence=sequence, batch=batch)


async def importing(rig: Rig, messages: Sequence[Any]) -> dict[int, Any]:
    async def stream() -> AsyncIterator[Any]:
        for each in messages:
            yield each

    return {answer.sequence: answer.result async for answer in rig.stream(rig.policies.ImportPolicies, stream())}


async def listed(rig: Rig, parent: str, **fields: Any) -> list[str]:
    names, token = [], ""
    while True:
        request = policy_service_pb2.ListPoliciesRequest(parent=parent, page_size=400, page_token=token, **fields)
        page = await rig.call(rig.policies.ListPolicies, request)
        names += [policy.name for policy in page.policies]
        token = page.next_page_token
        if not token:
            return names


async def test_an_import_makes_policies_that_resolve(rig: Rig) -> None:
    tenant = tenant_name()
    blobs = [await rig.blob(f"tenants/{tenant}/policies/x", f"w{number}") for number in range(20)]
    messages = [
        message(first, tenant, [item(f"p{n:04d}", blobs[n % 20]) for n in range(first, first + 250)])
        for first in range(0, 1500, 250)
    ]
    answers = await importing(rig, messages)
    assert sorted(answers) == list(range(0, 1500, 250))
    assert all(not status.code for result in answers.values() for status in result.statuses)
    assert sum(len(result.statuses) for result in answers.values()) == 1500
    for number in (0, 777, 1499):
        resolution = await rig.resolve(f"tenants/{tenant}/policies/p{number:04d}")
        assert resolution.blob.digest == blobs[number % 20].digest
        assert resolution.revision == f"tenants/{tenant}/policies/p{number:04d}/revisions/1"
    by_name = await listed(rig, f"tenants/{tenant}", order_by="name")
    assert by_name == [f"tenants/{tenant}/policies/p{number:04d}" for number in range(1500)]
    assert sorted(await listed(rig, f"tenants/{tenant}")) == by_name
    assert sorted(await listed(rig, "tenants/-", filter=f"tenant = {tenant} AND alias = live")) == by_name
    trail = await rig.call(
        rig.audit.ListAuditEntries,
        audit_service_pb2.ListAuditEntriesRequest(parent=f"tenants/{tenant}", page_size=1000),
    )
    created = {change.resource for entry in trail.audit_entries for change in entry.changes}
    assert {f"{by_name[777]}", f"{by_name[777]}/aliases/live", f"{by_name[777]}/revisions/1"} <= created


async def test_a_bad_message_answers_its_statuses_and_the_stream_goes_on(rig: Rig) -> None:
    tenant = tenant_name()
    answers = await importing(
        rig,
        [
            message(1, "A/B", [item("a"), item("b")]),
            message(2, tenant, []),
            message(3, tenant, [item("A"), item("ok"), item("b", parent="tenants/other"), item("ok")]),
            message(4, tenant, [item(f"p{number}") for number in range(1001)]),
            message(5, tenant, [item("last")]),
        ],
    )
    codes = {sequence: [status.code for status in result.statuses] for sequence, result in answers.items()}
    invalid = code_pb2.INVALID_ARGUMENT
    assert codes[1] == [invalid] * 2
    assert codes[2] == []
    assert codes[3] == [invalid, 0, invalid, code_pb2.ALREADY_EXISTS]
    assert codes[4] == [invalid] * 1001
    assert codes[5] == [0]
    assert sorted(await listed(rig, f"tenants/{tenant}")) == [f"tenants/{tenant}/policies/{p}" for p in ("last", "ok")]


@pytest.mark.parametrize("num_items", [0, 1001])
async def test_a_batch_of_no_item_or_too_many_is_refused(rig: Rig, num_items: int) -> None:
    request = message(1, tenant_name(), [item(f"p{number}") for number in range(num_items)]).batch
    with pytest.raises(errors.InvalidArgument, match="requests has"):
        await rig.call(rig.policies.BatchCreatePolicies, request)


async def test_what_is_created_in_a_batch_and_alone_has_the_same_request_id(rig: Rig) -> None:
    tenant, request_id = tenant_name(), str(uuid.uuid4())
    batch = message(1, tenant, [item("tone", request_id=request_id)]).batch
    for _ in range(2):
        answer = await rig.call(rig.policies.BatchCreatePolicies, batch)
        assert [status.code for status in answer.statuses] == [0]
    alone = item("tone", request_id=request_id, parent=f"tenants/{tenant}")
    assert (await rig.call(rig.policies.CreatePolicy, alone)).policy.name == f"tenants/{tenant}/policies/tone"
    alone.policy.owner = "bob"
    with pytest.raises(errors.RequestIdReused):
        await rig.call(rig.policies.CreatePolicy, alone)


async def test_an_import_over_an_etcd_that_goes_away_settles_after_it_is_back(rig: Rig, etcd: EtcdServer) -> None:
    tenant = tenant_name()
    items = [item(f"p{number:04d}", request_id=str(uuid.uuid4())) for number in range(600)]
    messages = [message(first, tenant, items[first : first + 100]) for first in range(0, 600, 100)]
    under_way = asyncio.create_task(importing(rig, messages))
    await asyncio.sleep(0.05)
    etcd.kill()
    await asyncio.sleep(0.3)
    etcd.spawn()
    answers = await under_way
    codes = {status.code for result in answers.values() for status in result.statuses}
    assert codes <= {0, code_pb2.UNAVAILABLE}
    await asyncio.to_thread(etcd.wait_ready)
    async with asyncio.timeout(20):
        while True:  # the channel to etcd may need a moment
            answers = await importing(rig, messages)
            if not any(status.code for result in answers.values() for status in result.statuses):
                break
    assert len(await listed(rig, f"tenants/{tenant}")) == 600


async def test_undelete_pause_and_quota_over_the_wire(rig: Rig) -> None:
    tenant = tenant_name()
    policy = f"tenants/{tenant}/policies/tone"
    blob = await rig.blob(policy, "one")
    async with MintClient(Endpoints(catalog=rig.public_address)) as client:
        revision = policy_service_pb2.CreatePolicyRequest().revisions.add()
        revision.blob.CopyFrom(blob)
        quota = policy_service_pb2.PolicyQuota(max_revisions=1)
        created = await client.policies.create(
            tenant, "tone", base_model=BASE, quota=quota, revisions=[revision], aliases={"live": 1}
        )
        assert created.quota == quota
        with pytest.raises(errors.ResourceExhausted, match="max_revisions"):
            await rig.revision(policy, "two")
        assert (await client.policies.pause(policy)).state == policy_service_pb2.POLICY_STATE_PAUSED
        await client.policies.delete(policy)
        with pytest.raises(errors.NotFound):
            await rig.resolve(policy)
        back = await client.policies.undelete(policy)
        assert (back.uid, back.state) == (created.uid, policy_service_pb2.POLICY_STATE_PAUSED)
        assert (await rig.resolve(policy)).blob == blob
        assert (await client.policies.resume(policy)).state == policy_service_pb2.POLICY_STATE_ACTIVE
        with pytest.raises(errors.WrongState):
            await client.policies.undelete(policy)
        with pytest.raises(errors.InvalidArgument, match="DELETED"):
            await client.policies.update(
                policy_service_pb2.Policy(name=policy, state=policy_service_pb2.POLICY_STATE_DELETED), ["state"]
            )
        alias = await rig.call(rig.aliases.GetAlias, alias_service_pb2.GetAliasRequest(name=f"{policy}/aliases/live"))
        assert alias.alias.active.digest == blob.digest


async def test_the_client_imports_batches_of_several_tenants(rig: Rig) -> None:
    tenants = [tenant_name(), tenant_name()]

    async def requests() -> AsyncIterator[Any]:
        for number in range(30):
            yield item(f"p{number:02d}", parent=f"tenants/{tenants[number // 15]}")
        yield item("p00", parent=f"tenants/{tenants[0]}")

    async def broken() -> AsyncIterator[Any]:
        yield item("extra", parent=f"tenants/{tenants[0]}")
        raise ValueError("no more")

    async with MintClient(Endpoints(catalog=rig.public_address)) as client:
        outcomes = [imported async for imported in client.policies.import_(requests(), batch_size=10)]
        failed = [imported for imported in outcomes if imported.error is not None]
        assert len(outcomes) == 31
        assert [(each.request.policy_id, type(each.error)) for each in failed] == [("p00", errors.AlreadyExists)]
        found = [await listed(rig, f"tenants/{tenant}") for tenant in tenants]
        assert [len(names) for names in found] == [15, 15]
        with pytest.raises(ValueError, match="no more"):
            async for _ in client.policies.import_(broken(), batch_size=1):
                pass
        result = await client.policies.batch_create(tenants[1], [item("p15"), item("more")])
        assert [type(error) for error in result] == [errors.AlreadyExists, type(None)]


async def test_the_command_line(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tenant = tenant_name()
    blob = await rig.blob(f"tenants/{tenant}/policies/x", "one")
    file = tmp_path / "policies.jsonl"
    line: dict[str, Any] = {
        "base": BASE,
        "labels": {"team": "search"},
        "revisions": [{"blob": {"digest": blob.digest}, "num_tensors": 392, "lora": {"rank": 8}}],
        "aliases": {"live": 1},
    }
    lines = [line | {"name": f"{tenant}/p{number}"} for number in range(5)]
    file.write_text("".join(json.dumps(each) + "\n" for each in [*lines, {}]))

    async def mint(*argv: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(run, [*argv, "--catalog", rig.public_address, "--state-dir", str(tmp_path)])
        return status, *capsys.readouterr()

    status, _, err = await mint("policy", "import", str(file))
    assert status == 1
    assert f"{file}, line 6: policy is ''" in err
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    status, out, err = await mint("policy", "import", str(file))
    assert (status, out) == (1, "created 0 policies\n")
    assert f"{tenant}/p0: RESOURCE_EXISTS: " in err
    status, out, _ = await mint("policy", "import", str(file), "--skip-existing", "--json")
    assert (status, json.loads(out)["num_existing"]) == (0, 5)
    assert (await mint("policy", "pause", f"{tenant}/p3"))[:2] == (0, f"paused {tenant}/p3\n")
    status, out, _ = await mint("policy", "list", tenant, "--filter", 'labels.team = "search"', "--order-by", "name")
    assert status == 0
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [
        [f"{tenant}/p{number}", "PAUSED" if number == 3 else "ACTIVE"] for number in range(5)
    ]
    assert (await mint("policy", "delete", f"{tenant}/p3"))[0] == 0
    assert (await mint("policy", "undelete", f"{tenant}/p3"))[:2] == (0, f"undeleted {tenant}/p3\n")
    assert (await mint("policy", "resume", f"{tenant}/p3"))[:2] == (0, f"resumed {tenant}/p3\n")
    status, _, err = await mint("policy", "list", tenant, "--order-by", "age")
    assert (status, "order_by is 'age'" in err) == (1, True)
