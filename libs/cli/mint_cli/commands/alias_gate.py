"""`mint alias gate`: what evaluations must show before an alias may point at a revision."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import alias_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption, key_values
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import alias_name, short
from mint_client import MintClient
from mint_core.errors import InvalidArgument

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Gates: what evaluations must show before an alias may move.")

ReasonOption = Annotated[str, typer.Option(help="Why, kept in the audit trail.")]
EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the alias still has it.")]

_TEXTS = {"scorer": "scorer", "metric": "metric", "data": "data_digest"}
_FIGURES = {"min": "min_value", "max_regression": "max_regression"}
_KEYS = (*_TEXTS, *_FIGURES, "min_examples")


@app.command("set")
def set_gate(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    condition: Annotated[
        list[str],
        typer.Option(
            help="scorer=NAME,metric=NAME and any of min=FIGURE, max_regression=FIGURE (below the active revision), "
            "min_examples=NUMBER and data=DIGEST; repeat it."
        ),
    ],
    reason: ReasonOption = "",
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Set the conditions; all of them must hold."""
    name = str(alias_name(alias))
    gate = alias_service_pb2.Gate(conditions=map(_condition, condition))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.set_gate(name, gate, reason=reason, etag=etag)

    _print(asyncio.run(call()), json_output)


@app.command()
def show(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the conditions."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.get(name)

    _print(asyncio.run(call()), json_output)


@app.command()
def clear(
    alias: Annotated[str, typer.Argument(help="tenant/policy@alias; without @ it is live.")],
    reason: ReasonOption = "",
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let every READY revision pass again."""
    name = str(alias_name(alias))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> alias_service_pb2.Alias:
        async with MintClient(endpoints) as client:
            return await client.aliases.set_gate(name, None, reason=reason, etag=etag)

    _print(asyncio.run(call()), json_output)


def _condition(text: str) -> alias_service_pb2.GateCondition:
    """A condition out of ``KEY=VALUE,…``. Raises :class:`InvalidArgument`."""
    pairs = key_values(text.split(","), field="condition")
    unknown = [key for key in pairs if key not in _KEYS]
    if unknown:
        raise InvalidArgument(f"condition has {unknown[0]!r}: expected some of {', '.join(_KEYS)}", field="condition")
    found = alias_service_pb2.GateCondition()
    for key, value in pairs.items():
        try:
            if key in _TEXTS:
                setattr(found, _TEXTS[key], value)
            elif key in _FIGURES:
                setattr(found, _FIGURES[key], float(value))
            else:
                found.min_examples = int(value)
        except ValueError:
            raise InvalidArgument(f"condition {key} is {value!r}: expected a number", field="condition") from None
    return found


def _print(alias: alias_service_pb2.Alias, json_output: bool) -> None:
    if json_output:
        print_json(to_plain(alias.gate))
    elif alias.HasField("gate"):
        print_table(
            ("SCORER", "METRIC", "AT LEAST", "MAX REGRESSION", "EXAMPLES", "DATA"),
            [
                (
                    each.scorer,
                    each.metric,
                    each.min_value if each.HasField("min_value") else "",
                    each.max_regression if each.HasField("max_regression") else "",
                    each.min_examples or "",
                    each.data_digest,
                )
                for each in alias.gate.conditions
            ],
        )
    else:
        print(f"{short(alias.name)} has no gate")
