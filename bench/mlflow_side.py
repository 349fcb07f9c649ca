"""The catalog and MLflow's registry side by side: create, set an alias, resolve it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from bench.support.mlflow import Caller, drive
from bench.support.population import alias_name, policy_request
from bench.support.report import Report
from bench.support.timing import latencies_s, throughput
from mint_api.v1 import common_pb2, policy_service_pb2

__all__ = ["side_by_side"]

_NUM_MODELS: Final = 500
"""Enough that an alias moves a handful of times, as aliases do; the catalog keeps the history of its moves."""
_NUM_CALLS: Final = 100
_NUM_CALLERS: Final = 8


class Clients(Protocol):
    """The catalog, as far as it is compared."""

    async def create(self, request: policy_service_pb2.CreatePolicyRequest) -> Any: ...
    async def promote(self, name: str, number: int) -> Any: ...
    async def resolve(self, name: str, *, strong: bool = False) -> Any: ...


async def side_by_side(
    report: Report, clients: Clients, port: int, blobs: list[common_pb2.BlobRef], first: int, num_reps: int
) -> None:
    """Measure each operation on both, one caller and eight, in turns; ``first`` is a free policy number.

    A figure is the smaller one of two ratios: of the medians of the latency with one caller, and of the throughput with
    eight. What is created is a model with one version, and a policy with one revision. An alias moves back and forth
    between two versions, so that each call writes. The catalog resolves as its clients do, out of its cache;
    ``vs_mlflow_resolve_strong`` is the same with an etcd read for each call.
    """
    for number in range(_NUM_MODELS):
        await clients.create(policy_request(first + number, blobs, num_revisions=2))
    await asyncio.to_thread(_prepare, port)
    created, promoted = itertools.count(), itertools.count()

    async def create(_: int) -> None:
        await clients.create(policy_request(first + _NUM_MODELS + next(created), blobs))

    async def promote(_: int) -> None:
        number = next(promoted)
        await clients.promote(alias_name(first + number % _NUM_MODELS), 2 - number // _NUM_MODELS % 2)

    async def resolve(number: int) -> None:
        await clients.resolve(alias_name(first + number % _NUM_MODELS))

    async def resolve_strong(number: int) -> None:
        await clients.resolve(alias_name(first + number % _NUM_MODELS), strong=True)

    others, others_promoted = itertools.count(), itertools.count()

    def other_create(caller: Caller, _: int) -> None:
        caller.create(f"created-{next(others)}")

    def other_promote(caller: Caller, _: int) -> None:
        number = next(others_promoted)
        caller.set_alias(f"model-{number % _NUM_MODELS}", 2 - number // _NUM_MODELS % 2)

    def other_resolve(caller: Caller, number: int) -> None:
        caller.resolve(f"model-{number % _NUM_MODELS}")

    pairs: dict[str, tuple[Callable[[int], Awaitable[None]], Callable[[Caller, int], object]]] = {
        "create": (create, other_create),
        "alias": (promote, other_promote),
        "resolve": (resolve, other_resolve),
        "resolve_strong": (resolve_strong, other_resolve),
    }
    for name, (ours, theirs) in pairs.items():
        ratios = await _compare(report, name, ours, theirs, port, num_reps)
        if name.endswith("strong"):
            report.detail(f"vs_mlflow_{name}", min(ratios))
        else:
            report.figure(f"vs_mlflow_{name}", min(ratios))


def _prepare(port: int) -> None:
    caller = Caller(port)
    for number in range(_NUM_MODELS):
        caller.create(f"model-{number}", num_versions=2)
        caller.set_alias(f"model-{number}", 1)


async def _compare(
    report: Report,
    name: str,
    ours: Callable[[int], Awaitable[None]],
    theirs: Callable[[Caller, int], object],
    port: int,
    num_reps: int,
) -> tuple[float, float]:
    """How many times faster ours is: by latency with one caller, by throughput with several."""
    latency: dict[str, list[float]] = {"mint": [], "mlflow": []}
    per_s: dict[str, list[float]] = {"mint": [], "mlflow": []}
    for rep in range(-1, num_reps):  # the first one warms both up
        alone = await latencies_s(ours, _NUM_CALLS)
        together, _ = await throughput(ours, num_callers=_NUM_CALLERS, seconds=1.0)
        their_alone = await asyncio.to_thread(drive, port, theirs, num_callers=1, num_calls=_NUM_CALLS)
        their_together = await asyncio.to_thread(
            drive, port, theirs, num_callers=_NUM_CALLERS, num_calls=2 * _NUM_CALLS
        )
        if rep >= 0:
            latency["mint"].append(statistics.median(alone))
            latency["mlflow"].append(statistics.median(their_alone[:-1]))
            per_s["mint"].append(together)
            per_s["mlflow"].append(2 * _NUM_CALLS / their_together[-1])
    for side in ("mint", "mlflow"):
        report.detail(f"{side}_{name}_p50_ms", statistics.median(latency[side]) * 1e3)
        report.detail(f"{side}_{name}_per_s_8", statistics.median(per_s[side]))
    return (
        statistics.median(latency["mlflow"]) / statistics.median(latency["mint"]),
        statistics.median(per_s["mint"]) / statistics.median(per_s["mlflow"]),
    )
