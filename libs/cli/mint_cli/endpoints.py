"""Where the services are: what the user says, else what `mint up` wrote into the state directory."""

from __future__ import annotations

import os
from pathlib import Path

from mint_cli.state import StateDir
from mint_client import Endpoints
from mint_core.errors import FailedPrecondition

__all__ = ["find_endpoints", "find_runtime_address", "state_dir"]

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


def find_runtime_address(state: StateDir, service: str, *, given: str = "") -> str:
    """Where a service answers the installation's own processes and its operators.

    Raises :class:`FailedPrecondition` if it is not known.
    """
    running = None if given else state.snapshot()
    known = running.service(service) if running is not None else None
    address = given or (known.runtime_address if known is not None else "")
    if not address:
        raise FailedPrecondition(
            f"the runtime address of the {service} is not known: run `mint up`, name its state directory with "
            f"--state-dir, or give --{service}-runtime HOST:PORT"
        )
    return address
