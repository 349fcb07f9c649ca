"""How fast does an adapter of many experts get into a slot of a live engine? ``python -m bench.packed --help``

One SGLang engine of this project over a random Qwen3-MoE of many layers and experts and small widths. The same adapter
is loaded expert by expert and packed by SGLang's own disk loader, and packed by MinT's hook; everything is timed around
the engine's load call, from this process, in turns, files in the page cache. A load alone leaves the adapter in host
memory; the slot is occupied by another adapter meanwhile. Load and slot is one call that ends with the slot filled.

The large adapter lies there twice, with the same bytes: fetched from an object store by the client that loaders use,
and as it was packed, expert by expert. The first was written in large pieces, which the kernel keeps in large pages, so
that a new mapping costs little; the second lies in single ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import save_file

from bench.support.report import Report, Target
from bench.support.timing import interleaved
from mint_blobs.s3 import S3ObjectStore
from mint_core.base_model import digest_of_folder
from mint_engine.adapter_folder import AdapterRules, check_adapter_folder
from mint_engine.base_geometry import BaseGeometry
from mint_engine.sglang_plugin.fast_upload import SET_FAST_UPLOAD_METHOD
from mint_engine.sglang_settings import SglangSettings
from mint_lora import AdapterConfig, pack, read_header, write_serving_folder
from mint_lora.folders import CONFIG_NAME, WEIGHTS_NAME
from support.serving_adapters import adapter_shapes
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_qwen3_moe
from support.weed import WeedServer

TARGETS: Final = {
    "load_speedup": Target(at_least=20),
    "hook_load_speedup": Target(at_least=50),
    "hook_total_speedup": Target(at_least=30),
    "slot_over_memcpy": Target(at_most=2.0),
}
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL: Final = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_OCCUPANT: Final = "occupant"
_MEGABYTE: Final = 1e6


@dataclass(frozen=True, slots=True)
class Folders:
    """One adapter in the layouts that are compared."""

    packed: Path
    per_expert: Path
    digest: str
    size_bytes: int
    num_packed: int
    num_per_expert: int


def make_base(folder: Path, options: argparse.Namespace) -> Path:
    """A random Qwen3-MoE of the asked size, bfloat16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_tiny_qwen3_moe(folder)
    config = Qwen3MoeConfig.from_pretrained(
        folder,
        num_hidden_layers=options.layers,
        num_experts=options.experts,
        hidden_size=options.hidden,
        moe_intermediate_size=options.width,
    )
    torch.manual_seed(options.seed)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, rank: int, seed: int, targets: tuple[str, ...] = _ALL) -> Folders:
    """A random bfloat16 adapter, as PEFT saves it for each expert and packed."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    shapes = adapter_shapes(base, targets)
    for module, (in_features, out_features) in shapes.items():
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values.to(torch.bfloat16)
    config = AdapterConfig(
        rank=rank,
        # Not 1, which would save the work of scaling.
        alpha=2.0 * rank,
        target_modules=tuple({module.rpartition(".")[2] for module in shapes}),
        base_model=base.name,
        base_digest=digest_of_folder(base, use_cache=False).digest,
        dtype="bfloat16",
    )
    per_expert = folder / f"per-expert-{seed}"
    per_expert.mkdir(parents=True)
    save_file(tensors, per_expert / WEIGHTS_NAME, metadata=config.to_metadata())
    blob = pack(per_expert / WEIGHTS_NAME, folder / f"blob-{seed}.safetensors")
    packed = folder / blob.digest.removeprefix("sha256:")
    write_serving_folder(blob.path, packed)
    # The serving configuration names the same targets, rank and alpha: SGLang reads both layouts with it.
    (per_expert / CONFIG_NAME).write_text(json.dumps(blob.config.to_serving_config()))
    return Folders(
        packed,
        per_expert,
        blob.digest,
        (packed / WEIGHTS_NAME).stat().st_size,
        len(read_header(packed / WEIGHTS_NAME).tensors),
        len(tensors),
    )


async def fetch(adapter: Folders, folder: Path) -> Path:
    """The same serving folder once more, its weights from an object store as a node's loader gets them."""
    blob, key = folder / "fetched.safetensors", f"bench/{adapter.packed.name}"
    (folder / "weed").mkdir()
    weed = WeedServer(folder / "weed")
    weed.start()
    try:
        async with S3ObjectStore(weed.settings()) as store:
            await store.ensure_bucket()
            await store.put_file(key, adapter.packed / WEIGHTS_NAME, digest=adapter.digest)
            await store.get_file(key, blob, digest=adapter.digest, size_bytes=adapter.size_bytes)
    finally:
        weed.kill()
    fetched = folder / f"fetched-{adapter.packed.name}"
    write_serving_folder(blob, fetched)
    return fetched


