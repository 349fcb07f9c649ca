"""Calls MLflow's registry by ``MlflowClient``; run by the interpreter of MLflow's environment, without our packages.

``mlflow_child.py URI``: each line on standard input is a JSON object ``{"call", "arguments", "num_callers"}``, with one
list of arguments for each call to make; each is answered by a line ``{"taken": seconds of each call, "seconds": whole
time}`` or ``{"error"}``. Its first line says that MLflow is imported, which no figure holds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from mlflow import MlflowClient


def create(client: Any, name: str, num_versions: int) -> None:
    client.create_registered_model(name)
    for number in range(num_versions):
        client.create_model_version(name, f"s3://models/{name}/{number}")


def set_alias(client: Any, name: str, version: int) -> None:
    client.set_registered_model_alias(name, "live", str(version))


def resolve(client: Any, name: str) -> None:
    if not client.get_model_version_by_alias(name, "live").source:
        raise RuntimeError(f"{name} was resolved to nothing")


CALLS = {"create": create, "set_alias": set_alias, "resolve": resolve}


def drive(clients: list[Any], call: Any, arguments: list[list[Any]]) -> dict[str, Any]:
    taken: list[float] = []
    failures: list[Exception] = []
    waiting = iter(arguments)
    lock = threading.Lock()

    def work(client: Any) -> None:
        while not failures:
            with lock:
                wanted = next(waiting, None)
            if wanted is None:
                return
            begun = time.perf_counter()
            try:
                call(client, *wanted)
            except Exception as error:  # noqa: BLE001 - handed on below, to the process that asked
                failures.append(error)
                return
            taken.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        return {"error": repr(failures[0])}
    return {"taken": taken, "seconds": time.perf_counter() - begun}


def main() -> None:
    clients: list[Any] = []
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        while len(clients) < wanted["num_callers"]:
            clients.append(MlflowClient(tracking_uri=sys.argv[1]))
        answer = drive(clients[: wanted["num_callers"]], CALLS[wanted["call"]], wanted["arguments"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
