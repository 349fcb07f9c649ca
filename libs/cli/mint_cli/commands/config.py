"""`mint config`: the settings in effect."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Any

import typer

from mint_cli.endpoints import state_dir
from mint_cli.installation import SERVICES
from mint_cli.options import JsonOption, StateDirOption
from mint_cli.output import flatten, print_json, print_pairs
from mint_core.errors import FailedPrecondition

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Settings.")

_MASK = "**********"
_SECRET_WORDS = ("secret", "password", "token")


@app.callback()
def _group() -> None:
    """Settings."""


@app.command()
def show(state_path: StateDirOption = None, json_output: JsonOption = False) -> None:
    """Show what the services are told by file and environment; secrets are masked, defaults left out."""
    state = state_dir(state_path)
    try:
        settings = tomllib.loads(state.settings_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FailedPrecondition(f"{state.settings_path} does not exist: `mint up` writes it") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise FailedPrecondition(f"{state.settings_path} cannot be read: {error}") from error
    _overlay(settings, os.environ)
    masked = _masked(settings)
    if json_output:
        print_json(masked)
    else:
        print_pairs(flatten(masked))


def _overlay(settings: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put the environment's settings over the file's, as the services do."""
    for name, value in sorted(environ.items()):
        for section in SERVICES:
            prefix = f"MINT_{section.upper()}_"
            if name.upper().startswith(prefix):
                *tables, key = name[len(prefix) :].lower().split("__")
                table = settings.setdefault(section, {})
                for part in tables:
                    table = table.setdefault(part, {})
                table[key] = value


def _masked(table: Mapping[str, Any]) -> dict[str, Any]:
    masked: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            masked[key] = _masked(value)
        else:
            masked[key] = _MASK if value and any(word in key for word in _SECRET_WORDS) else value
    return masked
