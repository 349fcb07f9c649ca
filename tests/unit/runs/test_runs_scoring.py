"""Scoring goes on whatever a scorer does: it raises, hangs, dies, prints, answers nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mint_core.config import load
from mint_core.errors import FailedPrecondition, InvalidArgument, NotFound
from mint_runs.scoring import Scored, Scoring, local, open_scorer, process
from mint_runs.settings import RunsSettings
from mint_scorers import Sample
from support.scorer_packages import install_scorers

SOURCE = '''
import ctypes, fractions, os, signal, subprocess, sys, time

class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def misbehave(options):
    """Does what the completion says."""
    def score(sample):
        match sample.completion.split():
            case ["give", text]:
                return float(text)
            case ["example"]:
                return sample.example["value"] + len(sample.prompt)
            case ["nothing"]:
                return None
            case ["bool"]:
                return True
            case ["text"]:
                return "1.0"
            case ["fraction"]:
                return fractions.Fraction(1, 4)
            case ["large"]:
                return 10 ** 400
            case ["raise"]:
                raise KeyError("label\\nof\\nline")
            case ["raise", "much"]:
                raise ValueError("x" * 10_000_000)
            case ["raise", "odd"]:
                raise Odd
            case ["raise", "surrogate"]:
                raise ValueError("half a pair: \\ud800")
            case ["leave"]:
                sys.exit("enough")
            case ["exit", status]:
                os._exit(int(status))
            case ["segfault"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                while True:
                    pass
            case ["sleep", text]:
                time.sleep(float(text))
                return float(os.getpid())
            case ["print"]:
                print('{"value": 666.0}' * 300_000, flush=True)
                subprocess.run(["echo", '{"value": 666.0}'], check=True)
                os.write(1, b'{"value": 666.0}\\n')
                return float(len(sys.stdin.read()))
            case ["child"]:
                child = subprocess.Popen(["sleep", "1000"])
                return float(child.pid)
            case ["pid"]:
                return float(os.getpid())
            case ["settings"]:
                return float(sum(name.startswith("MINT_") for name in os.environ))
            case ["deep"]:
                return float(len(sample.example["text"]))
    return score

def options(options):
    return lambda sample: float(options[sample.completion])

def picky(options):
    raise ValueError(f"option level is {options.get('level')!r}: expected low or high")

def once(options):
    """Can be made once."""
    path = options["marker"]
    if os.path.exists(path):
        raise RuntimeError("the model is gone")
    open(path, "w").close()
    return misbehave(options)

def dies(options):
    print("no licence")
    os._exit(7)

def never(options):
    with open(options["marker"], "w") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(1000)
'''
FACTORIES = ("misbehave", "options", "picky", "once", "dies", "never")


@pytest.fixture(autouse=True)
def _bad_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = {name: f"misbehaving:{name}" for name in FACTORIES} | {"unloadable": "misbehaving_nowhere:make"}
    install_scorers(tmp_path / "site", monkeypatch, package="misbehaving", source=SOURCE, entry_points=entry_points)


def settings(**changes: Any) -> RunsSettings:
    return RunsSettings.model_construct(remote_scorers={}, max_message_bytes=8 * 1024 * 1024, **changes)


@contextlib.asynccontextmanager
async def opened(
    name: str = "misbehave", options: dict[str, str] | None = None, timeout_s: float = 20.0
) -> AsyncIterator[Scoring]:
    async with open_scorer(name, options or {}, timeout_s=timeout_s, settings=settings()) as scoring:
        yield scoring


def samples(*completions: str) -> list[Sample]:
    return [Sample(prompt="?", completion=completion, example={"value": 2}) for completion in completions]


async def test_rewards_come_in_order_and_see_prompt_example_and_options() -> None:
    async with opened() as scoring:
        assert await scoring.score(samples("give 1", "give -2.5", "example")) == [
            Scored(1.0),
            Scored(-2.5),
            Scored(3.0),
        ]
        assert await scoring.score([]) == []
    async with opened("options", {"a": "1", "b": "2"}) as scoring:
        assert await scoring.score(samples("b", "a")) == [Scored(2.0), Scored(1.0)]


@pytest.mark.parametrize(
    ("name", "options", "completion", "example"),
    [
        ("exact_match", {"normalize": "casefold"}, "YES", {"completion": "yes"}),
        ("json_schema", {"schema": '{"type": "object"}'}, "{}", {}),
        ("arithmetic", {}, "that is 4", {"expression": "2 + 2"}),
    ],
)
async def test_the_shipped_scorers_score(
    name: str, options: dict[str, str], completion: str, example: dict[str, Any]
) -> None:
    async with opened(name, options) as scoring:
        right, wrong = await scoring.score([Sample("?", completion, example), Sample("?", "no", example)])
        assert (right, wrong) == (Scored(1.0), Scored(0.0))


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("nothing", "the scorer returned None, not a number"),
        ("bool", "the scorer returned True, not a number"),
        ("text", "the scorer returned one of type str, not a number"),
        ("give nan", "the scorer returned nan, not a finite number"),
        ("give -inf", "the scorer returned -inf, not a finite number"),
        ("large", "the scorer raised OverflowError: int too large to convert to float"),
        ("raise", r"the scorer raised KeyError: 'label\nof\nline'"),
        ("raise odd", "the scorer raised Odd: (its text cannot be had: RuntimeError)"),
        ("raise surrogate", "the scorer raised ValueError: half a pair: ?"),
        ("leave", "the scorer raised SystemExit: enough"),
        ("exit 3", "the scorer's process ended with status 3"),
        ("exit 0", "the scorer's process ended with status 0"),
        ("segfault", "the scorer's process was killed by SIGSEGV"),
    ],
)
async def test_a_failure_costs_its_own_sample_only(completion: str, error: str) -> None:
    async with opened() as scoring:
        before, failed, after = await scoring.score(samples("give 1", completion, "fraction"))
    assert (before, after) == (Scored(1.0), Scored(0.25))
    assert failed == Scored(None, error)


async def test_an_error_is_cut_to_a_sane_length() -> None:
    async with opened() as scoring:
        (failed,) = await scoring.score(samples("raise much"))
    assert failed.value is None
    assert failed.error.startswith("the scorer raised ValueError: xxx")
    assert len(failed.error) == 300


async def test_what_a_scorer_prints_is_no_reward() -> None:
    async with opened() as scoring:
        assert await scoring.score(samples("print", "give 1")) == [Scored(0.0), Scored(1.0)]


async def test_a_scorer_that_hangs_is_killed_and_the_others_go_on() -> None:
    async with opened(timeout_s=1.0) as scoring:
        outcomes = await scoring.score(samples("give 1", "hang", "give 2", "hang", "give 3"))
    timed_out = Scored(None, "the scorer timed out after 1 s")
    assert outcomes == [Scored(1.0), timed_out, Scored(2.0), timed_out, Scored(3.0)]


async def test_a_batch_of_nothing_but_hanging_samples_ends_in_time() -> None:
    async with opened(timeout_s=0.3) as scoring:
        started_s = time.monotonic()
        outcomes = await scoring.score(samples(*["hang"] * 8))
        took_s = time.monotonic() - started_s
    assert took_s < 8 * 0.3 + 1.0
    assert all(outcome.value is None for outcome in outcomes)
    assert {outcome.error.partition(" after ")[0] for outcome in outcomes} >= {"the scorer timed out"}


async def test_deaths_without_end_cost_no_more_than_the_time_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MAX_PROCESSES", 1)
    async with opened(timeout_s=0.02) as scoring:
        started_s = time.monotonic()
        outcomes = await scoring.score(samples(*["exit 1"] * 50))
        assert time.monotonic() - started_s < 50 * 0.02 + 1.0
    assert len(outcomes) == 50
    assert outcomes[-1].error == "not scored: the 1 s for 50 samples went to time-outs and restarts"


async def test_a_scorer_that_cannot_be_made_again_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MAX_PROCESSES", 1)
    async with opened("once", {"marker": str(tmp_path / "marker")}) as scoring:
        first, second = await scoring.score(samples("exit 1", "give 1"))
    assert first.error == "the scorer's process ended with status 1"
    assert second.error.startswith("not scored: another process of the scorer could not be started: scorer 'once' is ")
    assert second.error.endswith("RuntimeError: the model is gone")


async def test_a_slow_scorer_gets_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_HELP_AFTER_S", 0.05)
    async with opened() as scoring:
        outcomes = await scoring.score(samples(*["sleep 0.5"] * 8))
        pids = {outcome.value for outcome in outcomes}
        assert 1 < len(pids) <= 4
        assert None not in pids
        # Calls at the same time do not mix up their answers.
        first, second = await asyncio.gather(
            scoring.score(samples("give 1")), scoring.score(samples("give 2", "give 3"))
        )
        assert (first, second) == ([Scored(1.0)], [Scored(2.0), Scored(3.0)])


async def test_a_scoring_that_was_cancelled_leaves_no_answer_for_the_next() -> None:
    async with opened() as scoring:
        scored = asyncio.create_task(scoring.score(samples("sleep 0.3", "hang")))
        await asyncio.sleep(0.1)
        scored.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scored
        assert await scoring.score(samples("give 1")) == [Scored(1.0)]


async def test_a_process_that_died_between_two_batches_is_replaced() -> None:
    async with opened() as scoring:
        (pid,) = await scoring.score(samples("pid"))
        assert pid.value is not None
        os.kill(int(pid.value), signal.SIGKILL)
        _wait_gone(int(pid.value))
        await asyncio.sleep(0.1)
        assert await scoring.score(samples("give 1")) == [Scored(1.0)]


async def test_nothing_is_left_behind() -> None:
    async with opened() as scoring:
        outcomes = await scoring.score(samples("pid", "child"))
    for outcome in outcomes:
        assert outcome.value is not None
        _wait_gone(int(outcome.value))


async def test_a_large_sample_reaches_the_scorer_and_one_that_is_no_json_is_an_error() -> None:
    text = "\ud800é" * 1_000_000
    async with opened() as scoring:
        large, wrong, after = await scoring.score(
            [Sample("?", "deep", {"text": text}), Sample("?", "deep", {"text": b""}), Sample("?", "give 1", {})]
        )
    assert (large, after) == (Scored(2_000_000.0), Scored(1.0))
    assert wrong.error == "the sample cannot be written as JSON: Object of type bytes is not JSON serializable"


async def test_a_scorer_does_not_see_the_settings_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_RUNS_OBJECT_STORE__SECRET_KEY", "secret")
    async with opened() as scoring:
        assert await scoring.score(samples("settings")) == [Scored(0.0)]


# Opening


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "nix",
            NotFound,
            "there is no scorer 'nix'; this worker has arithmetic, dies, exact_match, json_fields, json_schema, misb",
        ),
        ("", NotFound, "there is no scorer ''; this worker has arithmetic"),
        ("127.0.0.1:80", NotFound, "there is no scorer '127.0.0.1:80'"),
        ("misbehaving:options", NotFound, "there is no scorer 'misbehaving:options'"),
        (
            "picky",
            InvalidArgument,
            "scorer 'picky' does not take its options: option level is 'middle': expected low or",
        ),
        ("unloadable", FailedPrecondition, "misbehaving_nowhere:make of misbehaving 1.0, which cannot be loaded"),
        ("dies", FailedPrecondition, "scorer 'dies' cannot be made: its process ended with status 7"),
    ],
)
async def test_a_scorer_that_cannot_be_had_is_an_error_at_once(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        async with opened(name, {"level": "middle"}):
            pass


async def test_a_scorer_that_is_never_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_TIMEOUT_S", 1.5)
    marker = tmp_path / "marker"
    with pytest.raises(FailedPrecondition, match=r"scorer 'never' was not ready after 1.5 s"):
        async with opened("never", {"marker": str(marker)}):
            pass
    _wait_gone(int(marker.read_text()))


async def test_an_opening_that_was_cancelled_leaves_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    opening = asyncio.create_task(opened("never", {"marker": str(marker)}).__aenter__())
    pid = await asyncio.to_thread(_written_pid, marker)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    _wait_gone(pid)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_time_out_is_a_positive_number(timeout_s: float) -> None:
    with pytest.raises(InvalidArgument, match="scorer_timeout_s is ") as caught:
        async with opened(timeout_s=timeout_s):
            pass
    assert caught.value.field == "scorer_timeout_s"


def test_remote_scorers_are_set_by_file_environment_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mint.toml"
    file.write_text(
        '[runs]\nbase_model_path = "b"\ncatalog_address = "c"\ncatalog_runtime_address = "d"\ntrainer_address = "e"\n'
        'exporter_runtime_address = "f"\n[runs.remote_scorers]\njudge = "judge.internal:7000"\n'
    )
    arguments = ["--config", str(file)]
    assert load(RunsSettings, arguments, {}).remote_scorers == {"judge": "judge.internal:7000"}
    environ = {"MINT_RUNS_REMOTE_SCORERS": '{"other": "unix:/run/judge"}'}
    assert load(RunsSettings, arguments, environ).remote_scorers["other"] == "unix:/run/judge"
    arguments += ["--remote-scorers", "third=127.0.0.1:7001"]
    assert load(RunsSettings, arguments, {}).remote_scorers["third"] == "127.0.0.1:7001"


# Processes


def test_a_scorer_that_hangs_dies_with_its_worker() -> None:
    code = """
