"""``mint-catalog``: run the catalog until SIGTERM."""

from __future__ import annotations

from mint_catalog.app import catalog
from mint_catalog.settings import CatalogSettings
from mint_core.config import load_or_exit
from mint_core.server import run

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    settings = load_or_exit(CatalogSettings)
    run("catalog", settings, lambda: catalog(settings))


if __name__ == "__main__":
    main()
