"""The local halves of transfers: whole files or none, and threads that outlive nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from mint_core.files import TEMP_SUFFIX, atomic_file, sweep_temp_files
from mint_core.threads import run_to_end


def test_file_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_file(target) as file:
        file.write(b"whole")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"whole"

    def break_off() -> None:
        with atomic_file(target) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert target.read_bytes() == b"whole"
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


def test_sweep_takes_only_unfinished_files(tmp_path: Path) -> None:
    (tmp_path / "keep").touch()
    (tmp_path / f".blob.0123{TEMP_SUFFIX}").touch()
    (tmp_path / f".folder.0123{TEMP_SUFFIX}").mkdir()
    (tmp_path / f".folder.0123{TEMP_SUFFIX}" / "inside").touch()
    assert sweep_temp_files(tmp_path) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["keep"]


async def test_cancelled_caller_waits_for_its_thread() -> None:
    entered, finished = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        time.sleep(0.05)
        finished.set()
        raise ValueError("nobody is left to see this")

    task = asyncio.create_task(run_to_end(work))
    await asyncio.to_thread(entered.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()
    with pytest.raises(ValueError, match="nobody"):
        await run_to_end(work)
