"""A whole MinT on this machine: which processes, with which settings, in which order."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mint_cli.binaries import find_etcd, find_weed
from mint_cli.model import LocalModel
from mint_cli.state import Credentials, StateDir
from mint_core.base_model import routed_top_k

__all__ = ["SERVICES", "Installation", "ProcessSpec", "UpOptions", "plan_installation", "to_toml"]

SERVICES = ("catalog", "trainer", "exporter", "loader", "engine", "inference", "runs")
"""MinT's own processes, in the order in which they are listed; each is the module ``mint_NAME``."""

_OF_A_NODE = ("loader", "engine")
"""What every engine replica has of its own."""

_WEED_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
)
_WEED_GRPC_OFFSET = 10_000  # its admin worker connects there, whatever admin.port.grpc says
_BUCKET = "mint"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `mint up` can be told."""

    dtype: str = "float32"
    """Compute type of the base in trainer and engine."""
    max_lora_rank: int = 16
    """Highest rank the engine takes; every slot is as large as this rank needs."""
    replicas: int = 1
    """Engines, each with a loader and a disk cache of its own. Those after the first are ``engine-2`` and so on."""
    metrics: bool = False
    """Whether every service has an endpoint for Prometheus."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to run."""

    name: str
    argv: tuple[str, ...]
    address: str
    """Where clients reach it; of a service without clients, its runtime address."""
    runtime_address: str
    health: str
    """See :func:`mint_cli.health.is_healthy`."""
    metrics_address: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    stop_timeout_s: float = 20.0
    """After SIGTERM; then it is killed."""
    leftovers: tuple[str, ...] = ()
    """Patterns of files to remove after it ended."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Processes in stages: those of one stage are started together, once the stage before is healthy.

    The base model is registered with the catalog before the last stage. They are stopped in the reverse order.
    """

    stages: tuple[tuple[ProcessSpec, ...], ...]
    base: LocalModel
    settings_text: str
    """Content of mint.toml."""
    warnings: tuple[str, ...]


def plan_installation(state: StateDir, base: LocalModel, options: UpOptions) -> Installation:
    """Choose ports and write down what is to run. Raises :class:`FailedPrecondition` if a program is missing."""
    etcd_path, warning = find_etcd()
    weed_path = find_weed()
    names = ["etcd.client", "etcd.peer", *(f"weed.{name}" for name in _WEED_PORTS)]
    more = [f"{name}-{number}" for number in range(2, options.replicas + 1) for name in _OF_A_NODE]
    kinds = ("listen", "runtime_listen", *(("metrics_listen",) if options.metrics else ()))
    names += [f"{name}.{kind}" for name in (*SERVICES, *more) for kind in kinds]
    address = {name: f"127.0.0.1:{port}" for name, port in state.ports(names).items()}
    credentials = state.credentials()
    # Nothing runs yet: what lies there is of processes that were killed.
    shutil.rmtree(state.data / "scratch", ignore_errors=True)
    (state.data / "scratch").mkdir()
    settings = _settings(state, base, options, address, credentials)
    services = {name: _service(name, address, state) for name in SERVICES}
    return Installation(
        stages=(
            (_etcd(etcd_path, address, state), _weed(weed_path, address, state, credentials)),
            (services["catalog"],),
            (
                *(services[name] for name in SERVICES if name not in ("catalog", "runs")),
                *(_service(name, address, state) for name in more),
            ),
            # Last up and first down: a draining worker still saves its state.
            (services["runs"],),
        ),
        base=base,
        settings_text="# Written by `mint up`; the environment (MINT_<SECTION>_<KEY>) overrides it.\n\n"
        + to_toml(settings),
        warnings=(warning,) if warning else (),
    )


def _settings(
    state: StateDir, base: LocalModel, options: UpOptions, address: Mapping[str, str], credentials: Credentials
) -> dict[str, Any]:
    """The tables of mint.toml."""
    adapters = str(state.data / "adapters")
    scratch = str(state.data / "scratch")
    tables: dict[str, Any] = {
        "common": {
            "base_model": str(base.name),
            "base_model_path": str(base.folder),
            "catalog_address": address["catalog.listen"],
            "catalog_runtime_address": address["catalog.runtime_listen"],
            "object_store": {
                "endpoint_url": f"http://{address['weed.s3.port']}",
                "bucket": _BUCKET,
                "access_key_id": credentials.access_key_id,
                "secret_access_key": credentials.secret_access_key,
            },
        },
        "catalog": {"etcd": {"endpoints": [address["etcd.client"]]}},
        "trainer": {"dtype": options.dtype, "scratch_path": scratch},
        "exporter": {"scratch_dir": str(state.data / "exporter")},
        "loader": {"engine_address": address["engine.runtime_listen"], "cache_dir": adapters},
        "engine": {
            "adapter_dir": adapters,
            "engine_replica": "engineReplicas/local",
            "loader_address": address["loader.runtime_listen"],
            # As many as the trainer has by default: in a loop of sampling and training they take turns.
            "num_threads": 2,
            "sglang": {
                "dtype": options.dtype,
                "max_lora_rank": options.max_lora_rank,
                "return_routed_experts": routed_top_k(base.folder) > 0,
            },
        },
        "inference": {},
        "runs": {
            "scratch_path": scratch,
            "trainer_address": address["trainer.listen"],
            "exporter_runtime_address": address["exporter.runtime_listen"],
            "inference_address": address["inference.listen"],
        },
    }
    for name in SERVICES:
        listen = {kind: address[f"{name}.{kind}"] for kind in ("listen", "runtime_listen")}
        tables[name] = listen | tables[name]
        if options.metrics:
            tables[name]["telemetry"] = {"metrics_listen": address[f"{name}.metrics_listen"]}
    return tables


