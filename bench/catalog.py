"""How fast is the catalog at a million policies, and what do they cost? ``python -m bench.catalog --help``

One etcd, one object store and one catalog, each a process of its own on this machine, with their ordinary settings and
durable writes. Everything that a figure divides was measured in this run, by the same client code, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.mlflow_side import OwnClient, Pair, SideBySide
from bench.support import mlflow
from bench.support.clients import Clients, clients_of, resolve
from bench.support.population import (
    TENANT,
    alias_name,
    get_revision,
    import_policies,
    policy_name,
    policy_request,
    store_blobs,
)
from bench.support.processes import CatalogServer, Server, free_port
from bench.support.raw_etcd import RawEtcd
from bench.support.report import Report, Target
from bench.support.timing import interleaved, median_s, quantile, throughput
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    common_pb2,
    policy_service_pb2,
)
from mint_blobs.s3 import S3ObjectStore
from mint_catalog.model.keys import NUM_SHARDS, Keys
from mint_catalog.storage.store import prefix_end
from mint_client import Endpoints, MintClient
from mint_core.channel import call, connect, stream
from mint_core.names import AliasName, PolicyName, RevisionName, TenantName
from support.etcd import EtcdServer
from support.weed import WeedServer

TARGETS: Final = {
    "import_minutes": Target(at_most=15),
    "rss_mb": Target(at_most=400),
    "restart_ready_s": Target(at_most=3),
    "resolve_growth": Target(at_most=1.2),
    "resolve_over_etcd": Target(at_most=2.5),
    "resolve_throughput_vs_echo": Target(at_least=0.5),
    "list_last_over_first": Target(at_most=1.5),
    "list_sharded_over_unsharded": Target(at_most=0.1),
    "watch_p99_over_etcd": Target(at_most=10),
    "vs_mlflow_create": Target(at_least=5),
    "vs_mlflow_alias": Target(at_least=5),
    "vs_mlflow_resolve": Target(at_least=5),
}
STAGES: Final = ("creates", "list", "zipf", "watch", "mlflow", "restart")
_SMALL: Final = 1_000
_PAGE: Final = 1_000
_ETCD_RESTART_S: Final = 300.0
"""Four million keys are read back from its file first."""
_NUM_SPLIT: Final = 100
"""Policies with two revisions, whose alias is moved back and forth."""


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.num: int = options.num
        self.random = random.Random(options.seed)
        settings = {key: value for key, value in vars(options).items() if key not in ("dir",)}
        self.report = Report("catalog", settings, TARGETS)
        self.keys = Keys()
        (folder / "etcd").mkdir()
        self.etcd = EtcdServer(folder / "etcd", f"--quota-backend-bytes={8 * 2**30}")
        self.weed = WeedServer(folder)
        self.catalog = CatalogServer("", None, folder / "catalog.log")
        self.blobs: list[common_pb2.BlobRef] = []

    def wanted(self, stage: str) -> bool:
        return stage not in self.options.skip

    async def run(self) -> None:
        self.etcd.start()
        self.weed.start()
        try:
            store = self.weed.settings()
            self.catalog = CatalogServer(self.etcd.endpoint, store, self.folder / "catalog.log")
            async with RawEtcd(self.etcd.endpoint) as raw, S3ObjectStore(store) as objects:
                await self.catalog.ready()
                async with clients_of(self.catalog) as clients:
                    begun = time.perf_counter()
                    self.blobs = await store_blobs(clients.public, clients.runtime, objects, self.options.blobs)
                    self.report.detail("num_blobs", len(self.blobs))
                    self.report.detail("blobs_stored_s", time.perf_counter() - begun)
                await self._populate_and_resolve(raw)
                await self.catalog.ready()
                async with clients_of(self.catalog) as clients:
                    await self._stages(clients, raw)
                if self.wanted("restart"):
                    await self._restart()
        finally:
            self.catalog.stop()
            self.weed.kill()
            self.etcd.kill()
        self.report.finish()

    async def _stages(self, clients: Clients, raw: RawEtcd) -> None:
        if self.wanted("zipf"):
            await self._zipf(clients, raw)
        self.report.figure("rss_mb", self.catalog.rss_bytes / 2**20)
        if self.wanted("creates"):
            await self._creates(clients)
        if self.wanted("list"):
            await self._list(clients, raw)
        if self.wanted("watch"):
            await self._watch(clients, raw)
        if self.wanted("mlflow"):
            await self._mlflow(raw)

    async def _populate_and_resolve(self, raw: RawEtcd) -> None:
        """Fill the catalog; resolve uncached at a thousand policies and at all of them."""
        small = min(_SMALL, self.num)
        async with clients_of(self.catalog) as clients:
            await import_policies(clients.public, range(small), self.blobs)
        async with self.catalog.with_settings(cache_entries=0), clients_of(self.catalog) as clients:
            early = await self._uncached(clients, raw, small)
        await self.catalog.ready()
        before = await raw.size_bytes()
        async with clients_of(self.catalog) as clients:
            begun = time.perf_counter()

            def progress(num_created: int) -> None:
                if num_created % 50_000 < 500:
                    per_s = num_created / (time.perf_counter() - begun)
                    rss_mb = self.catalog.rss_bytes / 2**20
                    self.report.say(f"    {num_created} policies, {per_s:.0f}/s, catalog {rss_mb:.0f} MiB")

            self.report.say(f"importing {self.num} policies")
            imported = await import_policies(
                clients.public, range(small, self.num), self.blobs, batch=self.options.batch, progress=progress
            )
            self.report.figure("num_policies", self.num)
            # Those of the small measurement count at the speed of the rest.
            self.report.figure("import_minutes", imported.seconds / 60 * self.num / max(1, self.num - small))
            self.report.detail("import_per_s", (self.num - small) / imported.seconds)
            used = await raw.size_bytes() - before
            self.report.figure("bytes_per_policy", used / max(1, self.num - small))
            self.report.detail("record_bytes_per_policy", await self._record_bytes(raw))
            self.report.detail("etcd_db_mb", await raw.size_bytes(in_use=False) / 2**20)
            self.report.detail("import_catalog_rss_mb", self.catalog.rss_bytes / 2**20)
            await import_policies(clients.public, range(self.num, self.num + _NUM_SPLIT), self.blobs, num_revisions=2)
        async with self.catalog.with_settings(cache_entries=0), clients_of(self.catalog) as clients:
            late = await self._uncached(clients, raw, self.num)
        self.report.detail("resolve_p50_small_us", early["resolve"] * 1e6)
        self.report.detail("resolve_p50_us", late["resolve"] * 1e6)
        self.report.detail("etcd_get_p50_us", late["etcd"] * 1e6)
        self.report.figure("resolve_growth", late["resolve"] / early["resolve"])
        self.report.figure("resolve_over_etcd", late["ratio"])

    async def _uncached(self, clients: Clients, raw: RawEtcd, num: int) -> dict[str, float]:
        """Median latency of Resolve and of a raw get of the same keys, uniform over ``num`` policies, in turns."""
        numbers = [self.random.randrange(num) for _ in range(10_000)]
        names = [alias_name(number) for number in numbers]
        keys = [self.keys.alias(AliasName.parse(name)) for name in names]
        num_calls = self.options.calls

        async def resolved(rep: int) -> float:
            return await median_s(lambda n: clients.resolve(names[n % len(names)]), num_calls, rep * num_calls)

        async def get(rep: int) -> float:
            return await median_s(lambda n: raw.get(keys[n % len(keys)]), num_calls, rep * num_calls)

        await resolved(0)
        await get(0)
        taken = await interleaved({"resolve": resolved, "etcd": get}, self.options.reps)
        ratios = [a / b for a, b in zip(taken["resolve"], taken["etcd"], strict=True)]
        medians = {name: statistics.median(values) for name, values in taken.items()}
        return {**medians, "ratio": statistics.median(ratios)}

    async def _record_bytes(self, raw: RawEtcd) -> float:
        """Keys and values of a policy's head, revision and alias, without what etcd adds."""
        sizes = []
        for number in self.random.sample(range(self.num), min(200, self.num)):
            name = PolicyName.parse(policy_name(number))
            keys = [
                self.keys.policy(name),
                self.keys.revision(RevisionName(name.tenant, name.policy, 1)),
                self.keys.alias(AliasName(name.tenant, name.policy, "live")),
            ]
            sizes.append(sum([len(key) + len(await raw.get(key) or b"") for key in keys]))
        return statistics.mean(sizes)

    async def _zipf(self, clients: Clients, raw: RawEtcd) -> None:
        """Throughput at many callers against an echo, in turns, with the cache in the state that this load keeps."""
        report, options = self.report, self.options
        report.say(f"Zipf({options.zipf}) over {self.num} aliases, {options.callers} callers")
        weights = 1 / np.arange(1, self.num + 1, dtype=np.float64) ** options.zipf
        ends = np.cumsum(weights / weights.sum())
        ranks = np.searchsorted(ends, np.random.default_rng(options.seed).random(400_000))
        place = self.random.sample(range(self.num), self.num)  # which policy has which rank
        names = [alias_name(place[min(rank, self.num - 1)]) for rank in ranks]
        hottest = [alias_name(place[rank]) for rank in range(min(self.num, options.cache) - 1, -1, -1)]
        for start in range(0, len(hottest), 1000):
            batch = alias_service_pb2.BatchResolveRequest(names=hottest[start : start + 1000])
            await clients.aliases.BatchResolve(batch, timeout=60)
        port = free_port()
        echo = Server([sys.executable, "-m", "bench.support.echo", f"127.0.0.1:{port}"], self.folder / "echo.log")
        echo.start()
        counted = {"resolves": 0, "ranges": 0}
        try:
            async with connect(f"127.0.0.1:{port}", retry=False) as channel:
                await channel.channel_ready()
                echo_stub = alias_service_pb2_grpc.AliasServiceStub(channel)

                async def measure(stub: Any, rep: int) -> tuple[float, int]:
                    return await throughput(
                        lambda n: resolve(stub, names[n % len(names)]),
                        num_callers=options.callers,
                        seconds=options.seconds,
                        start=rep * 40_000,
                    )

                async def resolves(rep: int) -> float:
                    before = await raw.num_ranges()
                    per_s, num_calls = await measure(clients.aliases, rep)
                    counted["ranges"] += await raw.num_ranges() - before
                    counted["resolves"] += num_calls
                    return per_s

                async def echoes(rep: int) -> float:
                    return (await measure(echo_stub, rep))[0]

                await measure(clients.aliases, 0)  # from the hottest aliases to what a cache of this size settles at
                await measure(echo_stub, 0)
                taken = await interleaved({"echo": echoes, "resolve": resolves}, options.reps)
        finally:
            echo.stop()
        ratios = [a / b for a, b in zip(taken["resolve"], taken["echo"], strict=True)]
        report.detail("resolves_per_s", statistics.median(taken["resolve"]))
        report.detail("echoes_per_s", statistics.median(taken["echo"]))
        report.detail("cache_hit_rate", 1 - counted["ranges"] / max(1, counted["resolves"]))
        report.figure("resolve_throughput_vs_echo", statistics.median(ratios))

    async def _creates(self, clients: Clients) -> None:
        """Single CreatePolicy calls, each with a revision and an alias."""
        first = self.num + _NUM_SPLIT
        per_s, _ = await throughput(
            lambda n: clients.create(policy_request(first + n, self.blobs)),
            num_callers=16,
            seconds=self.options.seconds * 2,
        )
        self.report.figure("creates_per_s", per_s)

    async def _list(self, clients: Clients, raw: RawEtcd) -> None:
        """First page against last; and a page's read bounded to its shards against one over the whole prefix."""
        request = policy_service_pb2.ListPoliciesRequest(parent=TENANT, page_size=_PAGE)
        num_listed, last_full = 0, ""
        begun = time.perf_counter()
        while True:
            page = await clients.policies.ListPolicies(request, timeout=60)
            num_listed += len(page.policies)
            if len(page.policies) == _PAGE:
                last_full = request.page_token
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        if num_listed < self.num:
            raise RuntimeError(f"{num_listed} policies were listed, there are {self.num}")
        self.report.detail("list_all_s", time.perf_counter() - begun)

        def page_of(token: str) -> Any:
            wanted = policy_service_pb2.ListPoliciesRequest(parent=TENANT, page_size=_PAGE, page_token=token)
            return lambda _: median_s(lambda _: clients.policies.ListPolicies(wanted, timeout=60), 3)

        prefix = self.keys.family("policies", TenantName.parse(TENANT).tenant)
        num_shards = min(NUM_SHARDS - 1, -(-_PAGE * NUM_SHARDS // num_listed) + 1)
        sharded_end = prefix + f"{num_shards:02x}".encode()

        def read(end: bytes) -> Any:
            return lambda _: median_s(lambda _: raw.page(prefix, end, _PAGE), 3)

        taken = await interleaved(
            {
                "first": page_of(""),
                "last": page_of(last_full),
                "sharded": read(sharded_end),
                "unsharded": read(prefix_end(prefix)),
            },
            self.options.reps,
        )
        medians = {name: statistics.median(values) for name, values in taken.items()}
        for name, value in medians.items():
            self.report.detail(f"list_{name}_ms", value * 1e3)
        self.report.figure("list_last_over_first", medians["last"] / medians["first"])
        self.report.figure("list_sharded_over_unsharded", medians["sharded"] / medians["unsharded"])

    async def _watch(self, clients: Clients, raw: RawEtcd) -> None:
        """From the call of PromoteAlias to its event at a watcher, against etcd's own put and watch, in turns."""
        names = [alias_name(number) for number in range(self.num, self.num + _NUM_SPLIT)]
        seen: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        ready = asyncio.Event()

        async def watch() -> None:
            request = alias_service_pb2.WatchAliasesRequest(parent=TENANT)
            async for event in stream(clients.aliases.WatchAliases, request, timeout_s=None):
                ready.set()
                if event.type == common_pb2.WATCH_EVENT_TYPE_PUT:
                    seen.put_nowait((event.alias.name, time.perf_counter()))

        task = asyncio.create_task(watch())
        await ready.wait()
        promoted: list[float] = []
        put: list[float] = []
        for rep in range(self.options.reps):
            for name in names:
                begun = time.perf_counter()
                await clients.promote(name, 2 - rep % 2)
                came_name, came = await seen.get()
                assert came_name == name
                promoted.append(came - begun)
            put += await raw.put_to_watch_s(len(names))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.report.detail("watch_p50_ms", quantile(promoted, 0.5) * 1e3)
        self.report.detail("watch_p99_ms", quantile(promoted, 0.99) * 1e3)
        self.report.detail("etcd_watch_p50_ms", quantile(put, 0.5) * 1e3)
        self.report.detail("etcd_watch_p99_ms", quantile(put, 0.99) * 1e3)
        self.report.figure("watch_p99_over_etcd", quantile(promoted, 0.99) / quantile(put, 0.99))

    async def _mlflow(self, raw: RawEtcd) -> None:
        """The same three operations on MLflow's registry, one caller and eight, in turns."""
        server = mlflow.MlflowServer(self.folder / "mlflow", num_workers=self.options.mlflow_workers)
        server.start()
        driver = None
        try:
            await asyncio.to_thread(server.wait_ready)
            driver = mlflow.ClientDriver(server.port, self.folder / "mlflow-client.log")
            await asyncio.to_thread(driver.wait_ready)
            first = self.num + 10_000_000
            side = SideBySide(self.report, raw, [], self.blobs, first, self.options.reps)

            @contextlib.asynccontextmanager
            async def clients() -> AsyncIterator[None]:
                endpoints = Endpoints(catalog=self.catalog.public)
                async with MintClient(endpoints) as own, clients_of(self.catalog) as stubs:
                    rest = mlflow.RestDriver(server.port)
                    side.pairs = [Pair("", OwnClient(own), driver), Pair("_rest", stubs, rest)]
                    yield

            async with clients():
                await side.prepare()
                await side.run()
            async with self.catalog.with_settings(recent_records=0), clients():
                for pair, ratio in zip(side.pairs, await side.compare("alias", "_read"), strict=True):
                    self.report.detail(f"vs_mlflow_alias{pair.suffix}_read", ratio)
            await self.catalog.ready()
        finally:
            if driver is not None:
                driver.stop()
            server.stop()

    async def _restart(self) -> None:
        """Kill etcd and the catalog, start both, and compare what a thousand policies read as."""
        numbers = self.random.sample(range(self.num), min(1000, self.num))

        async def read() -> list[bytes]:
            async with clients_of(self.catalog) as clients:
                records = []
                for number in numbers:
                    alias = alias_service_pb2.GetAliasRequest(name=alias_name(number))
                    policy = policy_service_pb2.GetPolicyRequest(name=policy_name(number))
                    parts = [
                        await call(clients.policies.GetPolicy, policy),
                        await call(clients.aliases.GetAlias, alias),
                        await call(clients.revisions.GetRevision, get_revision(number)),
                    ]
                    records.append(b"".join(part.SerializeToString(deterministic=True) for part in parts))
                return records

        before = await read()
        taken = []
        for rep in range(3):
            self.catalog.stop()
            if rep == 0:
                begun = time.perf_counter()
                self.etcd.restart(_ETCD_RESTART_S)
                self.report.detail("etcd_restart_s", time.perf_counter() - begun)
            seconds = await self.catalog.ready()
            async with clients_of(self.catalog) as clients:
                begun = time.perf_counter()
                await clients.resolve(alias_name(numbers[0]))
                taken.append(seconds + time.perf_counter() - begun)
        self.report.figure("restart_ready_s", statistics.median(taken))
        after = await read()
        num_equal = sum(a == b for a, b in zip(before, after, strict=True))
        self.report.detail("restart_num_equal", num_equal)
        if num_equal != len(numbers):
            raise RuntimeError(f"only {num_equal} of {len(numbers)} policies read as before the restart")


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.catalog", description=__doc__)
    parser.add_argument("--num", type=int, default=1_000_000, help="policies, one revision and one alias each")
    parser.add_argument("--blobs", type=int, default=1_000, help="distinct adapters that they share")
    parser.add_argument("--batch", type=int, default=500, help="policies in a message of the import")
    parser.add_argument("--reps", type=int, default=5, help="repetitions, in turns with what they are compared to")
    parser.add_argument("--calls", type=int, default=400, help="calls in a repetition of a latency")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a repetition of a throughput")
    parser.add_argument("--callers", type=int, default=64, help="concurrent callers of the throughput")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity of aliases")
    parser.add_argument("--cache", type=int, default=100_000, help="aliases that the catalog's cache holds")
    parser.add_argument("--mlflow-workers", type=int, default=2, help="workers of MLflow's server")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", nargs="*", choices=STAGES, default=[], help="stages to leave out")
    parser.add_argument("--dir", type=Path, default=None, help="where the servers keep their data meanwhile")
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mint-bench-catalog-", dir=options.dir))
    try:
        asyncio.run(Bench(options, folder).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
