"""`mint model`: base models on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from mint_cli.model import DEFAULT_MODEL, fetch_model
from mint_cli.options import JsonOption
from mint_cli.output import print_json, print_pairs, progress_console

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Base models on this machine.")


@app.callback()
def _group() -> None:
    """Base models on this machine."""


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="A name, a local folder or a hub id such as org/name.")] = DEFAULT_MODEL,
    json_output: JsonOption = False,
) -> None:
    """Find or fetch a base model, once, into the cache."""
    progress = progress_console()
    local = fetch_model(model, notify=lambda text: progress.print(text))
    described = {
        "name": str(local.name),
        "folder": str(local.folder),
        "digest": local.digest.digest,
        "size_bytes": local.digest.size_bytes,
        "architecture": local.architecture,
        "fetched": local.fetched,
    }
    if json_output:
        print_json(described)
    else:
        print_pairs(described.items())
