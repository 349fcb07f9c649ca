"""The runs worker's process."""

from __future__ import annotations

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_runs.app import runs
from mint_runs.settings import RunsSettings

__all__ = ["main"]


def main() -> None:
    settings = load_or_exit(RunsSettings)
    run("runs", settings, lambda: runs(settings))


if __name__ == "__main__":
    main()
