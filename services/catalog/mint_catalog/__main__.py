"""``mint-catalog``: run the catalog until SIGTERM."""

from __future__ import annotations

import uvloop

from mint_catalog.app import catalog
from mint_catalog.settings import CatalogSettings
from mint_core.config import load_or_exit
from mint_core.server import run

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    settings = load_or_exit(CatalogSettings)
    # The catalog's calls are short, and half of a short call's time is the event loop's.
    run("catalog", settings, lambda: catalog(settings), loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    main()
