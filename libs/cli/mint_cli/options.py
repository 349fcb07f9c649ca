"""Options that many commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mint_core.errors import InvalidArgument

__all__ = [
    "CatalogOption",
    "CatalogRuntimeOption",
    "ContinueOption",
    "ExporterOption",
    "ExporterRuntimeOption",
    "InferenceOption",
    "JsonOption",
    "LearningRateOption",
    "MaxGradNormOption",
    "MaxNewTokensOption",
    "PolicyArgument",
    "PriorityOption",
    "PromoteOption",
    "RunIdOption",
    "ScorerNameOption",
    "ScorerOptionsOption",
    "ScorerTimeoutOption",
    "StateDirOption",
    "StopOption",
    "WarmupStepsOption",
    "WatchOption",
    "WeightDecayOption",
    "key_values",
]

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
CatalogRuntimeOption = Annotated[
    str,
    typer.Option(
        "--catalog-runtime",
        envvar="MINT_ENDPOINTS_CATALOG_RUNTIME",
        help="host:port of the catalog's runtime services.",
        show_default="of `mint up`",
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
ExporterRuntimeOption = Annotated[
    str,
    typer.Option(
        "--exporter-runtime",
        envvar="MINT_ENDPOINTS_EXPORTER_RUNTIME",
        help="host:port of the exporter's runtime services.",
        show_default="of `mint up`",
    ),
]
PolicyArgument = Annotated[str, typer.Argument(help="tenant/policy")]
RunIdOption = Annotated[str, typer.Option("--run-id", help="Id of the run.", show_default="chosen")]
PriorityOption = Annotated[int, typer.Option("--priority", help="Runs with a larger one are claimed first.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Wait for the end and show progress.")]
ScorerNameOption = Annotated[
    str, typer.Option("--scorer", help="Name of an installed scorer, or of a configured remote one.")
]
ScorerOptionsOption = Annotated[
    list[str] | None, typer.Option("--scorer-option", help="KEY=VALUE for the scorer; repeat it.")
]
ScorerTimeoutOption = Annotated[
    float, typer.Option("--scorer-timeout-s", min=0, help="Longest time for one score in seconds; 0 means 10.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="Text before which a completion stops; repeat it.")
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest completion in tokens.")]
LearningRateOption = Annotated[
    float, typer.Option("--learning-rate", min=0, help="Peak; 0 means the recipe's default.")
]
WarmupStepsOption = Annotated[int, typer.Option("--warmup-steps", min=0, help="Steps of linear warm-up.")]
WeightDecayOption = Annotated[float, typer.Option("--weight-decay", min=0, help="Decoupled weight decay.")]
MaxGradNormOption = Annotated[float, typer.Option("--max-grad-norm", min=0, help="Gradient clipping; 0 means none.")]
ContinueOption = Annotated[
    bool, typer.Option("--continue/--fresh", help="Start from the policy's latest training state, or anew.")
]
PromoteOption = Annotated[str, typer.Option("--promote", help="Alias to point at the published revision.")]


def key_values(texts: Sequence[str] | None, *, field: str) -> dict[str, str]:
    """What a repeated ``KEY=VALUE`` option says. Raises :class:`InvalidArgument` without ``=``, or for a key twice."""
    pairs: dict[str, str] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise InvalidArgument(f"{field} is {text!r}: expected KEY=VALUE", field=field)
        if key in pairs:
            raise InvalidArgument(f"{field} {key!r} is given twice: {pairs[key]!r} and {value!r}", field=field)
        pairs[key] = value
    return pairs
