"""A second engine replica with a loader of its own, beside an installation that has one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mint_api.v1 import engine_replica_service_pb2 as pb
from mint_client.engines import EngineClient
from support.children import dying_with_parent
from support.stack import Stack

__all__ = ["LOCAL", "SECOND", "SecondReplica", "running_second_replica", "wait_registered"]

LOCAL = "engineReplicas/local"
SECOND = "engineReplicas/second"

SMALL = {
    "MINT_ENGINE_SGLANG__NUM_SLOTS": "3",
    "MINT_ENGINE_SGLANG__MAX_LOADED_ADAPTERS": "3",
    "MINT_ENGINE_SGLANG__MAX_RUNNING_REQUESTS": "8",
    "MINT_ENGINE_SGLANG__MAX_TOTAL_TOKENS": "4096",
    # SGLang compares the machine's free memory before and after it loaded the weights, whoever took it meanwhile.
    "MINT_ENGINE_SGLANG__MEM_FRACTION_STATIC": "0.6",
}
"""Room for three adapters and eight requests: little load is much for it."""


@dataclass(frozen=True)
class SecondReplica:
    """Its two processes."""

    engine: subprocess.Popen[bytes]
    loader: subprocess.Popen[bytes]
    address: str

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[EngineClient]:
        async with EngineClient(self.address) as client:
            yield client

    def send(self, number: int) -> None:
        """Send the engine a signal."""
        self.engine.send_signal(number)


@contextlib.contextmanager
def running_second_replica(stack: Stack, work: Path, *, lease_ttl_s: float = 3.0) -> Iterator[SecondReplica]:
    """Start a small replica and wait until it is registered; at the end wait until it is not."""
    ports = iter(_free_ports(6))
    listen = {
        room: {kind: f"127.0.0.1:{next(ports)}" for kind in ("LISTEN", "RUNTIME_LISTEN", "TELEMETRY__METRICS_LISTEN")}
        for room in ("engine", "loader")
    }
    adapters = str(work / "adapters")
    environ = dict(SMALL) | {
        f"MINT_{room.upper()}_{kind}": address for room, each in listen.items() for kind, address in each.items()
    }
    environ |= {
        "MINT_ENGINE_ENGINE_REPLICA": SECOND,
        "MINT_ENGINE_ADAPTER_DIR": adapters,
        "MINT_ENGINE_LOADER_ADDRESS": listen["loader"]["RUNTIME_LISTEN"],
        "MINT_ENGINE_LEASE_TTL_S": str(lease_ttl_s),
        "MINT_LOADER_ENGINE_ADDRESS": listen["engine"]["RUNTIME_LISTEN"],
        "MINT_LOADER_CACHE_DIR": adapters,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with contextlib.ExitStack() as running:
        processes = {room: running.enter_context(_process(stack, room, environ)) for room in ("engine", "loader")}
        asyncio.run(wait_registered(stack, [LOCAL, SECOND], timeout_s=200, alive=list(processes.values())))
        yield SecondReplica(processes["engine"], processes["loader"], listen["engine"]["RUNTIME_LISTEN"])
        for process in processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed
            for process in processes.values():
                process.wait(30)
    asyncio.run(wait_registered(stack, [LOCAL]))


async def wait_registered(
    stack: Stack, names: Sequence[str], *, timeout_s: float = 30, alive: Sequence[subprocess.Popen[bytes]] = ()
) -> None:
    """Wait until exactly these replicas are registered, and ready; ``alive`` must not end meanwhile."""
    deadline = time.monotonic() + timeout_s
    async with stack.client() as client:
        while True:
            known = {each.name: each.state for each in await client.engine_replicas.list()}
            if known == dict.fromkeys(names, pb.ENGINE_REPLICA_STATE_READY):
                return
            if time.monotonic() > deadline or any(process.poll() is not None for process in alive):
                raise TimeoutError(f"registered are {known}, expected {sorted(names)}\n{stack.tail()}")
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def _process(stack: Stack, room: str, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"mint_{room}", "--config", str(stack.settings_path)]
    with (
        stack.log(f"second-{room}").open("ab") as output,
        subprocess.Popen(
            dying_with_parent(command),
            env=os.environ | stack.extra_environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in opened]
