"""Clients at work over two catalogs while etcd and the catalogs are killed: nothing that they were told is a lie.

``make test-history`` makes the long runs: 14 over one etcd and 6 over three members whose leader is killed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.catalog_histories import Plan, Result, run_plan

SHORT = [Plan(1, num_operations=800, num_kills=3), Plan(2, num_operations=800, num_kills=3, cluster=True)]
LONG = [Plan(seed, cluster=seed > 14) for seed in range(1, 21)]


@pytest.fixture(scope="module")
def row(report: Callable[[str], None]) -> Callable[[str], None]:
    """Add a row to the table at the end of the run."""
    report(Result.HEADER)
    return report


def _name(plan: Plan) -> str:
    return f"seed {plan.seed}, {'three' if plan.cluster else 'one'}"


async def _run(plan: Plan, folder: Path, row: Callable[[str], None]) -> Result:
    result = await run_plan(plan, folder)
    row(result.line())
    result.write(folder / "history.txt")
    assert not result.violations, "\n".join([*result.violations[:10], f"the whole history: {folder / 'history.txt'}"])
    assert result.world.num_operations >= plan.num_operations
    assert result.kills.total() == plan.num_kills
    return result


@pytest.mark.parametrize("plan", SHORT, ids=_name)
async def test_a_short_history(plan: Plan, tmp_path: Path, row: Callable[[str], None]) -> None:
    await _run(plan, tmp_path, row)


@pytest.mark.history
@pytest.mark.timeout(600)
@pytest.mark.parametrize("plan", LONG, ids=_name)
async def test_a_long_history(plan: Plan, tmp_path: Path, row: Callable[[str], None]) -> None:
    await _run(plan, tmp_path, row)
    for number in range(2):
        log = (tmp_path / f"catalog-{number}.log").read_text()
        assert "Traceback" not in log, log[-3000:]
