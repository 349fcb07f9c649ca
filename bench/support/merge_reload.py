"""The way without adapters, in a process of its own: merge, save, upload, fetch, reload, first token.

Run by ``JsonChild("bench.support.merge_reload", …)``. It plays both nodes. The trainer's holds the base in bfloat16 in
the page cache and an adapter in memory. The engine's runs SGLang without LoRA, whose weights are replaced by
``update_weights_from_disk``. Between them lies the object store that MinT uses, reached without hashing a byte.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.support.json_child import answer_lines
from bench.support.plain_s3 import PlainS3
from mint_blobs.settings import ObjectStoreSettings
from mint_engine.sglang_settings import SglangSettings, engine_arguments

__all__ = ["MERGES", "MergeReload", "without_lora"]

Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor], None]
"""Writes weight + scaling * B A to the last argument."""

_SELF_CHECK_TIMEOUT_MS = 60_000
_LOGPROB_TOLERANCE = 0.15
"""Between two engines in bfloat16; two adapters of this kind are further apart."""


def merge_in_bfloat16(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor
) -> None:
    torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scaling, out=out)


def merge_in_float32(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
    """As PEFT merges a bfloat16 base on a CPU: the product in float32, rounded once, then added."""
    torch.add(weight, (b @ a).mul_(scaling).to(weight.dtype), out=out)


MERGES: dict[str, Merge] = {"bfloat16": merge_in_bfloat16, "float32": merge_in_float32}


def without_lora(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an engine that serves the base's weights alone."""
    return {key: value for key, value in arguments.items() if "lora" not in key}


