"""What should leave a node's full disk first? ``python -m bench.eviction --help``

Each policy of ``mint_loader.eviction`` serves the same requests, drawn by a seed, with a disk of the same bytes, in a
simulation that uses the loader's own order of eviction and nothing else of it. Requests are for policies, Zipf
distributed; a policy is served by its newest revision. Sizes are those of ranks 4 to 64, most of them small.

=========  ==========================================================================================
``zipf``   nothing changes: the popular stay popular
``train``  policies are trained while they are served: a publication replaces what one is served by
``drift``  what is popular moves through the catalog
``scan``   ``zipf``, and now and then all is asked for once, in order, as by an evaluation
=========  ==========================================================================================

A figure is the time that a policy spends fetching over that of LRU: the mean over the traces of the medians over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bench.support.report import Report, Target
from mint_loader.eviction import FETCH_OVERHEAD_BYTES, POLICIES, EvictionOrder, EvictionPolicy, Gdsf

TARGETS: Final = {"gdsf_over_lru": Target(at_most=1.0), "use_us": Target(at_most=50)}
_RANKS: Final = (4, 8, 16, 32, 64)
_NUM_OF_RANK: Final = (8, 8, 4, 2, 1)
_BYTES_PER_RANK: Final = 300_000
"""About that of an adapter of SmolLM2 with all its linear modules."""

Request = tuple[int, int]
"""A policy and the revision that serves it now."""


@dataclass(slots=True)
class Outcome:
    """What one cache did."""

    num_requests: int = 0
    num_hits: int = 0
    cost: float = 0.0
    """Bytes fetched, and for each fetch the bytes that could have been fetched in the time it costs beyond them."""
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.num_hits / self.num_requests


class Trace:
    """Requests by a seed."""

    def __init__(self, name: str, options: argparse.Namespace, seed: int) -> None:
        self.name = name
        self._random = random.Random(seed)
        self._num: int = options.num
        self._num_requests: int = options.requests
        self._share_published: float = options.publish
        weights = [rank**-options.alpha for rank in range(1, self._num + 1)]
        self._cumulated = list(itertools.accumulate(weights))
        self._names = list(range(self._num))
        self._random.shuffle(self._names)  # or the popular would be neighbours in a scan
        ranks = self._random.choices(_RANKS, _NUM_OF_RANK, k=self._num)
        self.sizes = [rank * _BYTES_PER_RANK for rank in ranks]

    def __iter__(self) -> Iterator[Request]:
        revisions = [0] * self._num
        for number in range(self._num_requests):
            if self.name == "scan" and number % (self._num_requests // 5) == 0:
                yield from ((policy, 0) for policy in range(0, self._num, 4))
            at = bisect(self._cumulated, self._random.random() * self._cumulated[-1])
            if self.name == "drift":  # at the end the popular are those of a tenth of the catalog further on
                at += number * self._num // (10 * self._num_requests)
            policy = self._names[at % self._num]
            if self.name == "train" and self._random.random() < self._share_published:
                revisions[policy] += 1
            yield policy, revisions[policy]


def serve(requests: list[Request], sizes: list[int], policy: EvictionPolicy, max_bytes: int) -> Outcome:
    """Serve a trace with a disk of ``max_bytes``."""
    order = EvictionOrder(policy)
    used_bytes = 0
    outcome = Outcome(len(requests))
    size_of: dict[str, int] = {}
    begun = time.perf_counter()
    for number, (name, revision) in enumerate(requests):
        digest, size_bytes = f"{name}/{revision}", sizes[name]
        if digest in order:
            outcome.num_hits += 1
        else:
            outcome.cost += size_bytes + FETCH_OVERHEAD_BYTES
            while used_bytes + size_bytes > max_bytes and (left := order.take_least(lambda _: True)) is not None:
                used_bytes -= size_of.pop(left)
            used_bytes += size_bytes
            size_of[digest] = size_bytes
        order.use(digest, size_bytes, float(number))
    outcome.seconds = time.perf_counter() - begun
    return outcome


TRACES: Final = ("zipf", "train", "drift", "scan")
# GDSF is told what a fetch costs beyond its bytes; how wrong may that be?
_COMPETITORS: Final[dict[str, Callable[[], EvictionPolicy]]] = {
    **POLICIES,
    "gdsf_cost_quarter": lambda: Gdsf(FETCH_OVERHEAD_BYTES // 4),
    "gdsf_cost_fourfold": lambda: Gdsf(FETCH_OVERHEAD_BYTES * 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20_000, help="policies")
    parser.add_argument("--requests", type=int, default=100_000, help="requests of one trace")
    parser.add_argument("--alpha", type=float, default=0.9, help="exponent of Zipf's law")
    parser.add_argument("--share", type=float, default=0.05, help="disk over all bytes of one revision of each policy")
    parser.add_argument("--publish", type=float, default=0.02, help="publications by request, in 'train'")
    parser.add_argument("--reps", type=int, default=5, help="seeds")
    options = parser.parse_args()
    report = Report("eviction", vars(options), TARGETS)
    ratios: dict[str, list[float]] = {name: [] for name in _COMPETITORS}
    use_us: dict[str, list[float]] = {name: [] for name in _COMPETITORS}
    for trace_name in TRACES:
        outcomes: dict[str, list[Outcome]] = {name: [] for name in _COMPETITORS}
        for seed in range(options.reps):
            trace = Trace(trace_name, options, seed)
            requests = list(trace)
            max_bytes = int(options.share * sum(trace.sizes))
            for name, make in _COMPETITORS.items():
                outcomes[name].append(serve(requests, trace.sizes, make(), max_bytes))
        for name, each in outcomes.items():
            costs = zip(each, outcomes["lru"], strict=True)
            ratios[name].append(statistics.median(one.cost / lru.cost for one, lru in costs))
            use_us[name] += [1e6 * one.seconds / one.num_requests for one in each]
            if name in POLICIES:
                report.detail(f"{trace_name}_{name}_cost", ratios[name][-1])
                report.detail(f"{trace_name}_{name}_hit_rate", statistics.median(one.hit_rate for one in each))
    for name in _COMPETITORS:
        if name != "lru":
            report.figure(f"{name}_over_lru", statistics.mean(ratios[name]))
            report.figure(f"{name}_worst_trace", max(ratios[name]))
    for name in POLICIES:
        report.detail(f"{name}_us", statistics.median(use_us[name]))
    report.figure("use_us", statistics.median(use_us["gdsf"]))
    report.finish()


if __name__ == "__main__":
    main()
