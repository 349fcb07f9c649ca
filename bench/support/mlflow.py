"""MLflow's model registry on its SQL store behind its own server, as a competitor of the catalog.

It runs in a virtual environment of its own, made once under the user's cache directory, with SQLite (the default of its
server) on the same disk. It is called in two ways: by its own Python client, as its users call it, and by plain REST,
which is the least that a call can cost. By REST each call has a connection of its own: on kept-alive ones, as its
client has them, the answers of its server's workers may wait 40 ms for a delayed acknowledgement.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from bench.support.processes import Server, free_port
from support.children import dying_with_parent

__all__ = ["VERSION", "Arguments", "Caller", "ClientDriver", "MlflowServer", "RestDriver", "Taken", "prepare"]

VERSION = "3.17.2"
_API = "/api/2.0/mlflow"
_QUIET: Final = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONWARNINGS": "ignore"}

Arguments: TypeAlias = Sequence[Sequence[Any]]
"""Of each call to make."""


@dataclass(frozen=True, slots=True)
class Taken:
    """How long some calls took."""

    each_s: list[float]
    seconds: float
    """From the first one's begin to the last one's end."""


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
        super().__init__(command, folder / "mlflow.log", _QUIET)

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

    def create(self, name: str, num_versions: int) -> None:
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


class RestDriver:
    """Calls by plain REST, from threads of this process."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(self, call: str, arguments: Arguments, num_callers: int) -> Taken:
        """Make a call with each of these arguments, by so many callers at a time."""
        taken: list[float] = []
        failures: list[BaseException] = []
        waiting = iter(arguments)
        lock = threading.Lock()

        def work() -> None:
            method = getattr(Caller(self._port), call)
            while not failures:
                with lock:
                    wanted = next(waiting, None)
                if wanted is None:
                    return
                begun = time.perf_counter()
                try:
                    method(*wanted)
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
        return Taken(taken, time.perf_counter() - begun)


class ClientDriver:
    """Calls by ``MlflowClient``, from threads of a process of its own; each caller has a client.

    What the client does by itself is left as it is: its connections, its retries, its checks.
    """

    def __init__(self, port: int, log: Path) -> None:
        child = Path(__file__).with_name("mlflow_child.py")  # -P: beside it lies a module with MLflow's own name
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                dying_with_parent([str(prepare()), "-P", str(child), f"http://127.0.0.1:{port}"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Without what finds our packages: they are not for that interpreter.
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _QUIET,
            )
        self._log = log

    def wait_ready(self) -> None:
        """Returns when MLflow is imported there."""
        self._read()

    def __call__(self, call: str, arguments: Arguments, num_callers: int) -> Taken:
        """Make a call with each of these arguments, by so many callers at a time."""
        wanted = {"call": call, "arguments": arguments, "num_callers": num_callers}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read()
        return Taken(answer["taken"], answer["seconds"])

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it died"}
        if "error" in answer:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"mlflow's client failed: {answer['error']}; the end of its log:\n{tail}")
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
