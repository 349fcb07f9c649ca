"""Remote scorers, real ones behind gRPC in processes of their own: the one of the documentation, and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_runs.scoring import Scored, Scoring, open_scorer
from mint_runs.settings import RunsSettings
from mint_scorers import Sample
from support import misbehaving_scorer_server
from support.children import dying_with_parent
from support.scorer_packages import documented_files


@contextlib.contextmanager
def serving(script: Path, listen: str = "127.0.0.1:0") -> Iterator[str]:
    """Run a server's script; gives its address."""
    command = dying_with_parent([sys.executable, str(script), listen])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


@pytest.fixture(scope="module")
def misbehaving() -> Iterator[str]:
    with serving(Path(misbehaving_scorer_server.__file__)) as address:
        yield address


@contextlib.asynccontextmanager
async def opened(
    address: str, behave: str = "", *, timeout_s: float = 10.0, name: str = "judge"
) -> AsyncIterator[Scoring]:
    settings = RunsSettings.model_construct(remote_scorers={name: address}, max_message_bytes=8 * 1024 * 1024)
    async with open_scorer(name, {"behave": behave}, timeout_s=timeout_s, settings=settings) as scoring:
        yield scoring


def samples(*completions: str, **example: Any) -> list[Sample]:
    return [Sample(prompt="?", completion=completion, example=example) for completion in completions]


async def test_the_documented_server_scores(tmp_path: Path) -> None:
    script = tmp_path / "judge.py"
    script.write_text(documented_files()["judge.py"])
    with serving(script) as address:
        async with opened(address) as scoring:
            outcomes = await scoring.score([*samples("a b c", "a c", word="b"), *samples("a b c")])
            assert await scoring.score([]) == []
    assert outcomes == [Scored(1.0), Scored(0.0), Scored(None, "the example has no field 'word'")]


async def test_a_configured_name_wins_over_an_installed_one(misbehaving: str) -> None:
    async with opened(misbehaving, name="exact_match") as scoring:
        assert await scoring.score(samples("x", "y")) == [Scored(2.0), Scored(2.0)]


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        ("short", "remote scorer 'judge' answered 2 scores for 3 samples: it must answer one for each, in order"),
        ("long", "remote scorer 'judge' answered 4 scores for 3 samples: it must answer one for each, in order"),
        (
            "refuse",
            "remote scorer 'judge' refused 3 samples: INVALID_FIELD: option behave is 'refuse': not again",
        ),
        (
            "bug",
            "remote scorer 'judge' refused 3 samples: INTERNAL: Exception calling application: a bug in the judge",
        ),
    ],
)
async def test_a_failed_call_costs_its_samples_their_rewards(misbehaving: str, behave: str, error: str) -> None:
    async with opened(misbehaving, behave) as scoring:
        assert await scoring.score(samples("a", "b", "c")) == [Scored(None, error)] * 3


async def test_every_score_is_looked_at(misbehaving: str) -> None:
    async with opened(misbehaving, "strange") as scoring:
        outcomes = await scoring.score(samples("a", "b", "c"))
        assert [outcome.error for outcome in outcomes] == [
            "remote scorer 'judge' answered nan, not a finite number",
            "remote scorer 'judge' answered inf, not a finite number",
            "",
        ]
        assert outcomes[2] == Scored(1.0)
    async with opened(misbehaving, "errors") as scoring:
        assert await scoring.score(samples("this")) == [Scored(None, "cannot judge this")]
        (cut,) = await scoring.score(samples("x" * 10_000))
        assert len(cut.error) == 300


async def test_a_call_has_a_time_limit(misbehaving: str) -> None:
    async with opened(misbehaving, "hang", timeout_s=0.2) as scoring:
        started_s = time.monotonic()
        outcomes = await scoring.score(samples("a", "b", "c"))
        assert time.monotonic() - started_s < 0.6 + 1.0
    assert outcomes == [Scored(None, "remote scorer 'judge' timed out after 0.6 s for 3 samples")] * 3


async def test_many_and_large_samples_go_in_several_calls(misbehaving: str) -> None:
    async with opened(misbehaving) as scoring:
        outcomes = await scoring.score(samples(*["x"] * 150))
        assert [outcome.value for outcome in outcomes] == [64.0] * 128 + [22.0] * 22
        large = "x" * 600_000
        outcomes = await scoring.score(samples("x", large, large, "x"))
        assert [outcome.value for outcome in outcomes] == [2.0, 2.0, 2.0, 2.0]
        # More than the server takes, and more than the channel sends: errors of these samples only.
        outcomes = await scoring.score(samples("x", "x" * 5_000_000, "x" * 9_000_000, "x"))
        assert [outcome.value for outcome in outcomes] == [1.0, None, None, 1.0]
        assert "LIMIT_EXCEEDED" in outcomes[1].error
        assert "LIMIT_EXCEEDED" in outcomes[2].error


async def test_what_cannot_be_sent_costs_its_own_sample_only(misbehaving: str) -> None:
    async with opened(misbehaving) as scoring:
        strange = [*samples("half \ud800"), *samples("x", number=float("nan")), *samples("x", bytes=b"")]
        outcomes = await scoring.score([*strange, *samples("x")])
    assert outcomes[3] == Scored(1.0)
    for outcome in outcomes[:3]:
        assert outcome.error.startswith("the sample cannot be sent: ")


async def test_a_scorer_that_stays_away_is_waited_for_and_tells_no_address(misbehaving: str, tmp_path: Path) -> None:
    not_available = [Scored(None, "remote scorer 'judge' is not available")] * 2
    async with opened(misbehaving, "away", timeout_s=1.0) as scoring:
        assert await scoring.score(samples("a", "b")) == not_available
    async with opened(f"unix:{tmp_path}/nobody", timeout_s=1.0) as scoring:
        assert await scoring.score(samples("a", "b")) == not_available


async def test_a_scorer_that_comes_back_in_time_scores(misbehaving: str, tmp_path: Path) -> None:
    async with opened(misbehaving, "late", timeout_s=30.0) as scoring:
        assert await scoring.score(samples("a")) == [Scored(1.0)]
    socket = f"unix:{tmp_path}/judge"
    async with opened(socket, timeout_s=30.0) as scoring:
        scored = asyncio.create_task(scoring.score(samples("a", "b")))
        await asyncio.sleep(1.0)
        assert not scored.done()
        with serving(Path(misbehaving_scorer_server.__file__), socket):
            assert await scored == [Scored(2.0), Scored(2.0)]
