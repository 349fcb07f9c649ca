"""The state directory: where one installation on this machine keeps its data, settings, logs and addresses.

::

    <state>/mint.toml        settings of all services, written anew by every `mint up` (mode 0600: it holds a secret)
    <state>/services.json    what runs, where, and its process ids; there while MinT is up
    <state>/ports.json       ports of this installation, the same at every start
    <state>/credentials.json the object store's credentials, made at the first start (mode 0600)
    <state>/lock             locked by the supervisor as long as it lives
    <state>/logs/NAME.log    what each process says
    <state>/data/…           etcd, object store, adapter cache
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mint_core.errors import FailedPrecondition
from mint_core.files import atomic_file

__all__ = ["Credentials", "RunningService", "Snapshot", "StateDir"]

# Below Linux's range for outgoing connections, so that no client's socket sits on a service's port at a restart.
_PORT_RANGE = range(16_000, 22_700)


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """Of the object store."""

    access_key_id: str
    secret_access_key: str


@dataclasses.dataclass(frozen=True, slots=True)
class RunningService:
    """One process of an installation."""

    name: str
    address: str
    """Where clients reach it; of a service without clients, its runtime address."""
    runtime_address: str
    health: str
    """How to ask for its health: grpc:ADDRESS or a URL."""
    pid: int | None
    """None while it is not running."""
    pid_started: float
    """When that process started, by the kernel's count: a process id alone may be somebody else's later."""
    num_restarts: int = 0
    metrics_address: str = ""
    """Where Prometheus reaches it; empty without ``mint up --metrics``, and of what is not ours."""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``services.json`` says."""

    state: str
    """starting, ready, stopping or failed."""
    error: str
    """Why it failed, "REASON: sentence"."""
    supervisor_pid: int
    base_model: str
    """Name of the base model that is resident."""
    services: tuple[RunningService, ...]

    def service(self, name: str) -> RunningService | None:
        return next((service for service in self.services if service.name == name), None)


class StateDir:
    """See the module."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def settings_path(self) -> Path:
        return self.path / "mint.toml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def create(self) -> None:
        """Make the folders, for this user only: data of all tenants lie in them."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.logs, self.data):
                folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise FailedPrecondition(
                f"the state directory {self.path} cannot be made: {error.strerror}; name another with --state-dir"
            ) from error

    # What runs

    def snapshot(self) -> Snapshot | None:
        """What ``services.json`` says, or None if there is none."""
        value = self._read_json("services.json")
        if value is None:
            return None
        services = tuple(RunningService(**service) for service in value.pop("services"))
        return Snapshot(services=services, **value)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        self._write_json("services.json", dataclasses.asdict(snapshot))

    def remove_snapshot(self) -> None:
        (self.path / "services.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one supervisor; the kernel unlocks for the dead. Raises :class:`FailedPrecondition` for a second."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FailedPrecondition(f"MinT is already up in {self.path}: `mint down` stops it") from None
            os.set_inheritable(file.fileno(), False)
            yield

    def is_supervised(self) -> bool:
        """Whether a supervisor lives."""
        try:
            with (self.path / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    # What stays

    def credentials(self) -> Credentials:
        """The object store's; made at the first call."""
        value = self._read_json("credentials.json")
        if value is None:
            value = {"access_key_id": secrets.token_hex(10), "secret_access_key": secrets.token_hex(20)}
            self._write_json("credentials.json", value)
        return Credentials(**value)

    def ports(self, names: list[str]) -> dict[str, int]:
        """A port for each name: the one it had, unless somebody else listens there now."""
        kept = self._read_json("ports.json") or {}
        ports: dict[str, int] = {}
        for name in names:
            candidates = [kept.get(name, 0), *random.sample(_PORT_RANGE, k=len(_PORT_RANGE))]
            free = (port for port in candidates if port not in ports.values() and _is_free(port))
            port = next(free, None)
            if port is None:
                raise FailedPrecondition(
                    f"no free port between {_PORT_RANGE.start} and {_PORT_RANGE.stop} on 127.0.0.1"
                )
            ports[name] = port
        self._write_json("ports.json", ports)
        return ports

    def write_settings(self, text: str) -> None:
        """Write ``mint.toml``."""
        self._write(self.settings_path, text.encode())

    # Files

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"{path} cannot be read: {error}; remove it and run `mint up` again") from error
        return value

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        self._write(self.path / name, json.dumps(value, indent=2).encode() + b"\n")

    def _write(self, path: Path, content: bytes) -> None:
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)


def _is_free(port: int) -> bool:
    if not port:
        return False
    with socket.socket() as probe:
        # As servers do it: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
