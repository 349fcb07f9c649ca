"""MLflow's model registry on its SQL store behind its own server, as a competitor of the catalog.

It runs in a virtual environment of its own, made once under the user's cache directory, with SQLite (the default of its
server) on the same disk. It is called by plain REST: that is less work for the client than MLflow's own Python client,
which validates and wraps every answer. Each call has a connection of its own: on kept-alive ones the answers of its
server's workers wait 40 ms for a delayed acknowledgement, which a new connection does not.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.support.processes import Server, free_port

__all__ = ["VERSION", "MlflowServer", "drive", "prepare"]

VERSION = "3.17.2"
_API = "/api/2.0/mlflow"


def prepare() -> Path:
    """The interpreter of MLflow's environment, which is made if it is not there; needs PyPI the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    venv = cache / "mint" / "bench" / f"mlflow-{VERSION}"
    python = venv / "bin" / "python"
    done = venv / ".complete"
    if not done.exists():
        print(f"  installing mlflow {VERSION} into {venv} (once; some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", f"mlflow=={VERSION}"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        done.touch()
    return python


class MlflowServer(Server):
    """``mlflow server`` with its data in a folder."""

    def __init__(self, folder: Path, *, num_workers: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        command = [
            *(str(prepare()), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--default-artifact-root", str(folder / "artifacts"), "--no-serve-artifacts"),
            *("--workers", str(num_workers)),
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONWARNINGS": "ignore"}
        super().__init__(command, folder / "mlflow.log", quiet)

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            self.check()
            try:
                if Caller(self.port).request("GET", "/health", None, raw=True):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"mlflow was not ready within {timeout_s:g} s; the end of its log:\n{self.tail}")


class Caller:
    """Makes calls one after the other."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def request(self, method: str, path: str, body: Any, *, raw: bool = False) -> Any:
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
        answer = self._connection.getresponse()
        content = answer.read()
        self._connection.close()
        if answer.status != 200:
            raise RuntimeError(f"mlflow answered {answer.status} to {path}: {content[:300]!r}")
        return content if raw else json.loads(content)

    def create(self, name: str, *, num_versions: int = 1) -> None:
        """A registered model with its versions."""
        self.request("POST", f"{_API}/registered-models/create", {"name": name})
        for number in range(num_versions):
            version = {"name": name, "source": f"s3://models/{name}/{number}"}
            self.request("POST", f"{_API}/model-versions/create", version)

    def set_alias(self, name: str, version: int) -> None:
        body = {"name": name, "alias": "live", "version": str(version)}
        self.request("POST", f"{_API}/registered-models/alias", body)

    def resolve(self, name: str) -> str:
        """The version and its source that the alias names."""
        query = urllib.parse.urlencode({"name": name, "alias": "live"})
        return str(self.request("GET", f"{_API}/registered-models/alias?{query}", None)["model_version"]["source"])


def drive(port: int, call: Callable[[Caller, int], object], *, num_callers: int, num_calls: int) -> list[float]:
    """Seconds that each of some calls took, made by so many callers at a time; the last entry is the whole time."""
    taken: list[float] = []
    failures: list[BaseException] = []
    numbers = iter(range(num_calls))
    lock = threading.Lock()

    def work() -> None:
        caller = Caller(port)
        while not failures:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            begun = time.perf_counter()
            try:
                call(caller, number)
            except Exception as error:  # noqa: BLE001 - handed on below, from the thread of whoever asked
                failures.append(error)
                return
            taken.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=work) for _ in range(num_callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [*taken, time.perf_counter() - begun]
