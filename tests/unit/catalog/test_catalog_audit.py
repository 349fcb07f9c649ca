"""The audit trail: one entry for each write, none for anything else, pages newest first."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from unit.catalog.catalog_lab import POLICY, TENANT, Lab

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import alias_service_pb2, audit_service_pb2, policy_service_pb2
from mint_catalog.model.audit_codec import AuditCodec
from mint_catalog.model.audit_records import AuditChangeType
from mint_catalog.model.records import Evaluation, Policy
from mint_catalog.model.run_records import RunProgress, RunState, RunStep
from mint_catalog.policies.heads import MAX_ALIASES
from mint_catalog.servicers.audit import AuditServicer
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import KeyValue, prefix_end
from mint_catalog.trail import audit, retention
from mint_catalog.trail.audit_trail import AuditQuery, AuditTrail
from mint_catalog.work.queue import Outcome
from mint_core import calls, errors
from mint_core.names import EvaluationName, PolicyName

NOW = datetime(2026, 3, 1, tzinfo=UTC).timestamp()


class _Clock:
    """A wall clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time_s = NOW
        for module in ("trail.audit", "trail.audit_trail", "trail.retention"):
            monkeypatch.setattr(f"mint_catalog.{module}.wall_s", self.read)

    def read(self) -> float:
        return self.time_s


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


async def _entries(lab: Lab, **query: Any) -> list[audit_service_pb2.AuditEntry]:
    """Every entry of the tenant as a client sees it, newest first."""
    entries: list[audit_service_pb2.AuditEntry] = []
    servicer = AuditServicer(AuditTrail(lab.store, lab.keys), lab.keys, lab.codecs)
    request = audit_service_pb2.ListAuditEntriesRequest(parent=str(TENANT), **query)
    while True:
        page = await servicer.ListAuditEntries(request, None)
        entries += page.audit_entries
        request.page_token = page.next_page_token
        if not request.page_token:
            return entries


def _shape(entry: audit_service_pb2.AuditEntry) -> dict[str, int]:
    return {change.resource: change.type for change in entry.changes}


def _unpacked(packed: Any, message: Any) -> Any:
    assert packed.Unpack(message), packed.type_url
    return message


