"""What docs/scorers.md shows works as it stands."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mint_runs.scoring import Scored, open_scorer
from mint_runs.settings import RunsSettings
from mint_scorers import Sample, make_scorer
from support.scorer_packages import documented_console, documented_files, install_scorers

_PYTHON = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _brevity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = documented_files()
    entry_points = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]["mint.scorers"]
    install_scorers(tmp_path, monkeypatch, package="brevity", source=files["brevity.py"], entry_points=entry_points)


async def test_the_example_scores_in_a_run() -> None:
    settings = RunsSettings.model_construct(remote_scorers={})
    async with open_scorer("brevity", {"max_words": "4"}, timeout_s=20, settings=settings) as scoring:
        samples = [Sample("?", completion, {}) for completion in ("", "one two", "a b c d e")]
        assert await scoring.score(samples) == [Scored(1.0), Scored(0.5), Scored(0.0)]


def test_the_example_refuses_bad_options() -> None:
    with pytest.raises(ValueError, match="option max_words is 0: expected at least 1"):
        make_scorer("brevity", {"max_words": "0"})


def test_the_command_that_tries_it_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    command, answers = documented_console()
    monkeypatch.setenv("PATH", str(_PYTHON), prepend=":")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == answers
