"""The command line: what there is, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mint_cli.commands import (
    alias,
    audit,
    catalog,
    config,
    evaluate,
    fleet,
    generate,
    lease,
    loader,
    local,
    model,
    policy,
    replica,
    revision,
    rollout,
    tenant,
    train,
    usage,
)
from mint_cli.commands import run as run_commands
from mint_core.errors import MintError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mint",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, publish, serve and roll back LoRA policies of one resident base model.",
)
app.command()(local.up)
app.command()(local.down)
app.command()(local.status)
app.add_typer(model.app, name="model")
app.add_typer(policy.app, name="policy")
app.add_typer(train.app, name="train")
app.add_typer(run_commands.app, name="run")
app.add_typer(evaluate.app, name="eval")
app.add_typer(lease.app, name="lease")
app.add_typer(loader.app, name="loader")
app.add_typer(rollout.app, name="rollout")
app.add_typer(revision.app, name="revision")
app.add_typer(alias.app, name="alias")
app.add_typer(audit.app, name="audit")
app.command()(usage.usage)
app.add_typer(replica.app, name="replica")
app.add_typer(fleet.app, name="fleet")
app.add_typer(tenant.app, name="tenant")
app.add_typer(catalog.app, name="catalog")
app.command()(generate.generate)
app.add_typer(config.app, name="config")

_UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
"""What typer raises for a wrong command line; it has no public name."""


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(importlib.metadata.version("mint-lora"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train, publish, serve and roll back LoRA policies of one resident base model."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit status: 0, 1 for a failure, 2 for a wrong command line, 130 for Ctrl-C."""
    try:
        result = app(args=None if argv is None else list(argv), prog_name="mint", standalone_mode=False)
    except MintError as error:
        return _fail(f"{error.reason}: {error.message}", 1)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("CANCELLED: interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell, and the interpreter must not try at its end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _UsageError as error:  # type: ignore[misc]
        return _fail(f"USAGE: {error.format_message()}", 2)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """The console script."""
    # gRPC's own remarks about lost connections are no part of an error's one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger().addHandler(logging.NullHandler())
    raise SystemExit(run())
