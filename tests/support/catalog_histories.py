"""One seeded run: clients at work over two catalogs and an etcd, while processes die; then every check of the history.

The seed decides what clients ask, what is killed, after how many operations and for how long; how calls and deaths
interleave is the machine's. Two runs of one seed are alike, not equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.catalog_rig import CatalogProcess, Rig
from support.catalog_workload import Client, World
from support.etcd import EtcdCluster, EtcdServer, running_etcd, running_etcd_cluster
from support.history import History
from support.linearizability import Outcome

__all__ = ["Plan", "Result", "run_plan"]

# Elections take a quarter of etcd's usual time, so that an outage is short and many fit into a run.
_ETCD_OPTIONS: Final = ("--heartbeat-interval=100", "--election-timeout=500")
_STALENESS_S: Final = 2.0
_CATALOG: Final = {
    "MINT_CATALOG_CACHE_STALENESS_S": str(_STALENESS_S),
    "MINT_CATALOG_ETCD__CALL_TIMEOUT_S": "1",
    "MINT_CATALOG_LOG_LEVEL": "WARNING",
}
_QUIET_START: Final = 0.05
_QUIET_END: Final = 0.95


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    seed: int
    num_operations: int = 5_000
    num_kills: int = 12
    num_clients: int = 6
    cluster: bool = False
    """Three members of etcd, whose leader is killed, instead of one."""

    def victims(self) -> list[tuple[int, str]]:
        """After how many operations who is killed; etcd half of the time."""
        rng = random.Random(f"kills/{self.seed}")
        etcd = ["leader", "leader", "follower"] if self.cluster else ["etcd"]
        names = [
            f"catalog {each // 2 % 2}" if each % 2 else etcd[each // 2 % len(etcd)] for each in range(self.num_kills)
        ]
        rng.shuffle(names)
        first, last = int(_QUIET_START * self.num_operations), int(_QUIET_END * self.num_operations)
        return list(zip(sorted(rng.sample(range(first, last), self.num_kills)), names, strict=True))


@dataclass
class Result:
    """What came out."""

    plan: Plan
    world: World
    kills: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    run_s: float = 0.0
    check_s: float = 0.0

    HEADER = "seed etcd  operations     ok failed unknown unanswered reads  kills violations  run s check s"

    def line(self) -> str:
        """A row of the table under ``HEADER``."""
        counts = self.world.history.counts()
        etcd = "three" if self.plan.cluster else "one"
        return (
            f"{self.plan.seed:4d} {etcd:5s} {self.world.num_operations:10d} {counts[Outcome.OK]:6d} "
            f"{counts[Outcome.FAILED]:6d} {counts[Outcome.UNKNOWN]:7d} {self.world.num_unanswered_reads:16d} "
            f"{self.kills.total():6d} {len(self.violations):10d} {self.run_s:6.1f} {self.check_s:7.1f}"
        )

    def write(self, path: Path) -> None:
        """Every call in the order of its beginning, for people."""
        records = sorted(self.world.history.records, key=lambda each: each.operation.invoked_s)
        path.write_text("\n".join([*self.violations, "", *map(str, records)]))


class _Killer:
    """Kills what the plan names, and starts it again a little later."""

    def __init__(
        self, plan: Plan, world: World, etcd: EtcdServer | EtcdCluster, catalogs: list[CatalogProcess]
    ) -> None:
        self._victims = plan.victims()
        self._rng = random.Random(f"pauses/{plan.seed}")
        self._world = world
        self._etcd = etcd
        self._catalogs = catalogs
        self.kills: Counter[str] = Counter()
        self.done = False

    async def run(self) -> None:
        for after, victim in self._victims:
            while self._world.num_operations < after:  # noqa: ASYNC110 - a count that every client moves on
                await asyncio.sleep(0.005)
            self.kills[victim] += 1
            pause_s = self._rng.uniform(0.0, 0.3)
            if victim.startswith("catalog"):
                catalog = self._catalogs[int(victim[-1])]
                catalog.stop()
                await asyncio.sleep(pause_s)
                await catalog.start()
            else:
                member = await asyncio.to_thread(self._member, victim)
                await asyncio.to_thread(member.kill)
                await asyncio.sleep(pause_s)
                await asyncio.to_thread(member.start)
        self.done = True

    def _member(self, victim: str) -> EtcdServer:
        if isinstance(self._etcd, EtcdServer):
            return self._etcd
        leader = self._etcd.leader()
        return leader if victim == "leader" else self._rng.choice([m for m in self._etcd.members if m is not leader])


async def run_plan(plan: Plan, folder: Path) -> Result:
    """Run a plan and check its history; logs go to ``folder``."""
    started = time.monotonic()
    world = World(History(staleness_s=_STALENESS_S))
    starting = running_etcd_cluster if plan.cluster else running_etcd
    with starting(*_ETCD_OPTIONS, in_memory=True) as etcd:
        async with _two_catalogs(etcd, folder) as catalogs, contextlib.AsyncExitStack() as stack:
            rigs: list[list[Rig]] = [
                [await stack.enter_async_context(catalog.rig()) for catalog in catalogs]
                for _ in range(plan.num_clients)
            ]
            await world.set_up(rigs[0][0])
            killer = _Killer(plan, world, etcd, catalogs)
            clients = [Client(number, plan.seed, rigs[number], world) for number in range(plan.num_clients)]
            async with asyncio.TaskGroup() as group:
                group.create_task(killer.run())
                for client in clients:
                    group.create_task(client.run(lambda: killer.done and world.num_operations >= plan.num_operations))
            await clients[0].read_everything()
    result = Result(plan, world, killer.kills, run_s=time.monotonic() - started)
    started = time.monotonic()
    result.violations = world.history.check()
    result.check_s = time.monotonic() - started
    return result


@contextlib.asynccontextmanager
async def _two_catalogs(etcd: EtcdServer | EtcdCluster, folder: Path) -> AsyncIterator[list[CatalogProcess]]:
    catalogs = [CatalogProcess(etcd, folder / f"catalog-{number}.log", **_CATALOG) for number in range(2)]
    try:
        for catalog in catalogs:
            await catalog.start()
        yield catalogs
    finally:
        for catalog in catalogs:
            catalog.stop()
