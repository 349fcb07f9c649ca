"""A real etcd for tests: one member or three on free loopback ports, in folders of their own, killed by process id."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mint_catalog.settings import EtcdSettings
from support.children import dying_with_parent

__all__ = ["EtcdCluster", "EtcdServer", "find_etcd", "running_etcd", "running_etcd_cluster"]

_MEMORY = Path("/dev/shm")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_etcd() -> str:
    """``ETCD_BIN``, else the ``etcd`` on PATH, else Debian's."""
    found = os.environ.get("ETCD_BIN") or shutil.which("etcd") or "/usr/bin/etcd"
    if not Path(found).exists():
        raise RuntimeError("no 'etcd' found: install etcd-server or set ETCD_BIN")
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class EtcdServer:
    """One member; ``kill`` and ``start`` again keep its ports and its data."""

    def __init__(self, folder: Path, *options: str, name: str = "test") -> None:
        self.folder = folder
        self.name = name
        self.cluster: str | None = None
        """All members as ``name=peer address`` joined by commas; None for this one alone."""
        self._options = options
        self._client_port, self._peer_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

    @property
    def endpoints(self) -> list[str]:
        return [self.endpoint]

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self._peer_port}"

    @property
    def log_path(self) -> Path:
        return self.folder / "etcd.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd is not running"
        return self._process.pid

    def settings(self, **changes: object) -> EtcdSettings:
        """Settings of a client of this member."""
        return EtcdSettings.model_validate({"endpoints": [self.endpoint], **changes})

    def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait until it has a leader."""
        self.spawn()
        self.wait_ready(timeout_s)

    def spawn(self) -> None:
        """Start, and wait for nothing."""
        assert self._process is None, "etcd is already running"
        client, peer = f"http://{self.endpoint}", self.peer_url
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            dying_with_parent(
                [
                    find_etcd(),
                    f"--name={self.name}",
                    f"--data-dir={self.folder / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster={self.cluster or f'{self.name}={peer}'}",
                    "--logger=zap",
                    "--log-level=warn",
                    *self._options,
                ]
            ),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
        )

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 15.0) -> None:
        """Signal the member and wait for its exit."""
        if self._process is None:
            return
        self._process.send_signal(signal_number)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def kill(self) -> None:
        """SIGKILL, and wait for the exit."""
        self.stop(signal.SIGKILL)

    def restart(self, timeout_s: float = 30.0) -> None:
        """SIGKILL and start again."""
        self.kill()
        self.start(timeout_s)

    def pause(self) -> None:
        """SIGSTOP: the member keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after :meth:`pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def status(self) -> dict[str, Any]:
        """Its answer to Maintenance.Status. Raises OSError while it does not answer."""
        request = urllib.request.Request(f"http://{self.endpoint}/v3/maintenance/status", data=b"{}")
        with _OPENER.open(request, timeout=1.0) as answer:
            status: dict[str, Any] = json.load(answer)
            return status

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until it has a leader."""
        assert self._process is not None
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up and self._process.poll() is None:
            health = f"http://{self.endpoint}/health"
            with contextlib.suppress(OSError, ValueError), _OPENER.open(health, timeout=1.0) as answer:
                if json.load(answer)["health"] == "true":
                    return
            time.sleep(0.02)
        tail = self.log_path.read_text(errors="replace")[-2000:]
        self.kill()
        raise RuntimeError(f"etcd did not become ready within {timeout_s} s; the end of its log:\n{tail}")


class EtcdCluster:
    """Several members; those that are alive serve as long as they are more than half."""

    def __init__(self, folder: Path, *options: str, num_members: int = 3) -> None:
        self.members = [EtcdServer(folder / f"m{each}", *options, name=f"m{each}") for each in range(num_members)]
        for member in self.members:
            member.folder.mkdir()
            member.cluster = ",".join(f"{each.name}={each.peer_url}" for each in self.members)

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def settings(self, **changes: object) -> EtcdSettings:
        """Settings of a client of all members."""
        return EtcdSettings.model_validate({"endpoints": self.endpoints, **changes})

    def start(self) -> None:
        """Start all members and wait until they have a leader."""
        for member in self.members:
            member.spawn()
        for member in self.members:
            member.wait_ready()

    def kill(self) -> None:
        """SIGKILL all members."""
        for member in self.members:
            member.kill()

    def leader(self) -> EtcdServer:
        """The member that leads now."""
        give_up = time.monotonic() + 15
        while time.monotonic() < give_up:
            for member in self.members:
                with contextlib.suppress(OSError, KeyError):
                    status = member.status()
                    if status["leader"] == status["header"]["member_id"]:
                        return member
            time.sleep(0.05)
        raise RuntimeError("etcd has had no leader for 15 s")


@contextlib.contextmanager
def _folder(in_memory: bool) -> Iterator[Path]:
    where = _MEMORY if in_memory and _MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="mint-etcd-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_etcd(*options: str, in_memory: bool = False) -> Iterator[EtcdServer]:
    """A started member in a temporary folder; stopped and removed at the end. ``options`` go to etcd.

    ``in_memory`` keeps its files off the disk: a killed process loses nothing there either, and syncing costs nothing.
    """
    with _folder(in_memory) as folder:
        server = EtcdServer(folder, *options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def running_etcd_cluster(*options: str, in_memory: bool = False) -> Iterator[EtcdCluster]:
    """As :func:`running_etcd`, with three members."""
    with _folder(in_memory) as folder:
        cluster = EtcdCluster(folder, *options)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill()