import asyncio, sys
from mint_runs.scoring import open_scorer
from mint_runs.settings import RunsSettings
from mint_scorers import Sample

async def main():
    settings = RunsSettings.model_construct(remote_scorers={}, max_message_bytes=1 << 20)
    async with open_scorer("misbehave", {}, timeout_s=1000, settings=settings) as scoring:
        (pid,) = await scoring.score([Sample("?", "pid", {})])
        print(int(pid.value), flush=True)
        await scoring.score([Sample("?", "hang", {})])

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        time.sleep(0.2)  # into the hang
        worker.kill()
    _wait_gone(pid)


def test_a_scorer_can_be_tried_by_hand() -> None:
    lines = '{"options": {}}\n{"prompt": "?", "completion": "give 1", "example": {}}\n'
    for name, answers in (("misbehave", '{"ready": true}\n{"value": 1.0}\n'), ("nix", '{"refused": "name", "error": ')):
        done = subprocess.run(
            [sys.executable, "-m", "mint_scorers", name],
            input=lines,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.startswith(answers)


def _written_pid(marker: Path) -> int:
    """Wait until a scorer has written its process id."""
    deadline_s = time.monotonic() + 10
    while not marker.exists() or not marker.read_text().endswith("\n"):
        assert time.monotonic() < deadline_s, f"nothing is written to {marker}"
        time.sleep(0.02)
    return int(marker.read_text())


def _wait_gone(pid: int) -> None:
    """Wait until there is no such process, or only what is left of it for its parent to read."""
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.02)
