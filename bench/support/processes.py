"""Servers under measurement, each a process of its own that cannot outlive the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mint_blobs.settings import ObjectStoreSettings
from mint_core.channel import connect
from support.children import dying_with_parent

__all__ = ["CatalogServer", "Server", "free_port"]


def free_port() -> int:
    """A loopback port that nobody listens on."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Server:
    """One child process; ``stop`` and ``start`` again keep its command and so its address."""

    def __init__(self, command: list[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.command = command
        self._log = log
        self._environ = {**os.environ, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None, f"{self.command[0]} is not running"
        return psutil.Process(self._process.pid)

    @property
    def rss_bytes(self) -> int:
        """Memory of the process and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(each.memory_info().rss for each in family)

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_parent(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
            )

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 20.0) -> None:
        """Signal the process and wait for its exit; kill it if it does not go."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal_number)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def check(self) -> None:
        """Raise with the end of its log if it has died."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{' '.join(self.command[:4])} died; the end of its log:\n{self.tail}")

    @property
    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class CatalogServer(Server):
    """A catalog over an etcd, with settings from the command line."""

    def __init__(self, etcd: str, store: ObjectStoreSettings | None, log: Path, **settings: object) -> None:
        self.public, self.runtime = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self._etcd, self._store, self._given_log = etcd, store, log
        super().__init__(self._command_line(settings), log, self._secrets())

    def _command_line(self, settings: Mapping[str, object]) -> list[str]:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        return [
            *(sys.executable, "-m", "mint_catalog", "--listen", self.public, "--runtime-listen", self.runtime),
            *("--etcd.endpoints", f'["{self._etcd}"]', *options),
        ]

    def _secrets(self) -> dict[str, str]:
        if self._store is None:
            return {}
        return {
            "MINT_CATALOG_OBJECT_STORE__ENDPOINT_URL": self._store.endpoint_url,
            "MINT_CATALOG_OBJECT_STORE__ACCESS_KEY_ID": self._store.access_key_id,
            "MINT_CATALOG_OBJECT_STORE__SECRET_ACCESS_KEY": self._store.secret_access_key.get_secret_value(),
        }

    async def ready(self, timeout_s: float = 60.0) -> float:
        """Start, wait until it says it serves, and return how long that took, in seconds."""
        begun_s = time.monotonic()
        self.start()
        async with asyncio.timeout(timeout_s):
            while True:
                self.check()
                async with connect(self.public, retry=False) as channel:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        stub = health_pb2_grpc.HealthStub(channel)
                        await stub.Check(health_pb2.HealthCheckRequest(service="mint.v1.AliasService"), timeout=1.0)
                        return time.monotonic() - begun_s
                await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def with_settings(self, **settings: object) -> AsyncIterator[None]:
        """Inside, the catalog runs anew with these settings; afterwards it is stopped."""
        self.stop()
        ordinary, self.command = self.command, self._command_line(settings)
        await self.ready()
        try:
            yield
        finally:
            self.stop()
            self.command = ordinary
