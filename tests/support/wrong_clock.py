"""Processes whose wall clock is wrong: libfaketime, loaded before everything else."""

from __future__ import annotations

import os
from pathlib import Path

from support.catalog_rig import CatalogProcess

__all__ = ["find_libfaketime", "jumping_clock", "set_clock", "stop", "wrong_clock"]


def find_libfaketime() -> Path | None:
    """``LIBFAKETIME``, else where Debian's package puts it."""
    named = os.environ.get("LIBFAKETIME", "")
    found = [Path(named)] if named else sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return next((path for path in found if path.exists()), None)


def wrong_clock(library: Path, offset_s: int) -> dict[str, str]:
    """Environment of a process whose wall clock is off; its monotonic clocks are right."""
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{offset_s:+d}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def jumping_clock(library: Path, file: Path) -> dict[str, str]:
    """Environment of a process whose wall clock :func:`set_clock` sets while it runs; it is right at first."""
    set_clock(file, 0)
    environ = wrong_clock(library, 0) | {"FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}
    del environ["FAKETIME"]
    return environ


def set_clock(file: Path, offset_s: int) -> None:
    """Let the clock jump to be off by this much."""
    new = file.with_suffix(".new")
    new.write_text(f"{offset_s:+d}\n")
    new.replace(file)


def stop(catalog: CatalogProcess) -> None:
    """Kill a catalog under one of these environments, and remove the files that libfaketime names by its id."""
    pid = catalog.pid
    catalog.stop()
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        (Path("/dev/shm") / name).unlink(missing_ok=True)
