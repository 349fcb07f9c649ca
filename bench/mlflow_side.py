"""The catalog and MLflow's registry side by side: create, set an alias, resolve it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from bench.support.mlflow import Arguments, Taken
from bench.support.population import alias_name, policy_request
from bench.support.raw_etcd import RawEtcd
from bench.support.report import Report
from bench.support.timing import latencies_s, median_s, throughput
from mint_api.v1 import common_pb2, policy_service_pb2
from mint_client import MintClient

__all__ = ["Catalog", "OwnClient", "Pair", "SideBySide"]

_NUM_MODELS: Final = 500
"""Enough that an alias moves a handful of times, as aliases do; the catalog keeps the history of its moves."""
_NUM_CALLS: Final = 100
_NUM_CALLERS: Final = 8
_STRONG: Final = common_pb2.Consistency(strong=True)


class Catalog(Protocol):
    """The catalog, as far as it is compared."""

    async def create(self, request: policy_service_pb2.CreatePolicyRequest) -> Any: ...
    async def promote(self, name: str, number: int) -> Any: ...
    async def resolve(self, name: str, *, strong: bool = False) -> Any: ...


class OwnClient:
    """The catalog by ``mint_client``, as its users call it."""

    def __init__(self, client: MintClient) -> None:
        self._client = client

    async def create(self, request: policy_service_pb2.CreatePolicyRequest) -> Any:
        policy = request.policy
        return await self._client.policies.create(
            request.parent.removeprefix("tenants/"),
            request.policy_id,
            base_model=policy.base_model,
            lora=policy.lora,
            labels=policy.labels,
            owner=policy.owner,
            description=policy.description,
            revisions=request.revisions,
            aliases=request.aliases,
        )

    async def promote(self, name: str, number: int) -> Any:
        return await self._client.aliases.promote(name, number, reason="bench")

    async def resolve(self, name: str, *, strong: bool = False) -> Any:
        return await self._client.aliases.resolve(name, consistency=_STRONG if strong else None)


Driver = Callable[[str, Arguments, int], Taken]
"""Makes calls to MLflow."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One way to call each side."""

    suffix: str
    mint: Catalog
    mlflow: Driver


