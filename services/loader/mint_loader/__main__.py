"""``mint-loader``: brings adapters to the engine of this node."""

from __future__ import annotations

import uvloop

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_loader.app import loader
from mint_loader.settings import LoaderSettings

__all__ = ["main"]


def main() -> None:
    settings = load_or_exit(LoaderSettings)
    run("loader", settings, lambda: loader(settings), loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    main()
