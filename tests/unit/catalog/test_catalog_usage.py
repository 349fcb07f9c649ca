"""Usage counters: reports replace, sums add, days select and expire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from unit.catalog.catalog_lab import POLICY, TENANT, Lab

from mint_api.runtime.v1 import usage_report_service_pb2
from mint_api.v1 import usage_service_pb2
from mint_catalog.model.records import Policy
from mint_catalog.servicers.usage import UsageReportServicer, UsageServicer
from mint_catalog.storage.store import Put
from mint_catalog.trail import retention
from mint_catalog.trail.usage import UsageCount, Usages
from mint_core import errors
from mint_core.names import PolicyName

TODAY = datetime(2026, 3, 10, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    for module in ("trail.usage", "trail.retention"):
        monkeypatch.setattr(f"mint_catalog.{module}.wall_s", lambda: TODAY.timestamp() + 3600)
    return Lab()


async def _report(lab: Lab, reporter: str, *counts: UsageCount) -> None:
    await Usages(lab.store, lab.tables).report(reporter, counts)


async def _usage(lab: Lab, resource: object, **query: Any) -> usage_service_pb2.Usage:
    servicer = UsageServicer(Usages(lab.store, lab.tables))
    answer = await servicer.GetUsage(usage_service_pb2.GetUsageRequest(resource=str(resource), **query), None)
    usage: usage_service_pb2.Usage = answer.usage
    return usage


def _sums(usage: usage_service_pb2.Usage) -> tuple[int, int, int]:
    return usage.num_requests, usage.num_prompt_tokens, usage.num_generated_tokens


async def test_the_newest_report_of_a_reporter_replaces_its_older_ones(lab: Lab) -> None:
    await lab.policy()
    await _report(lab, "reporter-1", UsageCount(str(POLICY), TODAY, 1, 10, 100))
    await _report(lab, "reporter-1", UsageCount(str(POLICY), TODAY, 2, 20, 200))
    await _report(lab, "reporter-1", UsageCount(str(POLICY), TODAY, 2, 20, 200))
    await _report(lab, "reporter-2", UsageCount(str(POLICY), TODAY, 1, 1, 1))
    assert _sums(await _usage(lab, POLICY)) == (3, 21, 201)


async def test_days_select_and_the_answer_tells_which(lab: Lab) -> None:
    await lab.policy()
    for days in range(3):
        await _report(lab, "reporter-1", UsageCount(str(POLICY), TODAY - days * DAY, 10**days, 0, 0))
    whole = await _usage(lab, POLICY)
    assert whole.num_requests == 111
    assert (whole.start_time.ToDatetime(UTC), whole.end_time.ToDatetime(UTC)) == (TODAY - 2 * DAY, TODAY + DAY)
    assert (await _usage(lab, POLICY, start_time=TODAY - DAY + timedelta(hours=5))).num_requests == 11
    one = await _usage(lab, POLICY, start_time=TODAY - DAY, end_time=TODAY + timedelta(hours=5))
    assert one.num_requests == 10
    assert (one.start_time.ToDatetime(UTC), one.end_time.ToDatetime(UTC)) == (TODAY - DAY, TODAY)
    with pytest.raises(errors.InvalidArgument, match="end_time"):
        await _usage(lab, POLICY, start_time=TODAY, end_time=TODAY - DAY)


async def test_a_tenants_usage_is_the_sum_of_its_policies(lab: Lab) -> None:
    await lab.policy()
    await lab.publish("one")
    names = [PolicyName("acme", f"p{n}") for n in range(130)]
    for name in names[:3]:
        await lab.policies.create(name, Policy(name, base_model="baseModels/tiny"))
    await _report(lab, "reporter-1", *(UsageCount(str(name), TODAY, 1, 2, 3) for name in names))
    await _report(lab, "reporter-1", UsageCount("tenants/other/policies/p", TODAY, 1000, 1000, 1000))
    usage = await _usage(lab, TENANT)
    assert _sums(usage) == (130, 260, 390)
    assert (usage.num_policies, usage.num_revisions) == (4, 1)
    single = await _usage(lab, POLICY)
    assert _sums(single) == (0, 0, 0)
    assert (single.num_policies, single.num_revisions) == (1, 1)
    assert single.start_time == single.end_time


async def test_what_does_not_exist_has_no_usage(lab: Lab) -> None:
    with pytest.raises(errors.NotFound):
        await _usage(lab, POLICY)
    for bad in ("policies/x", "", "tenants/acme/runs/r"):
        with pytest.raises(errors.InvalidArgument):
            await _usage(lab, bad)


@pytest.mark.parametrize(
    ("reporter", "count"),
    [
        ("short", UsageCount(str(POLICY), TODAY, 1)),
        ("with/a/slash", UsageCount(str(POLICY), TODAY, 1)),
        ("reporter-1", UsageCount("tenants/acme", TODAY, 1)),
        ("reporter-1", UsageCount(str(POLICY), TODAY + timedelta(hours=1), 1)),
        ("reporter-1", UsageCount(str(POLICY), None, 1)),
        ("reporter-1", UsageCount(str(POLICY), TODAY, -1)),
        ("reporter-1", UsageCount(str(POLICY), TODAY, 1, 1, 2**63 - 1)),
    ],
)
async def test_a_bad_report_is_refused_whole(lab: Lab, reporter: str, count: UsageCount) -> None:
    await lab.policy()
    with pytest.raises(errors.InvalidArgument):
        await _report(lab, reporter, UsageCount(str(POLICY), TODAY, 5), count)
    assert _sums(await _usage(lab, POLICY)) == (0, 0, 0)


async def test_more_than_a_thousand_counts_are_refused(lab: Lab) -> None:
    servicer = UsageReportServicer(Usages(lab.store, lab.tables))
    request = usage_report_service_pb2.ReportUsageRequest(reporter="reporter-1")
    for _ in range(1001):
        request.counts.add(policy=str(POLICY), num_requests=1).day.FromDatetime(TODAY)
    with pytest.raises(errors.InvalidArgument, match="1001"):
        await servicer.ReportUsage(request, None)
    del request.counts[1000]
    await servicer.ReportUsage(request, None)


async def test_counts_of_a_tenant_under_erasure_are_dropped_and_no_others(lab: Lab) -> None:
    await lab.policy()
    await lab.store.txn([], [Put(lab.keys.erasing("other"), b"")])
    others = [UsageCount(f"tenants/other/policies/p{n}", TODAY, 1) for n in range(60)]
    mine = [UsageCount(f"{TENANT}/policies/p{n}", TODAY, 1) for n in range(60)]
    await _report(lab, "reporter-1", *others, *mine)
    assert (await _usage(lab, TENANT)).num_requests == 60
    assert (await _usage(lab, "tenants/other")).num_requests == 0


async def test_days_past_their_time_are_found_and_no_others(lab: Lab) -> None:
    await lab.policy()
    for days in range(8):
        await _report(lab, "reporter-1", UsageCount(str(POLICY), TODAY - days * DAY, 10**days))
    async for expired in retention.expired_usage(lab.store, lab.keys, 3 * 86_400):
        await lab.store.txn([], expired.operations)
    assert (await _usage(lab, POLICY)).num_requests == 11111
