"""Which tests may run beside which, and what tests measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from xdist.scheduler import LoadScopeScheduling

_LINES = pytest.StashKey[list[str]]()
_OUTPUT: Final = "measured"
_ENGINES: Final = ("from support.stack ", "from support.sglang_rig ")
"""In the text of a module that starts SGLang."""


class _OneEngineAtATime(LoadScopeScheduling):
    """A module's tests share its servers and stay in one worker. Modules that start SGLang all go to one: they share
    engines too, and SGLang gives up where the machine's free memory changes much while it starts."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(self.config.rootpath, nodeid.partition("::")[0])


@functools.cache
def _scope(root: Path, module: str) -> str:
    text = (root / module).read_text()
    return "engine" if any(each in text for each in _ENGINES) else module


# --dist loadgroup would do, but groups nothing under pytest 9.2 (github.com/pytest-dev/pytest-xdist/issues/1386).
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _OneEngineAtATime(config, log)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Add a line to what is shown at the end of a run's output, also when output is captured."""
    return pytestconfig.stash.setdefault(_LINES, []).append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its lines on."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT] = session.config.stash.get(_LINES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The run takes them; a worker that died has none."""
    lines = getattr(node, "workeroutput", {}).get(_OUTPUT, [])
    node.config.stash.setdefault(_LINES, []).extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_LINES, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
