"""How long from the last optimizer step to the first token of the new weights? ``python -m bench.handoff --help``

A whole MinT hands over an adapter. In turns with it, a trainer and an engine without adapters hand over the same base
with an adapter of the same size merged into it. Both engines stay up; both use one object store; of the new weights
nothing lies on the engine's node before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.support.adapter_way import AdapterWay, Handoff, adapter_way
from bench.support.bases import DENSE_LARGE, MOE, make_base
from bench.support.json_child import JsonChild
from bench.support.report import Report, Target
from mint_cli.model import fetch_model
from mint_engine.sglang_settings import DEFAULT_TARGET_MODULES
from support.stack import Stack, running_stack

TARGETS: Final = {"dense_large_speedup": Target(at_least=18.3), "moe_speedup": Target(at_least=2.85)}
_MEGABYTE: Final = 1e6
_NUM_PROMPT_TOKENS: Final = 16
_VOCAB_SIZE: Final = 384
"""Of the smallest tokenizer among the bases."""


@dataclass(frozen=True, slots=True)
class Case:
    """One base."""

    make: Callable[[], Path]
    has_experts: bool = False


CASES: Final = {
    "dense_small": Case(lambda: fetch_model().folder),
    "dense_large": Case(lambda: make_base(DENSE_LARGE)),
    "moe": Case(lambda: make_base(MOE), has_experts=True),
}


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        settings = {key: value for key, value in vars(options).items() if key != "dir"}
        self.report = Report("handoff", settings | {"cases": " ".join(options.cases)}, TARGETS)
        prompt = np.random.default_rng(options.seed).integers(3, _VOCAB_SIZE, _NUM_PROMPT_TOKENS)
        self.prompt: list[int] = prompt.tolist()

    async def run(self) -> None:
        for name in self.options.cases:
            folder = self.folder / name
            folder.mkdir()
            await self._case(name, CASES[name], folder)
            shutil.rmtree(folder, ignore_errors=True)
        self.report.finish()

    async def _case(self, name: str, case: Case, folder: Path) -> None:
        rank = self.options.rank
        base = case.make()
        num_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        self.report.say(f"{name}: {base.name}, {num_bytes / _MEGABYTE:,.0f} MB, rank {rank}")
        # Enough for what is asked here; the pool's size decides nothing but memory.
        engine = {
            "dtype": "bfloat16",
            "max_lora_rank": rank,
            "max_total_tokens": 4096,
            "max_running_requests": 8,
            "mem_fraction_static": 0.8,
        }
        environ = {f"MINT_ENGINE_SGLANG__{key}".upper(): str(value) for key, value in engine.items()}
        with running_stack(folder / "mint", base, "--dtype", "bfloat16", environ=environ, timeout_s=600) as stack:
            merged = JsonChild("bench.support.merge_reload", folder / "merge_reload.log")
            await merged.start()
            try:
                chosen = await merged.ask("start", **self._competitor(stack, folder, engine))
                self.report.say(f"  the competitor merges in {chosen['merge']}, {chosen['num_merged']} matrices")
                async with adapter_way(stack, rank=rank, alpha=2.0 * rank, has_experts=case.has_experts) as way:
                    taken = await self._in_turns(way, merged)
                await merged.ask("stop")
            finally:
                await merged.stop()
        self._tell(name, *taken)

    def _competitor(self, stack: Stack, folder: Path, engine: dict[str, Any]) -> dict[str, Any]:
        return {
            "base": str(stack.base),
            "folder": str(folder / "merged"),
            "store": stack.settings()["common"]["object_store"],
            "targets": list(DEFAULT_TARGET_MODULES),
            "rank": self.options.rank,
            "alpha": 2.0 * self.options.rank,
            "num_threads": stack.settings()["engine"]["num_threads"],
            "settings": engine,
        }

    async def _in_turns(self, way: AdapterWay, merged: JsonChild) -> tuple[list[Handoff], list[Handoff]]:
        """A B A B …, after one round that nobody looks at and in which the competitor's weights are checked too."""
        adapters: list[Handoff] = []
        merges: list[Handoff] = []
        for rep in range(self.options.reps + 1):
            await way.trainer.train(rep)
            await _settled()
            adapter = await way.handoff(self.prompt)
            await merged.ask("train", seed=rep)
            await _settled()
            answer = await merged.ask("handoff", prompt=self.prompt, check=rep == 0)
            merge = Handoff(answer["ms"], answer["size_bytes"], 2 * answer["size_bytes"], answer["logprob"])
            for one, others in ((adapter, adapters), (merge, merges)):
                if one.logprob in [other.logprob for other in others]:
                    raise RuntimeError(f"an earlier version answered with the same log-probability, {one.logprob}")
                others.append(one)
            self.report.say(f"    {_told(adapter)}  |  {_told(merge)}")
        return adapters[1:], merges[1:]

    def _tell(self, name: str, adapters: list[Handoff], merges: list[Handoff]) -> None:
        report = self.report
        ratios = [merge.total_ms / adapter.total_ms for adapter, merge in zip(adapters, merges, strict=True)]
        report.figure(f"{name}_speedup", statistics.median(ratios))
        report.detail(f"{name}_num_reps", len(ratios))
        report.detail(f"{name}_speedup_least", min(ratios))
        report.detail(f"{name}_speedup_most", max(ratios))
        for way, handoffs in (("adapter", adapters), ("merged", merges)):
            report.detail(f"{name}_{way}_ms", statistics.median(each.total_ms for each in handoffs))
            for part in handoffs[0].ms:
                report.detail(f"{name}_{way}_{part}_ms", statistics.median(each.ms[part] for each in handoffs))
            for part in handoffs[0].inside_ms:
                value = statistics.median(each.inside_ms[part] for each in handoffs)
                report.detail(f"{name}_{way}_export_{part}_ms", value)
            report.detail(f"{name}_{way}_mb", handoffs[-1].size_bytes / _MEGABYTE)
            report.detail(f"{name}_{way}_moved_mb", handoffs[-1].moved_bytes / _MEGABYTE)
        if name == "dense_large" or (name == "dense_small" and "dense_large" not in self.options.cases):
            report.figure("dense_bytes_fraction", adapters[-1].moved_bytes / merges[-1].moved_bytes)


async def _settled() -> None:
    """The disk has what the other way wrote: neither pays for the other's gigabytes."""
    await asyncio.to_thread(os.sync)


def _told(handoff: Handoff) -> str:
    parts = ", ".join(f"{name} {value:.0f}" for name, value in handoff.ms.items())
    return f"{handoff.total_ms:,.0f} ms ({parts})"


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.handoff", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--reps", type=int, default=5, help="rounds that count, in turns with the competitor")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where everything is kept meanwhile")
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="mint-bench-handoff-", dir=options.dir) as folder:
        asyncio.run(Bench(options, Path(folder)).run())
    sys.stdout.flush()


if __name__ == "__main__":
    main()