class MergeReload:
    """One base, one adapter on it, one engine."""

    def __init__(self) -> None:
        self._num_versions = 0
        self._lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._keys: list[str] = []

    def start(
        self,
        base: str,
        folder: str,
        store: dict[str, Any],
        targets: list[str],
        rank: int,
        alpha: float,
        num_threads: int,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Start the engine, make the adapter, and choose the faster way to merge."""
        from mint_engine.sglang_plugin.launch import launch_engine
        from mint_engine.sglang_plugin.version import runs_without_gpu

        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)
        self._base, self._folder = Path(base), Path(folder)
        self._scaling = alpha / rank
        self._s3 = PlainS3(ObjectStoreSettings.model_validate(store))
        self._trainer_dir, self._node_dir = self._folder / "trainer", self._folder / "node"
        for place in (self._trainer_dir, self._node_dir):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        for path in self._base.iterdir():
            if path.suffix != ".safetensors" and path.is_file():
                shutil.copy(path, self._node_dir)
        self._shards = sorted(path.name for path in self._base.glob("*.safetensors"))
        self._make_adapter(frozenset(targets), rank)
        self._merge_name = self._faster_merge()
        arguments = without_lora(
            engine_arguments(self._base, SglangSettings.model_validate(settings), without_gpu=runs_without_gpu())
        )
        self._engine = launch_engine(
            arguments, fast_upload=False, slot_turn_passes=0, self_check_timeout_ms=_SELF_CHECK_TIMEOUT_MS
        )
        return {"merge": self._merge_name, "num_merged": len(self._lora)}

    def train(self, seed: int) -> None:
        """What an optimizer step leaves: other weights. B is small and nowhere zero."""
        generator = torch.Generator().manual_seed(seed)
        for _, b in self._lora.values():
            b.normal_(0.0, 0.02, generator=generator)

    def handoff(self, prompt: list[int], check: bool) -> dict[str, Any]:
        """From the adapter's weights to the first token, in milliseconds by part; afterwards, perhaps, a check."""
        clock = Clock()
        names = self._merge_and_save(clock)
        version = self._num_versions
        self._num_versions += 1
        keys = {f"bench/merged/{version}/{name}": name for name in names}
        self._s3.put_files({key: self._trainer_dir / name for key, name in keys.items()})
        clock.lap("upload")
        self._s3.get_files({key: self._node_dir / name for key, name in keys.items()})
        clock.lap("fetch")
        done, message = self._engine.update_weights_from_disk(str(self._node_dir))[:2]
        if not done:
            raise RuntimeError(f"SGLang did not take the merged weights: {message}")
        clock.lap("load")
        answer = self._engine.generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 1, "temperature": 0}, return_logprob=True
        )
        clock.lap("first_token")
        size_bytes = sum((self._node_dir / name).stat().st_size for name in names)
        logprob, token_id, _ = answer["meta_info"]["output_token_logprobs"][0]
        if check:
            self._check(prompt, token_id, logprob)
        self._forget(keys)
        return {"ms": clock.ms, "size_bytes": size_bytes, "token_id": token_id, "logprob": logprob}

    def _make_adapter(self, targets: frozenset[str], rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for shard in self._shards:
            with safe_open(self._base / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name.removesuffix(".weight").rpartition(".")[2] in targets:
                        out_features, in_features = file.get_slice(name).get_shape()
                        a = torch.randn((rank, in_features), generator=generator) / in_features**0.5
                        self._lora[name] = (a, torch.zeros((out_features, rank)))

    def _faster_merge(self) -> str:
        """By time over the first shard, the second time each."""
        taken: dict[str, float] = {}
        for name in (*MERGES, *MERGES):
            begun = time.perf_counter()
            self._merged(self._shards[0], MERGES[name])
            taken[name] = time.perf_counter() - begun
        return min(taken, key=taken.__getitem__)

    def _merge_and_save(self, clock: Clock) -> list[str]:
        """Shard by shard into buffers that are used again, so that no time goes into fresh memory."""
        for shard in self._shards:
            merged = self._merged(shard, MERGES[self._merge_name])
            clock.lap("merge")
            save_file(merged, self._trainer_dir / shard, metadata={"format": "pt"})
            clock.lap("save")
        names = list(self._shards)
        index = self._base / "model.safetensors.index.json"
        if index.exists():
            shutil.copy(index, self._trainer_dir)
            names.append(index.name)
        clock.lap("save")
        return names

    def _merged(self, shard: str, merge: Merge) -> dict[str, torch.Tensor]:
        merged: dict[str, torch.Tensor] = {}
        used: dict[str, int] = {}
        with safe_open(self._base / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight = file.get_tensor(name)
                if name not in self._lora:
                    merged[name] = weight
                    continue
                shape = "x".join(map(str, weight.shape))
                number = used[shape] = used.get(shape, -1) + 1
                out = self._buffers.setdefault(f"{shape}/{number}", torch.empty_like(weight))
                merge(weight, *self._lora[name], self._scaling, out)
                merged[name] = out
        return merged

    def _check(self, prompt: list[int], token_id: int, logprob: float) -> None:
        """Does the engine answer with what was merged? By transformers, from the same files, once; it takes memory."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._node_dir, dtype=torch.bfloat16)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].float()
        expected = float(logits.log_softmax(-1)[token_id])
        if abs(expected - logprob) > _LOGPROB_TOLERANCE:
            raise RuntimeError(f"SGLang answers token {token_id} with {logprob}, the merged weights with {expected}")

    def _forget(self, keys: dict[str, str]) -> None:
        """Nothing of these weights is on the node when the next ones come."""
        self._s3.delete(list(keys))
        for name in keys.values():
            (self._trainer_dir / name).unlink()
            (self._node_dir / name).unlink()

    def stop(self) -> None:
        self._engine.shutdown()


class Clock:
    """Milliseconds by part."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.ms[part] = self.ms.get(part, 0.0) + (now - self._at) * 1e3
        self._at = now


def main() -> None:
    way = MergeReload()
    answer_lines({"start": way.start, "train": way.train, "handoff": way.handoff, "stop": way.stop})


if __name__ == "__main__":
    main()
