"""Does one engine serve a catalog far larger than any memory, and each policy by its own adapter?
``python -m bench.sweep --help``

One SGLang engine over a tiny random base, one loader, inference, catalog, etcd and object store, each a process of its
own on this machine. Every adapter is different, is stored in the object store and is asked for by the alias of a
policy; all caches hold a small share of them, so most requests begin with a fetch from the object store. What each must
answer comes from plain torch; see :mod:`bench.support.reference`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import torch
import uvloop

from bench.support.clients import clients_of
from bench.support.cold_steps import ColdSteps, loader_status
from bench.support.population import BASE, count_policies, import_policies, store_blobs
from bench.support.random_adapters import MODULES, RandomAdapters
from bench.support.reference import Reference
from bench.support.report import RESULTS, Report, Target
from bench.support.serving import Memory, Serving
from bench.support.sweeping import Lap, Sweeper, Times
from bench.support.timing import quantile
from mint_api.v1 import policy_service_pb2 as policy_pb
from mint_blobs.s3 import S3ObjectStore
from mint_cli.model import fetch_model
from mint_client import MintClient
from mint_core.base_model import digest_of_folder
from support.tiny_models import make_tiny_llama

TARGETS: Final = {
    "num_wrong": Target(at_most=0),
    "p50_drift": Target(at_most=1.2),
    "p99_drift": Target(at_most=1.2),
    "pss_drift": Target(at_most=1.1),
    "differs_from_base": Target(at_least=0.95),
    "differs_from_neighbours": Target(at_least=0.95),
}
_PROMPT: Final = (17, 203, 88, 311, 42, 150, 9, 264)
_MAX_LAP: Final = 400
_NUM_LAPS: Final = 100
_NUM_STEPS: Final = 40
"""Adapters whose cold request is also taken step by step."""
_NUM_RESIDENTS: Final = 16
"""Adapters that are asked again and again while the engine holds them."""
_OTHERS: Final = ("etcd", "weed")
"""Processes that are not MinT's."""


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.num: int = options.num
        options.catalog = options.catalog or 10 * options.num
        self.num_catalog: int = options.catalog
        self.num_cached = max(_NUM_RESIDENTS, int(options.cached * options.num))
        # Beyond those that are counted: what fills the caches before, and what is taken step by step after.
        self.num_blobs = self.num + self.num_cached + 2 * _NUM_STEPS
        name = "sweep" if options.base == "random" else f"sweep-{options.base}"
        places = ("dir", "kept", "fill_only")
        self.report = Report(name, {key: each for key, each in vars(options).items() if key not in places}, TARGETS)
        base = make_tiny_llama(folder / "base", options.seed) if options.base == "random" else fetch_model().folder
        self.adapters = RandomAdapters(
            base, folder, rank=options.rank, deviation=options.deviation, seed=options.seed, modules=options.modules
        )
        self.reference = Reference(base, self.adapters)
        self.base_digest = digest_of_folder(base, use_cache=False).digest
        self.filled = folder / "filled.json"
        if not self.filled.exists():
            shutil.rmtree(folder / "installation", ignore_errors=True)
        self.serving = Serving(folder / "installation", base, BASE, cache_entries=self.num_cached)
        self.digests: list[str] = []

    async def run(self) -> None:
        self._check_reference()
        async with self.serving.storage():
            await self._fill()
            if self.options.fill_only:
                return
            shutil.rmtree(self.serving.cache_dir, ignore_errors=True)
            async with self._node() as client:
                sweeper = Sweeper(
                    client,
                    self.adapters,
                    self.reference,
                    _PROMPT,
                    self.digests,
                    num_tokens=self.options.tokens,
                    num_callers=self.options.callers,
                    tolerance=self.options.tolerance,
                )
                # It begins with full caches, as it goes on.
                warm = await sweeper.ask(range(self.num, self.num + self.num_cached))
                self.report.say(f"{len(warm.answers)} adapters fill the caches")
                await self._sweep(sweeper)
                await self._ask_residents(sweeper)
                steps = ColdSteps(self.serving, client, sweeper)
                for name, milliseconds in (await steps.measured(self.num + self.num_cached, _NUM_STEPS)).items():
                    self.report.detail(f"alone_{name}_ms", milliseconds)
        self.report.finish()

    def _check_reference(self) -> None:
        difference = self.reference.check([0, 1, 2, self.num_blobs - 1], _PROMPT)
        self.report.detail("merged_max_difference", difference)
        if difference > self.options.tolerance / 10:
            raise RuntimeError(f"updates in rows and merged weights differ by {difference}: the expectation is wrong")

    async def _fill(self) -> None:
        """Storage and catalog, unless they were filled before, with the same."""
        settings = {
            "num_blobs": self.num_blobs,
            "num_catalog": self.num_catalog,
            "base": self.base_digest,
            **{key: vars(self.options)[key] for key in ("rank", "deviation", "modules", "seed")},
        }
        if not self.filled.exists():
            await self._populate()
            self.filled.write_text(json.dumps({"settings": settings, "digests": self.digests}))
            return
        found = json.loads(self.filled.read_text())
        if found["settings"] != settings:
            raise RuntimeError(f"{self.filled} is of {found['settings']}, not of {settings}; name another folder")
        self.digests = found["digests"]

    async def _populate(self) -> None:
        """Store all adapters and fill the catalog; several policies share an adapter, and one of them is asked."""
        begun = time.perf_counter()
        self.report.say(f"storing {self.num_blobs} adapters of {self.adapters.size_bytes} bytes")

        def progress(num_done: int, step: int, what: str, total: int) -> None:
            every = max(1000, total // 10)
            if num_done // every != (num_done - step) // every:
                self.report.say(f"    {num_done} of {total} {what}, {num_done / (time.perf_counter() - begun):.0f}/s")

        async with clients_of(self.serving.catalog) as clients, S3ObjectStore(self.serving.store_settings) as store:
            blobs = await store_blobs(
                clients.public,
                clients.runtime,
                store,
                self.num_blobs,
                make=self.adapters.blob,
                base_digest=self.base_digest,
                read_back=False,
                progress=lambda done: progress(done, 1, "adapters", self.num_blobs),
            )
            self.report.detail("stored_s", time.perf_counter() - begun)
            begun = time.perf_counter()
            self.report.say(f"importing {self.num_catalog} policies")
            names = max(self.num_catalog, self.num_blobs)
            await import_policies(
                clients.public,
                range(names),
                blobs,
                adjust=self._describe,
                progress=lambda done: progress(done, 500, "policies", names),
            )
            self.report.detail("imported_s", time.perf_counter() - begun)
            # Reading maps etcd's file into its memory: all of it from here on, or each request would seem to cost some.
            num_listed = await count_policies(clients.public)
            if num_listed != names:
                raise RuntimeError(f"{num_listed} policies are listed, {names} were imported")
        self.digests = [blob.digest for blob in blobs]
        if len(set(self.digests)) != self.num_blobs:
            raise RuntimeError("two adapters have the same digest")

    def _describe(self, request: policy_pb.CreatePolicyRequest) -> None:
        request.policy.lora.rank, request.policy.lora.alpha = self.adapters.rank, 2 * self.adapters.rank
        request.policy.lora.target_modules[:] = sorted({each.rpartition(".")[2] for each in self.adapters.modules})
        for revision in request.revisions:
            revision.num_tensors = self.adapters.num_tensors

    def _node(self) -> contextlib.AbstractAsyncContextManager[MintClient]:
        """Loader, engine and inference, whose caches hold no more than the disk's share."""
        return self.serving.node(
            loader={"max_cache_bytes": int(self.options.cached * self.num * self.adapters.size_bytes)},
            engine={"sglang": {"dtype": "float32", "max_lora_rank": self.adapters.rank}},
            inference={"max_cached_names": self.num_cached},
        )

    async def _sweep(self, sweeper: Sweeper) -> None:
        options, report = self.options, self.report
        random = np.random.default_rng(options.seed)
        order = random.permutation(self.num)
        length = min(_MAX_LAP, max(20, self.num // _NUM_LAPS))
        misses, cpu_before = (await loader_status(self.serving)).num_misses, self.serving.cpu_s()
        times = Times()
        memory: list[tuple[int, dict[str, Memory]]] = []
        begun, asking_s, num_requests = time.perf_counter(), 0.0, 0
        for start in range(0, self.num, length):
            numbers = [int(each) for each in order[start : start + length]]
            num_again = int(options.again * len(numbers)) if start else 0
            lately = order[max(0, start - 3 * self.num_cached) : start]
            again = [int(each) for each in random.choice(lately, num_again)] if num_again else []
            lap = await sweeper.ask(numbers, again, times)
            asking_s += lap.seconds
            num_requests += len(numbers) + len(again)
            done = start + len(numbers)
            if done * _NUM_LAPS // self.num != start * _NUM_LAPS // self.num:
                self.serving.check()
                memory.append((done, self.serving.memory()))
                self._say_progress(sweeper, lap, done, num_requests / asking_s, memory[-1][1])
        misses = (await loader_status(self.serving)).num_misses - misses
        self._figures(sweeper, times)
        report.figure("cold_fraction", misses / num_requests)
        self._memory_figures(memory)
        report.detail("num_requests", num_requests)
        report.detail("requests_per_s", num_requests / asking_s)
        report.detail("sweep_minutes", (time.perf_counter() - begun) / 60)
        self._cpu_details("cpu_ms", cpu_before, num_requests)

    async def _ask_residents(self, sweeper: Sweeper) -> None:
        """What a request costs without a load, to be compared with what it cost with one."""
        numbers = list(range(self.num, self.num + _NUM_RESIDENTS))
        await sweeper.ask(numbers)
        cpu_before = self.serving.cpu_s()
        lap = await sweeper.ask(numbers * 10)
        self.report.detail("resident_requests_per_s", len(lap.answers) / lap.seconds)
        self._cpu_details("resident_cpu_ms", cpu_before, len(lap.answers))

    def _cpu_details(self, key: str, before: dict[str, float], num_requests: int) -> None:
        """Time on a core for each request by process."""
        for name, seconds in sorted(self.serving.cpu_s().items()):
            self.report.detail(f"{key}_{name}", (seconds - before.get(name, 0.0)) * 1e3 / num_requests)

    def _say_progress(self, sweeper: Sweeper, lap: Lap, done: int, per_s: float, memory: dict[str, Memory]) -> None:
        loads = [answer.load_s for answer in lap.answers]
        mebibytes = {name: each.pss / 2**20 for name, each in memory.items()}
        self.report.say(
            f"    {done} of {self.num}, {per_s:.1f}/s, load p50 {quantile(loads, 0.5) * 1e3:.1f} ms, "
            f"wrong {sweeper.num_wrong}, failed {sweeper.num_failed}, PSS {sum(mebibytes.values()):.0f} MiB ("
            + ", ".join(f"{name} {each:.0f}" for name, each in mebibytes.items())
            + ")"
        )

    def _figures(self, sweeper: Sweeper, times: Times) -> None:
        report = self.report
        report.figure("num_adapters", sum(sweeper.is_right[: self.num]))
        report.figure("num_catalog", max(self.num_catalog, self.num_blobs))
        report.figure("num_wrong", sweeper.num_wrong)
        report.detail("num_compared_in_float64", sweeper.num_compared_exactly)
        report.detail("num_failed", sweeper.num_failed)
        report.detail("num_retries", sweeper.num_retries)
        report.detail("max_logprob_difference", sweeper.max_difference)
        tenth = max(1, len(times.load_s) // 10)
        for kind, seconds in (("load", times.load_s), ("total", times.total_s)):
            for q in (50, 99):
                first, last = (quantile(part, q / 100) * 1e3 for part in (seconds[:tenth], seconds[-tenth:]))
                report.detail(f"{kind}_p{q}_first_ms", first)
                report.detail(f"{kind}_p{q}_last_ms", last)
                if kind == "load":
                    report.figure(f"p{q}_drift", last / first)
        tops = np.array(times.top_tokens)
        base_top = int(self.reference.of_base(_PROMPT, [0]).best_tokens[0, 0])
        report.figure("differs_from_base", float(np.mean(tops != base_top)))
        report.figure("differs_from_neighbours", float(np.mean(tops[1:] != tops[:-1])))
        report.detail("same_top_1_of_any_two", float(np.sum((np.bincount(tops) / len(tops)) ** 2)))

    def _memory_figures(self, memory: list[tuple[int, dict[str, Memory]]]) -> None:
        """Medians of each tenth, for etcd's and SeaweedFS's heaps go up and down: the second tenth's, and the one after
        it that is furthest from it."""
        tenths: dict[int, list[dict[str, Memory]]] = {}
        for done, each in memory:
            tenths.setdefault(min(9, 10 * (done - 1) // self.num), []).append(each)
        later = [each for tenth in range(1, 10) for each in tenths.get(tenth, [])]

        def drift(names: tuple[str, ...], *, anonymous: bool = False) -> float:
            def total(each: dict[str, Memory]) -> int:
                return sum(each[name].anonymous if anonymous else each[name].pss for name in names)

            medians = [statistics.median(map(total, tenths[tenth])) for tenth in range(1, 10) if tenth in tenths]
            return max(max(medians) / medians[0], medians[0] / min(medians))

        names = tuple(later[0])
        self.report.figure("pss_drift", drift(names))
        samples = [sum(each[name].pss for name in names) for each in later]
        self.report.detail("pss_drift_of_samples", max(max(samples) / samples[0], samples[0] / min(samples)))
        self.report.detail("pss_drift_mint", drift(tuple(name for name in names if name not in _OTHERS)))
        self.report.detail("anonymous_drift", drift(names, anonymous=True))
        for name in names:
            for when, each in (("tenth", later[0][name]), ("end", later[-1][name])):
                self.report.detail(f"pss_mb_{name}_{when}", each.pss / 2**20)
                self.report.detail(f"anonymous_mb_{name}_{when}", each.anonymous / 2**20)


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--num", type=int, default=100_000, help="distinct adapters, each of them asked")
    parser.add_argument("--catalog", type=int, default=0, help="policies in the catalog; ten for each adapter if 0")
    parser.add_argument("--cached", type=float, default=0.02, help="share of the adapters that caches may hold")
    parser.add_argument("--again", type=float, default=0.1, help="share of requests that repeat an earlier one")
    parser.add_argument("--callers", type=int, default=4, help="requests in flight")
    parser.add_argument("--tokens", type=int, default=2, help="generated by each request")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--deviation", type=float, default=0.2, help="of the numbers in A and B")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a log-probability")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", choices=("random", "smollm2"), default="random")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help="of each layer, that adapters change")
    parser.add_argument("--dir", type=Path, default=None, help="where the servers keep their data meanwhile")
    parser.add_argument("--kept", type=Path, default=None, help="a folder that is filled once and used again")
    parser.add_argument("--fill-only", action="store_true", help="fill the folder that is kept, and no more")
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    if options.kept is not None:
        options.kept.mkdir(parents=True, exist_ok=True)
        lock = (options.kept / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run has {options.kept}; wait for its end, or name another folder") from None
    folder = options.kept or Path(tempfile.mkdtemp(prefix="mint-bench-sweep-", dir=options.dir))
    try:
        uvloop.run(Bench(options, folder).run())
    except BaseException:
        logs = folder / "installation" / "logs"
        if logs.exists():
            shutil.copytree(logs, RESULTS / "sweep-logs", dirs_exist_ok=True)
            print(f"the processes' logs are in {RESULTS / 'sweep-logs'}", flush=True)
        raise
    finally:
        if folder != options.kept:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
