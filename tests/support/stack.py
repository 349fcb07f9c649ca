"""A whole MinT on this machine, as ``mint up`` makes it: real etcd, real S3, real SGLang, over a tiny base.

Tests talk to it through :class:`mint_client.MintClient` and the runtime stubs; faults are made with :meth:`Stack.kill`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mint_blobs import ObjectStoreSettings
from mint_blobs.s3 import S3ObjectStore
from mint_cli.installation import to_toml
from mint_client import Endpoints, MintClient
from mint_core.channel import connect
from support.children import dying_with_parent

MINT = Path(sys.executable).parent / "mint"


@dataclass(frozen=True)
class Stack:
    """A running installation."""

    state: Path
    base: Path
    extra_environ: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of all processes."""

    def services(self) -> dict[str, dict[str, Any]]:
        document = json.loads((self.state / "services.json").read_text())
        return {service["name"]: service for service in document["services"]}

    def address(self, name: str, *, runtime: bool = False) -> str:
        return str(self.services()[name]["runtime_address" if runtime else "address"])

    @property
    def base_model(self) -> str:
        return f"baseModels/{self.base.name}"

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[MintClient]:
        names = ("catalog", "inference", "exporter", "trainer")
        async with MintClient(Endpoints(**{name: self.address(name) for name in names})) as client:
            yield client

    def channel(self, name: str) -> Any:
        """A channel to a service's runtime endpoint."""
        return connect(self.address(name, runtime=True))

    def settings(self) -> dict[str, Any]:
        """What ``mint.toml`` says."""
        return tomllib.loads(self.settings_path.read_text())

    @property
    def settings_path(self) -> Path:
        return self.state / "mint.toml"

    def object_store(self) -> S3ObjectStore:
        """The installation's object store, to be entered."""
        return S3ObjectStore(ObjectStoreSettings(**self.settings()["common"]["object_store"]))

    def environ(self) -> dict[str, str]:
        return os.environ | {"MINT_STATE_DIR": str(self.state)}

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        """Run the command line tool against this installation."""
        return subprocess.run(
            [str(MINT), *arguments], env=self.environ(), capture_output=True, text=True, check=check, timeout=timeout_s
        )

    def status(self) -> dict[str, bool]:
        done = self.run("status", "--json", check=False)
        return {service["name"]: service["healthy"] for service in json.loads(done.stdout)["services"]}

    async def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to one process and say which pid it had."""
        pid = int(self.services()[name]["pid"])
        os.kill(pid, number)
        return pid

    @contextlib.contextmanager
    def second(self, service: str) -> Iterator[str]:
        """Another process of a service, for as long as the block lasts; the name it logs under."""
        name = f"second-{service}"
        kinds = ("LISTEN", "RUNTIME_LISTEN", "TELEMETRY__METRICS_LISTEN")
        anywhere = {f"MINT_{service.upper()}_{kind}": "127.0.0.1:0" for kind in kinds}
        command = [sys.executable, "-m", f"mint_{service}", "--config", str(self.settings_path)]
        with (
            self.log(name).open("ab") as output,
            subprocess.Popen(
                dying_with_parent(command),
                env=os.environ | self.extra_environ | anywhere,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ) as process,
        ):
            try:
                yield name
            finally:
                process.kill()

    async def wait_restarted(self, name: str, dead: int, *, timeout_s: float = 90) -> None:
        """Wait until the service has a process again, another one than ``dead``."""
        deadline = time.monotonic() + timeout_s
        while self.services()[name]["pid"] in (None, dead):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} was not started again within {timeout_s} s\n{self.tail()}")
            await asyncio.sleep(0.05)

    async def reconfigure(self, table: str, **values: Any) -> None:
        """Change settings in a table of ``mint.toml`` and restart the service it belongs to, unless it has them."""
        settings = self.settings()
        section = settings
        for key in table.split("."):
            section = section[key]
        if section | values == section:
            return
        section |= values
        self.settings_path.write_text(to_toml(settings))
        service = table.partition(".")[0]
        pid = await self.kill(service, signal.SIGTERM)
        await self.wait_healthy(dead={service: pid})

    async def wait_healthy(self, *, dead: dict[str, int] | None = None, timeout_s: float = 90) -> None:
        """Wait until every service is healthy again, the ``dead`` ones under new pids."""
        deadline = time.monotonic() + timeout_s
        while True:
            services = self.services()
            renewed = all(services[name]["pid"] not in (None, pid) for name, pid in (dead or {}).items())
            unhealthy = (
                [name for name, healthy in self.status().items() if not healthy] if renewed else list(dead or {})
            )
            if renewed and not unhealthy:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"still not healthy after {timeout_s} s: {unhealthy}\n{self.tail()}")
            await asyncio.sleep(0.25)

    def log(self, name: str) -> Path:
        """Where a service writes its log."""
        return self.state / "logs" / f"{name}.log"

    def tail(self, num_lines: int = 15) -> str:
        """The ends of all logs, for the message of a failed test."""
        ends = []
        for path in sorted((self.state / "logs").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-num_lines:]
            ends.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(ends)


@contextlib.contextmanager
def running_stack(
    state: Path, base: Path, *arguments: str, environ: dict[str, str] | None = None, timeout_s: float = 200
) -> Iterator[Stack]:
    """``mint up`` … ``mint down``; whatever happens, nothing keeps running."""
    stack = Stack(state, base, {"OMP_NUM_THREADS": "1"} | (environ or {}))
    env = os.environ | stack.extra_environ
    command = [str(MINT), "up", "--state-dir", str(state), "--base", str(base), "--dtype", "float32", *arguments]
    try:
        up = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=timeout_s)
        if up.returncode != 0:
            raise RuntimeError(f"mint up ended with {up.returncode}: {up.stderr}\n{stack.tail()}")
        yield stack
    finally:
        subprocess.run([MINT, "down", "--state-dir", state], capture_output=True, check=False, timeout=100)


def write_random_adapter(folder: Path, base: Path, *, rank: int = 4, seed: int = 0, scale: float = 0.05) -> Path:
    """Write a PEFT folder for a Llama-type base with random, non-zero A and B in float32 (``scale`` 0: B is zero)."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    modules = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (num_in, num_out) in modules.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, num_in), dtype=np.float32) * 0.2
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((num_out, rank), dtype=np.float32) * scale
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": sorted(name.rpartition(".")[2] for name in modules),
                "base_model_name_or_path": str(base),
                "bias": "none",
            }
        )
    )
    return folder


def fresh_id(prefix: str) -> str:
    """A resource id that no other test uses."""
    return f"{prefix}-{secrets.token_hex(4)}"
