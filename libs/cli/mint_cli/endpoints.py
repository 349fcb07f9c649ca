"""Where the services are: what the user says, else what `mint up` wrote into the state directory."""

from __future__ import annotations

import os
from pathlib import Path

from mint_cli.state import StateDir
from mint_client import Endpoints
from mint_core.errors import FailedPrecondition

__all__ = ["find_endpoints", "state_dir"]

DEFAULT_STATE_DIR = ".state"


def state_dir(path: Path | None) -> StateDir:
    """The state directory: the option, else ``MINT_STATE_DIR``, else ``.state`` here."""
    return StateDir(path or Path(os.environ.get("MINT_STATE_DIR") or DEFAULT_STATE_DIR))


def find_endpoints(
    state: StateDir, *, catalog: str = "", inference: str = "", exporter: str = "", needed: tuple[str, ...]
) -> Endpoints:
    """Addresses of the services; those in ``needed`` must be known.

    Raises :class:`FailedPrecondition` if one is not.
    """
    given = {"catalog": catalog, "inference": inference, "exporter": exporter}
    snapshot = None if all(given[name] for name in needed) else state.snapshot()
    for name, address in given.items():
        service = snapshot.service(name) if snapshot is not None and not address else None
        if service is not None:
            given[name] = service.address
    missing = [name for name in needed if not given[name]]
    if missing:
        raise FailedPrecondition(
            f"the address of the {missing[0]} is not known: run `mint up`, name its state directory with --state-dir, "
            f"or give --{missing[0]} HOST:PORT"
        )
    return Endpoints(**given)
