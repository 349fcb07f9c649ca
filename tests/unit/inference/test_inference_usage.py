"""What inference counts, and how it reports it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from mint_core import calls
from mint_core.errors import Unavailable
from mint_core.names import AliasName, BaseModelName, PolicyName, RevisionName
from mint_inference import usage
from mint_inference.usage import UsageCount, UsageMeter

LIVE = AliasName("acme", "tone", "live")


class _Reports:
    """The catalog's side: the newest count of each reporter, policy and day."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, PolicyName, int], UsageCount] = {}
        self.sizes: list[int] = []
        self.principals: set[str] = set()
        self.is_away = False

    async def report(self, reporter: str, counts: Sequence[UsageCount]) -> None:
        await asyncio.sleep(0)
        if self.is_away:
            raise Unavailable("the catalog is away; retry")
        self.sizes.append(len(counts))
        self.principals.add(calls.principal())
        for count in counts:
            self.kept[reporter, count.policy, count.day_s] = count

    def sums(self) -> tuple[int, int, int]:
        kept = self.kept.values()
        return (
            sum(each.num_requests for each in kept),
            sum(each.num_prompt_tokens for each in kept),
            sum(each.num_generated_tokens for each in kept),
        )


async def test_reports_are_cumulative_and_only_of_what_changed() -> None:
    reports = _Reports()
    meter = UsageMeter(reports)
    meter.began(LIVE, 10)
    meter.generated(LIVE, 5)
    assert await meter.report()
    meter.began(RevisionName("acme", "tone", 3), 10)
    meter.generated(LIVE, 7)
    assert await meter.report()
    assert await meter.report()
    assert reports.sums() == (2, 20, 12)
    assert reports.sizes == [1, 1]
    assert reports.principals == {"inference"}


async def test_the_base_model_is_not_counted() -> None:
    reports = _Reports()
    meter = UsageMeter(reports)
    meter.began(BaseModelName("tiny"), 10)
    meter.generated(BaseModelName("tiny"), 5)
    assert await meter.report()
    assert reports.sizes == []


async def test_what_the_catalog_did_not_take_is_kept() -> None:
    reports = _Reports()
    meter = UsageMeter(reports)
    meter.began(LIVE, 10)
    reports.is_away = True
    assert not await meter.report()
    meter.began(LIVE, 10)
    reports.is_away = False
    assert await meter.report()
    assert reports.sums() == (2, 20, 0)
    assert await meter.report()  # once more: the one without an answer may have come last
    assert await meter.report()
    assert reports.sizes == [1, 1]


async def test_a_report_holds_at_most_a_thousand_counts() -> None:
    reports = _Reports()
    meter = UsageMeter(reports)
    for n in range(2500):
        meter.began(AliasName("acme", f"p{n}", "live"), 1)
    assert await meter.report()
    assert reports.sizes == [1000, 1000, 500]
    assert reports.sums() == (2500, 2500, 0)


async def test_memory_is_bounded_and_nothing_is_lost_while_the_catalog_answers() -> None:
    reports = _Reports()
    meter = UsageMeter(reports, max_policies=10)
    for n in range(100):
        meter.began(AliasName("acme", f"p{n}", "live"), 1)
        meter.began(LIVE, 1)
        if n % 3 == 0:
            assert await meter.report()
    assert await meter.report()
    assert reports.sums() == (200, 200, 0)
    assert len({reporter for reporter, _, _ in reports.kept}) > 5
    held = len(meter._ledger.counts) + (len(meter._retiring.counts) if meter._retiring else 0)
    assert held <= 20


async def test_while_the_catalog_is_away_new_policies_beyond_the_bound_are_not_counted() -> None:
    reports = _Reports()
    reports.is_away = True
    meter = UsageMeter(reports, max_policies=10)
    for n in range(50):
        meter.began(AliasName("acme", f"p{n}", "live"), 1)
        await meter.report()
    reports.is_away = False
    assert await meter.report()
    assert reports.sums() == (10, 10, 0)


async def test_a_day_that_is_over_is_dropped_once_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    time_s = 10 * 86_400.0 - 1
    monkeypatch.setattr(usage, "wall_s", lambda: time_s)
    reports = _Reports()
    meter = UsageMeter(reports)
    meter.began(LIVE, 1)
    time_s += 2
    meter.began(LIVE, 1)
    assert await meter.report()
    assert sorted(day_s for _, _, day_s in reports.kept) == [9 * 86_400, 10 * 86_400]
    assert len(meter._ledger.counts) == 1


async def test_a_cancelled_report_is_sent_again() -> None:
    reports = _Reports()
    meter = UsageMeter(reports)
    meter.began(LIVE, 1)
    running = asyncio.create_task(meter.run(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert await meter.report()
    assert reports.sums() == (1, 1, 0)
