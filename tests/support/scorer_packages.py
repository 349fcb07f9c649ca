"""Packages with scorers, installed by hand: a module and its metadata in a folder that Python searches."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["documented_console", "documented_files", "install_scorers", "write_scorer_package"]

_PAGE = Path(__file__).parents[2] / "docs" / "scorers.md"


def write_scorer_package(folder: Path, *, package: str, source: str, entry_points: Mapping[str, str]) -> None:
    """Write ``package`` 1.0, one module with ``source``, to ``folder``; ``entry_points`` are its scorers."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{package}.py").write_text(textwrap.dedent(source))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[mint.scorers]", *lines, ""]))


def install_scorers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, package: str, source: str, entry_points: Mapping[str, str]
) -> None:
    """:func:`write_scorer_package` where this process and its children search."""
    write_scorer_package(folder, package=package, source=source, entry_points=entry_points)
    searched = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(searched))
    monkeypatch.syspath_prepend(str(folder))


def documented_files() -> dict[str, str]:
    """The files that docs/scorers.md shows, by the name in their first line."""
    return dict(re.findall(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", _PAGE.read_text(), re.DOTALL | re.MULTILINE))


def documented_console() -> tuple[str, str]:
    """What docs/scorers.md types into a shell, and what it says is answered."""
    (text,) = re.findall(r"^```console\n(.*?)^```$", _PAGE.read_text(), re.DOTALL | re.MULTILINE)
    command, _, answers = text.removeprefix("$ ").partition("brevity\n")
    return f"{command}brevity", answers