async def test_an_entry_tells_who_what_and_why(lab: Lab) -> None:
    await lab.policy()
    await lab.publish("one")
    await lab.publish("two")
    first = await lab.promote(1)
    request_id = str(uuid.uuid4())
    request = Request.of(tenant="acme", principal="ada", method="M", request_id=request_id, payload=b"")
    with calls.inbound_call("ada", None, "mint.v1.AliasService/PromoteAlias"):
        second = await lab.aliases.promote(lab.move(2, reason="better"), request)
    newest, older, *_ = await _entries(lab)
    assert (newest.principal, newest.method, newest.request_id) == (
        "ada",
        "mint.v1.AliasService/PromoteAlias",
        request_id,
    )
    assert newest.catalog_revision == second.catalog_revision
    assert older.catalog_revision == first.catalog_revision
    assert older.principal == calls.ANONYMOUS
    (change,) = newest.changes
    assert (change.resource, change.type) == (f"{POLICY}/aliases/live", audit_service_pb2.AUDIT_CHANGE_TYPE_CHANGED)
    before = _unpacked(change.before, alias_service_pb2.Alias())
    after = _unpacked(change.after, alias_service_pb2.Alias())
    assert (before.active.revision_number, after.active.revision_number) == (1, 2)
    assert after.etag == str(second.record.mod_revision)
    assert newest.name.startswith("tenants/acme/auditEntries/")
    assert abs(newest.time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_each_kind_of_write_leaves_one_entry(lab: Lab) -> None:
    created, changed, deleted = 1, 2, 3
    policy = str(POLICY)
    wanted: list[dict[str, int]] = []

    async def leaves(*changes: tuple[str, int]) -> None:
        wanted.append(dict(changes))
        assert [_shape(each) for each in reversed(await _entries(lab))] == wanted

    await lab.policy()
    await leaves((policy, created))
    await lab.policies.update(POLICY, Policy(POLICY, owner="ada"), {"owner"})
    await leaves((policy, changed))
    await lab.publish("one")
    await leaves((policy, changed), (f"{policy}/revisions/1", created))
    await lab.promote(1)
    await leaves((f"{policy}/aliases/live", created))
    await lab.publish("two")
    wanted.append({policy: changed, f"{policy}/revisions/2": created})
    await lab.promote(2)
    await leaves((f"{policy}/aliases/live", changed))
    await lab.aliases.rollback(lab.move(0, reason="worse"))
    await leaves((f"{policy}/aliases/live", changed))
    await lab.revisions.retire((await lab.revisions.list(POLICY, page_size=2, page_token="")).records[1].name)
    await leaves((f"{policy}/revisions/2", changed))
    evaluation = Evaluation(EvaluationName("acme", "tone", "e1"), revision=f"{policy}/revisions/1", scorer="s")
    await lab.evaluations.create(evaluation, None)
    await leaves((f"{policy}/evaluations/e1", created))
    run = (await lab.run()).record
    await leaves((str(run.name), created))
    await lab.runs.cancel(run.name, "changed my mind")
    await leaves((str(run.name), changed))
    await lab.promote(1, alias="next")
    wanted.append({f"{policy}/aliases/next": created})
    await lab.policies.delete(POLICY)
    await leaves((policy, changed), (f"{policy}/aliases/live", deleted), (f"{policy}/aliases/next", deleted))
    last = (await _entries(lab))[0]
    gone = next(change for change in last.changes if change.resource.endswith("live"))
    assert _unpacked(gone.before, alias_service_pb2.Alias()).active.revision_number == 1
    assert not gone.HasField("after")
    head = next(change for change in last.changes if change.resource == policy)
    assert _unpacked(head.after, policy_service_pb2.Policy()).state == policy_service_pb2.POLICY_STATE_DELETED


async def test_a_worker_leaves_an_entry_where_the_run_changes_state_only(lab: Lab) -> None:
    await lab.policy()
    run = (await lab.run()).record
    claim, fence = await lab.claimed()
    num_entries = len(await _entries(lab))
    for step in (1, 2, 3):
        await lab.queue.report(run.name, fence, RunProgress(step=step), steps=(RunStep(step=step, loss=0.5),))
    assert len(await _entries(lab)) == num_entries
    await lab.runs.cancel(run.name, "stop")
    assert _shape((await _entries(lab))[0]) == {str(run.name): 2}
    await lab.queue.finish(run.name, fence, Outcome(RunState.CANCELLED))
    last = (await _entries(lab))[0]
    assert _shape(last) == {str(run.name): 2, f"{claim.resource}/lease": 3}
    lease = next(change for change in last.changes if change.resource.endswith("/lease"))
    assert _unpacked(lease.before, work_service_pb2.Lease()).holder == "worker-1"


async def test_what_changes_nothing_leaves_nothing(lab: Lab) -> None:
    request_id = str(uuid.uuid4())
    request = Request.of(tenant="acme", principal="ada", method="M", request_id=request_id, payload=b"")
    await lab.policy(request=request)
    await lab.policy(request=request)  # a replay
    await lab.publish("one")
    await lab.promote(1)
    num_entries = len(await _entries(lab))
    await lab.promote(1)  # it is there already
    await lab.blob("a blob is no state of the tenant's")
    with pytest.raises(errors.AlreadyExists):
        await lab.policy()
    with pytest.raises(errors.EtagMismatch):
        await lab.promote(1, etag="1")
    with pytest.raises(errors.NotFound):
        await lab.promote(7)
    lab.store.fail_next_txn = "before"
    with pytest.raises(errors.Unavailable):
        await lab.policies.update(POLICY, Policy(POLICY, owner="ada"), {"owner"})
    assert len(await _entries(lab)) == num_entries == 3


async def test_a_write_whose_answer_is_lost_has_its_entry(lab: Lab) -> None:
    await lab.policy()
    lab.store.fail_next_txn = "after"
    with pytest.raises(errors.Unavailable):
        await lab.policies.update(POLICY, Policy(POLICY, owner="ada"), {"owner"})
    assert _shape((await _entries(lab))[0]) == {str(POLICY): 2}


async def test_a_repeated_call_after_a_lost_answer_leaves_one_entry(lab: Lab) -> None:
    request = Request.of(tenant="acme", principal="ada", method="M", request_id=str(uuid.uuid4()), payload=b"")
    await lab.base_model()
    lab.store.fail_next_txn = "after"
    with pytest.raises(errors.Unavailable):
        await lab.policies.create(POLICY, Policy(POLICY, base_model="baseModels/tiny"), request)
    again = await lab.policies.create(POLICY, Policy(POLICY, base_model="baseModels/tiny"), request)
    (entry,) = await _entries(lab)
    assert (entry.catalog_revision, entry.request_id) == (again.catalog_revision, request.request_id if request else "")


async def test_a_policy_with_as_many_aliases_as_it_can_have_is_deleted_in_one_entry(lab: Lab) -> None:
    await lab.policy()
    await lab.publish("one")
    for number in range(MAX_ALIASES):
        await lab.promote(1, alias=f"a{number}")
    await lab.fence()
    request = Request.of(tenant="acme", principal="ada", method="M", request_id=str(uuid.uuid4()), payload=b"")
    await lab.policies.delete(POLICY, request=request)
    shape = _shape((await _entries(lab))[0])
    assert len(shape) == MAX_ALIASES + 2
    assert shape[f"{POLICY}/lease"] == shape[f"{POLICY}/aliases/a49"] == audit_service_pb2.AUDIT_CHANGE_TYPE_DELETED


async def test_racing_writers_leave_one_entry_for_each_write(lab: Lab) -> None:
    await lab.policy()
    await asyncio.gather(*(lab.policies.update(POLICY, Policy(POLICY, owner=f"o{n}"), {"owner"}) for n in range(10)))
    entries = await _entries(lab)
    assert len(entries) == 11
    by_revision = sorted(entries, key=lambda each: each.catalog_revision)
    owners = [_unpacked(each.changes[0].after, policy_service_pb2.Policy()).owner for each in by_revision]
    befores = [_unpacked(each.changes[0].before, policy_service_pb2.Policy()).owner for each in by_revision[1:]]
    assert befores == owners[:-1]


async def test_pages_are_of_one_revision_while_entries_are_written(lab: Lab) -> None:
    await lab.base_model()
    for n in range(25):
        await lab.policies.create(
            PolicyName("acme", f"p{n:02d}"), Policy(PolicyName("acme", "x"), base_model="baseModels/tiny")
        )
    trail = AuditTrail(lab.store, lab.keys)
    seen: list[str] = []
    token = ""
    for _ in range(3):
        page = await trail.list(AuditQuery(str(TENANT), page_size=10, page_token=token))
        seen += [str(lab.keys.policy_name(entry.changes[0].key).policy) for entry in page.records]
        token = page.next_page_token
        await lab.policies.create(PolicyName("acme", f"late-{len(seen)}"), Policy(POLICY, base_model="baseModels/tiny"))
    assert token == ""
    assert seen == [f"p{n:02d}" for n in reversed(range(25))]
    first = await trail.list(AuditQuery(str(TENANT), page_size=10))
    with pytest.raises(errors.InvalidArgument):
        await trail.list(AuditQuery(str(TENANT), page_token=first.next_page_token, resource=str(POLICY)))


async def test_a_resource_selects_itself_and_what_lies_below(lab: Lab) -> None:
    await lab.policy()
    await lab.publish("one")
    await lab.promote(1)
    await lab.policies.create(PolicyName("acme", "tone-2"), Policy(POLICY, base_model="baseModels/tiny"))
    run = (await lab.run()).record

    async def number(resource: str) -> int:
        return len(await _entries(lab, resource=resource, page_size=1))

    assert await number(str(POLICY)) == 3
    assert await number("tenants/acme/policies/tone-2") == 1
    assert await number(f"{POLICY}/aliases/live") == 1
    assert await number(f"{POLICY}/revisions/1") == 1
    assert await number(f"{POLICY}/revisions/11") == 0
    assert await number(str(run.name)) == 1
    assert await number(str(TENANT)) == 5
    for bad in ("tenants/other/policies/tone", "policies/tone", f"{POLICY}/aliases", "tenants/other"):
        with pytest.raises(errors.InvalidArgument):
            await number(bad)


async def test_times_select_and_a_clock_that_is_off_loses_nothing(lab: Lab, clock: _Clock) -> None:
    await lab.policy()
    for offset_s, owner in ((1, "a"), (3600, "ahead"), (-3600, "behind"), (40 * 86_400, "later")):
        clock.time_s = NOW + offset_s
        await lab.policies.update(POLICY, Policy(POLICY, owner=owner), {"owner"})
    clock.time_s = NOW

    async def owners(**query: Any) -> list[str]:
        request: dict[str, Any] = {key: datetime.fromtimestamp(at, UTC) for key, at in query.items()}
        found = await _entries(lab, page_size=1, **request)
        return [_unpacked(each.changes[0].after, policy_service_pb2.Policy()).owner for each in found]

    assert await owners() == ["later", "ahead", "a", "", "behind"]
    assert await owners(start_time=NOW) == ["later", "ahead", "a", ""]
    assert await owners(end_time=NOW) == ["behind"]
    assert await owners(start_time=NOW + 2, end_time=NOW + 3601) == ["ahead"]
    assert await owners(start_time=NOW + 3600, end_time=NOW + 3600) == []


async def test_entries_past_their_time_are_found_and_no_others(lab: Lab, clock: _Clock) -> None:
    await lab.policy()
    for days in range(10):
        clock.time_s = NOW + days * 86_400
        await lab.policies.update(POLICY, Policy(POLICY, owner=f"day {days}"), {"owner"})
    clock.time_s += 3600
    num_keys = 0
    async for expired in retention.expired_audit_entries(lab.store, lab.keys, 5 * 86_400):
        num_keys += expired.num_keys
        await lab.store.txn([], expired.operations)
    kept = [_unpacked(each.changes[0].after, policy_service_pb2.Policy()).owner for each in await _entries(lab)]
    assert kept == [f"day {days}" for days in range(9, 3, -1)]  # five days and the one for clocks that differ
    assert num_keys == 5


async def test_request_ids_that_nobody_looks_up_are_found_and_no_others(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_s = NOW
    monkeypatch.setattr("mint_catalog.storage.requests.wall_s", lambda: time_s)
    monkeypatch.setattr("mint_catalog.trail.retention.wall_s", lambda: NOW)
    for days in range(5):
        time_s = NOW - days * 86_400
        request = Request.of(tenant="acme", principal="a", method="M", request_id=str(uuid.uuid4()), payload=b"")
        await lab.policy(PolicyName("acme", f"p{days}"), request)
    async for expired in retention.expired_request_ids(lab.store, lab.keys):
        await lab.store.txn([], expired.operations)
    prefix = lab.keys.family("requests")
    kept = (await lab.store.scan(prefix, prefix_end(prefix), limit=10)).values
    assert [int(lab.keys.parts(kv.key)[1]) - int(NOW // 86_400) for kv in kept] == [-2, -1, 0]


def test_large_values_are_left_out_and_what_happened_is_kept(lab: Lab) -> None:
    key = lab.keys.policy(POLICY)
    large = b"x" * 100_000
    changes = [(key, None, large), (key, large, b"small"), (key, b"small", None)] + [(key, b"y" * 60_000, None)] * 5
    put = audit.audit_put(lab.keys, "acme", changes=changes, principal="ada", method="M")
    entry = AuditCodec(lab.keys).decode(KeyValue(put.key, put.value, 7, 7))
    assert [change.type for change in entry.changes[:3]] == [
        AuditChangeType.CREATED,
        AuditChangeType.CHANGED,
        AuditChangeType.DELETED,
    ]
    assert [(change.before, change.after) for change in entry.changes[:3]] == [
        (None, None),
        (None, b"small"),
        (b"small", None),
    ]
    assert sum(change.before is not None for change in entry.changes[3:]) == 4
    assert (entry.principal, entry.method, entry.catalog_revision) == ("ada", "M", 7)


async def test_a_page_of_large_entries_ends_early(lab: Lab) -> None:
    key = lab.keys.policy(POLICY)
    value = lab.codecs.policy.encode(Policy(POLICY, description="d" * 50_000))
    for _ in range(60):
        put = audit.audit_put(lab.keys, "acme", changes=[(key, None, value)])
        await lab.store.txn([], [put])
    trail = AuditTrail(lab.store, lab.keys)
    page = await trail.list(AuditQuery(str(TENANT), page_size=1000))
    assert 30 < len(page.records) < 50
    rest = await trail.list(AuditQuery(str(TENANT), page_size=1000, page_token=page.next_page_token))
    assert len(page.records) + len(rest.records) == 60
    assert rest.next_page_token == ""
