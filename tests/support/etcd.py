"""A real etcd for tests: one member on free loopback ports, in a folder of its own, killed by its process id."""

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
from typing import IO

from mint_catalog.settings import EtcdSettings
from support.children import dying_with_parent

__all__ = ["EtcdServer", "find_etcd", "running_etcd"]


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

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._options = options
        self._client_port, self._peer_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

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
        assert self._process is None, "etcd is already running"
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            dying_with_parent(
                [
                    find_etcd(),
                    "--name=test",
                    f"--data-dir={self.folder / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=test={peer}",
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
        self._wait_ready(timeout_s)

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

    def restart(self) -> None:
        """SIGKILL and start again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the member keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after :meth:`pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def _wait_ready(self, timeout_s: float) -> None:
        assert self._process is not None
        give_up = time.monotonic() + timeout_s
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < give_up and self._process.poll() is None:
            health = f"http://{self.endpoint}/health"
            with contextlib.suppress(OSError, ValueError), opener.open(health, timeout=1.0) as answer:
                if json.load(answer)["health"] == "true":
                    return
            time.sleep(0.02)
        tail = self.log_path.read_text(errors="replace")[-2000:]
        self.kill()
        raise RuntimeError(f"etcd did not become ready within {timeout_s} s; the end of its log:\n{tail}")


@contextlib.contextmanager
def running_etcd(*options: str) -> Iterator[EtcdServer]:
    """A started member in a temporary folder; stopped and removed at the end. ``options`` go to etcd."""
    folder = Path(tempfile.mkdtemp(prefix="mint-etcd-"))
    server = EtcdServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