class LiveEngine:
    """The engine under measurement: one free slot, which somebody occupies while nothing is measured."""

    def __init__(self, rig: SglangRig, occupant: Folders) -> None:
        self._engine = rig.engine
        self._occupant = occupant

    async def occupy(self) -> None:
        await self._engine.load(_OCCUPANT, self._occupant.packed, into_slot=True)

    async def use_hook(self, enabled: bool) -> None:
        rpc = self._engine._engine.collective_rpc
        await asyncio.to_thread(rpc, SET_FAST_UPLOAD_METHOD, enabled=enabled)

    async def load_s(self, folder: Path, *, hook: bool) -> float:
        """Seconds until the adapter is in host memory."""
        await self.use_hook(hook)
        begun = time.perf_counter()
        await self._engine.load("measured", folder, into_slot=False)
        taken = time.perf_counter() - begun
        await self._engine.unload("measured")
        return taken

    async def load_into_slot_s(self, folder: Path, *, hook: bool) -> float:
        """Seconds until the adapter is in the slot."""
        await self.use_hook(hook)
        begun = time.perf_counter()
        await self._engine.load("measured", folder, into_slot=True)
        taken = time.perf_counter() - begun
        await self._engine.unload("measured")
        await self._engine.warm(_OCCUPANT)
        return taken


def memcpy_s(source: np.ndarray, target: np.ndarray) -> float:
    """Seconds of one plain copy into memory that is already there."""
    begun = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - begun


def memcpy_mapped_s(file: Path, target: np.ndarray) -> float:
    """Seconds to map a file that is in the page cache and to copy it: what a load cannot go below."""
    begun = time.perf_counter()
    np.copyto(target, np.memmap(file, dtype=np.uint8, mode="r"))
    return time.perf_counter() - begun