def _service(name: str, address: Mapping[str, str], state: StateDir) -> ProcessSpec:
    listen, runtime = address[f"{name}.listen"], address[f"{name}.runtime_listen"]
    room, _, number = name.partition("-")
    internal = room in _OF_A_NODE
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-m", f"mint_{room}", "--config", str(state.settings_path)),
        address=runtime if internal else listen,
        runtime_address=runtime,
        health=f"grpc:{listen}",
        metrics_address=address.get(f"{name}.metrics_listen", ""),
        # A worker finishes its step and saves; the others get what they need to end their calls.
        stop_timeout_s=90.0 if name == "runs" else 25.0,
        environ={
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Trainer and engine share the cores. A kernel's threads that wait by spinning, which is the default, take
            # from each other the time they wait for: nine times slower, measured with two processes on two cores.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        | (_of_replica(room, number, address, state) if number else {}),
    )


def _of_replica(room: str, number: str, address: Mapping[str, str], state: StateDir) -> dict[str, str]:
    """What a process of a further replica has otherwise than mint.toml says."""
    adapters = str(state.data / f"adapters-{number}")
    name = f"{room}-{number}"
    settings = {kind: address[f"{name}.{kind}"] for kind in ("listen", "runtime_listen")}
    if room == "engine":
        settings |= {
            "engine_replica": f"engineReplicas/local-{number}",
            "adapter_dir": adapters,
            "loader_address": address[f"loader-{number}.runtime_listen"],
        }
    else:
        settings |= {"engine_address": address[f"engine-{number}.runtime_listen"], "cache_dir": adapters}
    if metrics := address.get(f"{name}.metrics_listen"):
        settings["telemetry__metrics_listen"] = metrics
    return {f"MINT_{room}_{key}".upper(): value for key, value in settings.items()}


def _etcd(path: Path, address: Mapping[str, str], state: StateDir) -> ProcessSpec:
    client, peer = f"http://{address['etcd.client']}", f"http://{address['etcd.peer']}"
    return ProcessSpec(
        name="etcd",
        argv=(
            str(path),
            "--name=mint",
            f"--data-dir={state.data / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=mint={peer}",
            "--quota-backend-bytes=8589934592",
            "--logger=zap",
            "--log-outputs=stderr",
        ),
        address=address["etcd.client"],
        runtime_address=address["etcd.client"],
        health=f"{client}/health",
    )


def _weed(path: Path, address: Mapping[str, str], state: StateDir, credentials: Credentials) -> ProcessSpec:
    folder = state.data / "objects"
    folder.mkdir(exist_ok=True)
    ports = {name: address[f"weed.{name}"].rpartition(":")[2] for name in _WEED_PORTS}
    return ProcessSpec(
        name="weed",
        argv=(
            str(path),
            "-logtostderr=true",
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in ports.items()),
            f"-admin.port.grpc={int(ports['admin.port']) + _WEED_GRPC_OFFSET}",
        ),
        address=address["weed.s3.port"],
        runtime_address=address["weed.s3.port"],
        # The volume server registers a moment after the S3 port opens; until then the assign fails, as writes would.
        health=f"http://{address['weed.s3.port']}/ http://{address['weed.master.port']}/dir/assign",
        leftovers=tuple(f"/tmp/seaweedfs-*-{port}.sock" for port in ports.values()),  # noqa: S108 - where it puts them
        environ={
            "AWS_ACCESS_KEY_ID": credentials.access_key_id,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key,
        },
    )


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of nested tables of texts, numbers, booleans and lists."""
    lines: list[str] = []

    def write(prefix: str, table: Mapping[str, Any]) -> None:
        lines.append(f"[{prefix}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping))
        lines.append("")
        for key, value in table.items():
            if isinstance(value, Mapping):
                write(f"{prefix}.{key}", value)

    for name, table in tables.items():
        write(name, table)
    return "\n".join(lines)
