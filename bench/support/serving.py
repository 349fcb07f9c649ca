"""What serves adapters, on this machine: etcd, an object store, a catalog, and a node of loader, engine and inference.

The catalog is there before the node, so that it can be filled first; the node's processes get their settings as
``mint up`` gives them, from one ``mint.toml``.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from bench.support.processes import CatalogServer, Server, free_port
from mint_blobs import ObjectStoreSettings
from mint_cli.health import is_healthy
from mint_cli.installation import to_toml
from mint_client import Endpoints, MintClient
from mint_core.errors import MintError
from support.etcd import EtcdServer
from support.weed import WeedServer

__all__ = ["Memory", "Serving"]

_NODE = ("loader", "engine", "inference")
_ENVIRON = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process: memory that would be free without it (proportional set size), in bytes."""

    pss: int
    anonymous: int
    """The part of it that is no file's: what the process allocated."""

    @classmethod
    def of(cls, process: psutil.Process) -> Self:
        """Now, by ``/proc``. Raises :class:`OSError` if it is gone."""
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return cls(sizes["Pss"], sizes["Pss_Anon"])

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.pss + other.pss, self.anonymous + other.anonymous)


class Serving:
    """One installation without training; :meth:`storage` first, inside of it :meth:`node`.

    etcd and the object store go on with what they find in the folder.
    """

    def __init__(
        self, folder: Path, base: Path, base_model: str, *, etcd_quota_bytes: int = 8 << 30, **catalog: object
    ) -> None:
        """``catalog`` are settings of the catalog."""
        self.folder, self.base, self.base_model = folder, base, base_model
        for name in ("etcd", "weed", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.etcd = EtcdServer(folder / "etcd", f"--quota-backend-bytes={etcd_quota_bytes}")
        self.weed = WeedServer(folder / "weed")
        self.catalog = CatalogServer("", None, folder / "logs" / "catalog.log")
        self._catalog_settings = catalog
        self._node: dict[str, Server] = {}
        self._addresses: dict[str, dict[str, str]] = {}

    @property
    def store_settings(self) -> ObjectStoreSettings:
        return self.weed.settings()

    @property
    def cache_dir(self) -> Path:
        """The node's disk cache."""
        return self.folder / "adapters"

    def runtime_address(self, name: str) -> str:
        """Of one of the node's processes."""
        return self._addresses[name]["runtime_listen"]

    @contextlib.asynccontextmanager
    async def storage(self) -> AsyncIterator[None]:
        """etcd, the object store and the catalog."""
        self.etcd.start()
        self.weed.start()
        try:
            self.catalog = CatalogServer(
                self.etcd.endpoint, self.store_settings, self.folder / "logs" / "catalog.log", **self._catalog_settings
            )
            await self.catalog.ready()
            yield
        finally:
            self.catalog.stop()
            self.weed.kill()
            self.etcd.kill()

    @contextlib.asynccontextmanager
    async def node(self, **settings: Mapping[str, Any]) -> AsyncIterator[MintClient]:
        """Loader, engine and inference with tables of ``settings`` by process; yields a client that the base has
        answered."""
        self._addresses = {
            name: {kind: f"127.0.0.1:{free_port()}" for kind in ("listen", "runtime_listen")} for name in _NODE
        }
        path = self.folder / "mint.toml"
        path.write_text(to_toml(self._tables(settings)))
        for name in _NODE:
            command = [sys.executable, "-m", f"mint_{name}", "--config", str(path)]
            self._node[name] = Server(command, self.folder / "logs" / f"{name}.log", _ENVIRON)
        try:
            for server in self._node.values():
                server.start()
            await asyncio.gather(*(self._healthy(name) for name in _NODE))
            endpoints = Endpoints(catalog=self.catalog.public, inference=self._addresses["inference"]["listen"])
            async with MintClient(endpoints) as client:
                await self._base_answers(client)
                yield client
        finally:
            for server in self._node.values():
                server.stop()

    def check(self) -> None:
        """Raise if a process has died."""
        for server in (self.catalog, *self._node.values()):
            server.check()

    def memory(self) -> dict[str, Memory]:
        """Of all processes by name; SGLang's processes by themselves."""
        found: dict[str, Memory] = {}
        for name, process in self._parts():
            with contextlib.suppress(OSError):  # it ended meanwhile
                found[name] = found.get(name, Memory(0, 0)) + Memory.of(process)
        return found

    def cpu_s(self) -> dict[str, float]:
        """Time on a core by name since the start of each process; SGLang's processes by themselves."""
        found: dict[str, float] = {}
        for name, process in self._parts():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                found[name] = found.get(name, 0.0) + times.user + times.system
        return found

    def _parts(self) -> Iterator[tuple[str, psutil.Process]]:
        """Every process with a name; SGLang's call themselves ``sglang::scheduler`` and the like."""
        parents = {name: server.process for name, server in (("catalog", self.catalog), *self._node.items())}
        parents |= {"etcd": psutil.Process(self.etcd.pid), "weed": psutil.Process(self.weed.pid)}
        for name, parent in parents.items():
            yield name, parent
            for child in parent.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = "".join(child.cmdline()[:1]).split()[:1]
                    part = title[0].rpartition("::")[2].lower() if title and "::" in title[0] else ""
                    yield f"{name}_{part}" if part.isalnum() else name, child

    def _tables(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        store = self.store_settings
        address = self._addresses
        tables: dict[str, dict[str, Any]] = {
            "common": {
                "base_model": self.base_model,
                "base_model_path": str(self.base),
                "catalog_address": self.catalog.public,
                "catalog_runtime_address": self.catalog.runtime,
                "object_store": {
                    "endpoint_url": store.endpoint_url,
                    "access_key_id": store.access_key_id,
                    "secret_access_key": store.secret_access_key.get_secret_value(),
                },
            },
            "loader": {"engine_address": address["engine"]["runtime_listen"], "cache_dir": str(self.cache_dir)},
            "engine": {
                "adapter_dir": str(self.cache_dir),
                "engine_replica": "engineReplicas/local",
                "loader_address": address["loader"]["runtime_listen"],
            },
            "inference": {},
        }
        for name in _NODE:
            tables[name] = {**address[name], **tables[name], **settings.get(name, {})}
        return tables

    async def _healthy(self, name: str, timeout_s: float = 180.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not await is_healthy(f"grpc:{self._addresses[name]['listen']}"):
                self._node[name].check()
                await asyncio.sleep(0.1)

    async def _base_answers(self, client: MintClient, timeout_s: float = 60.0) -> None:
        """Wait until inference has found the engine."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                await client.score(self.base_model, [1, 2, 3], tenant="tenants/bench")
            except MintError:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(0.2)
            else:
                return
