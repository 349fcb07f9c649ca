"""``mint-exporter``: the exporter's process."""

from __future__ import annotations

from functools import partial

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_exporter.app import exporter
from mint_exporter.settings import ExporterSettings

__all__ = ["main"]


def main() -> None:
    """Serve exports and blobs until SIGTERM."""
    settings = load_or_exit(ExporterSettings)
    run("exporter", settings, partial(exporter, settings))


if __name__ == "__main__":
    main()