@dataclass(slots=True)
class SideBySide:
    """Both registries, called by their own clients and by the least that a call can be (``_rest``), in turns.

    A figure is the smaller one of two ratios: of the medians of the latency with one caller, and of the throughput with
    eight. What is created is a model with one version, and a policy with one revision. An alias moves back and forth
    between two versions, so that each call writes. The catalog resolves as its clients do, out of its cache;
    ``resolve_strong`` is the same with an etcd read for each call.
    """

    report: Report
    raw: RawEtcd
    pairs: Sequence[Pair]
    blobs: list[common_pb2.BlobRef]
    first: int
    """A free policy number, and all after it."""
    num_reps: int
    _created: Iterator[int] = field(default_factory=itertools.count)
    _promoted: Iterator[int] = field(default_factory=itertools.count)
    _their_created: Iterator[int] = field(default_factory=itertools.count)
    _their_promoted: Iterator[int] = field(default_factory=itertools.count)

    async def prepare(self) -> None:
        """What is moved and resolved."""
        for number in range(_NUM_MODELS):
            await self.pairs[0].mint.create(policy_request(self.first + number, self.blobs, num_revisions=2))
        names = [f"model-{number}" for number in range(_NUM_MODELS)]
        driver = self.pairs[-1].mlflow
        await asyncio.to_thread(driver, "create", [[name, 2] for name in names], 1)
        await asyncio.to_thread(driver, "set_alias", [[name, 1] for name in names], 1)

    async def run(self) -> None:
        """Every operation; the figures by own clients, what is behind them, and the same by REST."""
        for operation in ("create", "alias", "resolve", "resolve_strong"):
            for pair, ratio in zip(self.pairs, await self.compare(operation), strict=True):
                is_figure = not pair.suffix and operation != "resolve_strong"
                tell = self.report.figure if is_figure else self.report.detail
                tell(f"vs_mlflow_{operation}{pair.suffix}", ratio)

    async def compare(self, operation: str, suffix: str = "") -> list[float]:
        """How many times faster the catalog is, for each pair."""
        latency: dict[str, list[float]] = {}
        per_s: dict[str, list[float]] = {}
        floor: list[float] = []
        for rep in range(-1, self.num_reps):  # the first one warms both up
            if operation == "alias":
                floor.append(await median_s(self._put, _NUM_CALLS))
            for pair in self.pairs:
                ours = self._ours(pair.mint, operation)
                alone = await latencies_s(ours, _NUM_CALLS)
                together, _ = await throughput(ours, num_callers=_NUM_CALLERS, seconds=1.0)
                call, arguments = self._theirs(operation, _NUM_CALLS)
                their_alone = await asyncio.to_thread(pair.mlflow, call, arguments, 1)
                call, arguments = self._theirs(operation, 2 * _NUM_CALLS)
                their_together = await asyncio.to_thread(pair.mlflow, call, arguments, _NUM_CALLERS)
                if rep >= 0:
                    mint, other = f"mint_{operation}{pair.suffix}{suffix}", f"mlflow_{operation}{pair.suffix}{suffix}"
                    latency.setdefault(mint, []).append(statistics.median(alone))
                    latency.setdefault(other, []).append(statistics.median(their_alone.each_s))
                    per_s.setdefault(mint, []).append(together)
                    per_s.setdefault(other, []).append(len(arguments) / their_together.seconds)
        for side in latency:
            self.report.detail(f"{side}_p50_ms", statistics.median(latency[side]) * 1e3)
            self.report.detail(f"{side}_per_s_8", statistics.median(per_s[side]))
        if floor:
            self.report.detail(f"etcd_put{suffix}_p50_ms", statistics.median(floor[1:]) * 1e3)
        ratios = []
        for pair in self.pairs:
            mint, other = f"mint_{operation}{pair.suffix}{suffix}", f"mlflow_{operation}{pair.suffix}{suffix}"
            alone_ratio = statistics.median(a / b for a, b in zip(latency[other], latency[mint], strict=True))
            together_ratio = statistics.median(a / b for a, b in zip(per_s[mint], per_s[other], strict=True))
            ratios.append(min(alone_ratio, together_ratio))
        return ratios

    def _ours(self, catalog: Catalog, operation: str) -> Callable[[int], Awaitable[None]]:
        async def create(_: int) -> None:
            number = self.first + _NUM_MODELS + next(self._created)
            await catalog.create(policy_request(number, self.blobs))

        async def promote(_: int) -> None:
            number = next(self._promoted)
            await catalog.promote(alias_name(self.first + number % _NUM_MODELS), 2 - number // _NUM_MODELS % 2)

        async def resolve(number: int) -> None:
            await catalog.resolve(alias_name(self.first + number % _NUM_MODELS))

        async def resolve_strong(number: int) -> None:
            await catalog.resolve(alias_name(self.first + number % _NUM_MODELS), strong=True)

        return {"create": create, "alias": promote, "resolve": resolve, "resolve_strong": resolve_strong}[operation]

    async def _put(self, number: int) -> None:
        """What a move of an alias costs at the least: one durable write of its size."""
        await self.raw.put(b"/bench/floor/%d" % (number % _NUM_MODELS), b"x" * 256)

    def _theirs(self, operation: str, num_calls: int) -> tuple[str, Arguments]:
        if operation == "create":
            return "create", [[f"created-{next(self._their_created)}", 1] for _ in range(num_calls)]
        if operation == "alias":
            numbers = itertools.islice(self._their_promoted, num_calls)
            moves = [[f"model-{number % _NUM_MODELS}", 2 - number // _NUM_MODELS % 2] for number in numbers]
            return "set_alias", moves
        return "resolve", [[f"model-{number % _NUM_MODELS}"] for number in range(num_calls)]
