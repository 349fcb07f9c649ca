from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mint_core.errors import FailedPrecondition, ResourceExhausted
from mint_exporter.scratch import Scratch


async def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "0" / "room"
    left.mkdir(parents=True)
    (left / "weights").write_bytes(b"half")
    (tmp_path / "somebody's file").touch()
    async with Scratch(tmp_path, 100):
        assert not left.exists()
        assert (tmp_path / "somebody's file").exists()


async def test_two_processes_do_not_sweep_each_other(tmp_path: Path) -> None:
    async with Scratch(tmp_path, 100) as one:
        room = one.room_now(1)
        async with Scratch(tmp_path, 100) as other:
            assert room.folder.exists()
            assert other.room_now(1).folder.parent != room.folder.parent
    assert not room.folder.exists()


async def test_bytes_are_bounded(tmp_path: Path) -> None:
    async with Scratch(tmp_path, 100) as scratch:
        with pytest.raises(ResourceExhausted, match="at most 100"):
            await scratch.room(101)
        first = await scratch.room(60)
        with pytest.raises(ResourceExhausted, match="40 are free"):
            scratch.room_now(41)
        waiting = [asyncio.create_task(scratch.room(60)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in waiting)
        first.release()
        first.release()
        done, pending = await asyncio.wait(waiting, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), scratch.used_bytes) == (1, 60)
        async with done.pop().result() as folder:
            (folder / "file").write_bytes(b"x")
        assert not folder.exists()
        (await pending.pop()).release()
        assert scratch.used_bytes == 0


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="scratch_dir"):
        async with Scratch(tmp_path / "file", 100):
            raise AssertionError("never opened")
