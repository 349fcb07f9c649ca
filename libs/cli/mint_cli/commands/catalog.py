"""`mint catalog`: upkeep of the catalog, for operators."""

from __future__ import annotations

import typer

from mint_cli.commands.catalog_backup import backup, restore
from mint_cli.commands.catalog_gc import gc

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The catalog's upkeep: backup, restore, garbage collection.")
app.command()(backup)
app.command()(restore)
app.command()(gc)
