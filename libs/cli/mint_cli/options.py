"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["CatalogOption", "ExporterOption", "InferenceOption", "JsonOption", "StateDirOption"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
StateDirOption = Annotated[
    Path | None,
    typer.Option("--state-dir", envvar="MINT_STATE_DIR", help="State directory of `mint up`.", show_default=".state"),
]
CatalogOption = Annotated[
    str,
    typer.Option(
        "--catalog", envvar="MINT_ENDPOINTS_CATALOG", help="host:port of the catalog.", show_default="of `mint up`"
    ),
]
InferenceOption = Annotated[
    str,
    typer.Option(
        "--inference",
        envvar="MINT_ENDPOINTS_INFERENCE",
        help="host:port of the inference service.",
        show_default="of `mint up`",
    ),
]
ExporterOption = Annotated[
    str,
    typer.Option(
        "--exporter", envvar="MINT_ENDPOINTS_EXPORTER", help="host:port of the exporter.", show_default="of `mint up`"
    ),
]