def milliseconds(values: list[float]) -> float:
    return statistics.median(values) * 1e3


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        self.report = Report("packed", settings, TARGETS)

    async def run(self) -> None:
        self.base = make_base(self.folder / "base", self.options)
        if not self.options.skip_many:
            await self.many_tensors()
        await self.many_bytes()
        self.report.finish()

    async def many_tensors(self) -> None:
        """Where the number of tensors decides."""
        report, rank = self.report, self.options.rank
        adapter = make_adapter(self.base, self.folder / "many", rank=rank, seed=1)
        small = make_adapter(self.base, self.folder / "small", rank=rank, seed=2, targets=_ATTENTION)
        report.say(f"rank {rank}: {adapter.num_per_expert:,} tensors, packed {adapter.num_packed:,}")
        report.figure("tensors_unpacked", adapter.num_per_expert)
        report.figure("tensors_packed", adapter.num_packed)
        report.detail("packed_mb", adapter.size_bytes / _MEGABYTE)
        async with self.engine(rank, small) as live:
            measures: dict[str, Callable[[int], Awaitable[float]]] = {
                "stock_per_expert_load": lambda _: live.load_s(adapter.per_expert, hook=False),
                "stock_packed_load": lambda _: live.load_s(adapter.packed, hook=False),
                "hook_packed_load": lambda _: live.load_s(adapter.packed, hook=True),
                "stock_per_expert_load_and_slot": lambda _: live.load_into_slot_s(adapter.per_expert, hook=False),
                "stock_packed_load_and_slot": lambda _: live.load_into_slot_s(adapter.packed, hook=False),
                "hook_packed_load_and_slot": lambda _: live.load_into_slot_s(adapter.packed, hook=True),
                "small_hook_load": lambda _: live.load_s(small.packed, hook=True),
                "small_hook_load_and_slot": lambda _: live.load_into_slot_s(small.packed, hook=True),
                "small_stock_load_and_slot": lambda _: live.load_into_slot_s(small.packed, hook=False),
            }
            taken = await self.measured(measures)
        report.figure("load_speedup", taken["stock_per_expert_load"] / taken["stock_packed_load"])
        report.figure("hook_load_speedup", taken["stock_per_expert_load"] / taken["hook_packed_load"])
        total = taken["stock_per_expert_load_and_slot"]
        report.figure("hook_total_speedup", total / taken["hook_packed_load_and_slot"])
        report.detail("small_mb", small.size_bytes / _MEGABYTE)
        report.detail("small_tensors", small.num_packed)
        self.host_check(adapter, "host_check")

    async def many_bytes(self) -> None:
        """Where the bytes decide."""
        report, rank = self.report, self.options.large_rank
        adapter = make_adapter(self.base, self.folder / "large", rank=rank, seed=3)
        small = make_adapter(self.base, self.folder / "large-small", rank=1, seed=4, targets=_ATTENTION)
        fetched = await fetch(adapter, self.folder)
        weights, small_pages = fetched / WEIGHTS_NAME, adapter.packed / WEIGHTS_NAME
        report.say(f"rank {rank}: {adapter.size_bytes / _MEGABYTE:,.0f} MB")
        report.detail("large_mb", adapter.size_bytes / _MEGABYTE)
        # Mapped once and touched in the first round: a copy from page cache to memory and nothing else.
        source, target = np.memmap(weights, dtype=np.uint8, mode="r"), np.zeros(adapter.size_bytes, np.uint8)

        async def copied(_: int) -> float:
            return memcpy_s(source, target)

        async def mapped(_: int) -> float:
            return memcpy_mapped_s(weights, target)

        async def mapped_small(_: int) -> float:
            return memcpy_mapped_s(small_pages, target)

        async with self.engine(rank, small) as live:
            taken = await self.measured(
                {
                    "large_memcpy": copied,
                    "large_memcpy_fresh_mapping": mapped,
                    "large_hook_load": lambda _: live.load_s(fetched, hook=True),
                    "large_hook_load_and_slot": lambda _: live.load_into_slot_s(fetched, hook=True),
                    "large_stock_load_and_slot": lambda _: live.load_into_slot_s(fetched, hook=False),
                    "small_pages_memcpy_fresh_mapping": mapped_small,
                    "small_pages_hook_load_and_slot": lambda _: live.load_into_slot_s(adapter.packed, hook=True),
                }
            )
        slot_ms, memcpy_ms = taken["large_hook_load_and_slot"], taken["large_memcpy"]
        report.figure("slot_over_memcpy", slot_ms / memcpy_ms)
        report.figure("slot_over_memcpy_fresh_mapping", slot_ms / taken["large_memcpy_fresh_mapping"])
        report.figure("small_pages_slot_over_memcpy", taken["small_pages_hook_load_and_slot"] / memcpy_ms)
        report.figure("stock_slot_over_memcpy", taken["large_stock_load_and_slot"] / memcpy_ms)
        self.host_check(adapter, "large_host_check")

    @contextlib.asynccontextmanager
    async def engine(self, max_rank: int, occupant: Folders) -> AsyncIterator[LiveEngine]:
        """A running engine with its slot occupied."""
        settings = SglangSettings(
            dtype="bfloat16", max_lora_rank=max_rank, num_slots=2, max_loaded_adapters=4, max_total_tokens=1024
        )
        async with running_sglang(self.base, self.folder / "adapters", settings) as rig:
            live = LiveEngine(rig, occupant)
            await live.occupy()
            yield live

    async def measured(self, measures: dict[str, Callable[[int], Awaitable[float]]]) -> dict[str, float]:
        """Medians in milliseconds, after one round that nobody looks at."""
        await interleaved(measures, 1)
        taken = {
            name: milliseconds(values) for name, values in (await interleaved(measures, self.options.reps)).items()
        }
        for name, value in taken.items():
            self.report.detail(f"{name}_ms", value)
        return taken

    def host_check(self, adapter: Folders, name: str) -> None:
        """What MinT's host does before the engine sees a folder, with and without hashing its bytes once more."""
        for verify in (False, True):
            rules = AdapterRules(
                base_digest=digest_of_folder(self.base, use_cache=False).digest,
                geometry=BaseGeometry.from_folder(self.base),
                max_lora_rank=self.options.large_rank,
                target_modules=frozenset(_ALL),
                verify_digest=verify,
            )
            values = []
            for _ in range(self.options.reps):
                begun = time.perf_counter()
                check_adapter_folder(adapter.packed, adapter.digest, rules)
                values.append(time.perf_counter() - begun)
            self.report.detail(f"{name}{'_with_hash' if verify else ''}_ms", milliseconds(values))


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="of one expert")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter of many tensors, and of its slots")
    parser.add_argument("--large-rank", type=int, default=64, help="of the adapter of many bytes, and of its slots")
    parser.add_argument("--reps", type=int, default=7, help="repetitions, in turns with what they are compared to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-many", action="store_true", help="only the adapter of many bytes")
    parser.add_argument("--dir", type=Path, default=None, help="where base and adapters are kept meanwhile")
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mint-bench-packed-", dir=options.dir) as folder:
        asyncio.run(Bench(options, Path(folder)).run())


if __name__ == "__main__":
    main()
