"""MinT's own way from an optimizer step to the first token: save, export, promote, load, first token."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import (
    common_pb2,
    inference_service_pb2,
    revision_service_pb2,
    run_service_pb2,
    session_service_pb2,
)
from mint_blobs.s3 import S3ObjectStore
from mint_client import MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core.names import BlobName
from mint_engine.base_geometry import BaseGeometry
from mint_engine.sglang_settings import DEFAULT_TARGET_MODULES
from mint_lora import LAYOUT_PACKED, AdapterConfig, TensorSource, write_safetensors
from support.stack import Stack

__all__ = ["AdapterWay", "ExpertTrainer", "Handoff", "SessionTrainer", "Trainer", "adapter_way"]

_TENANT: Final = "bench"
_LEASE_S: Final = 3600.0
_LEARNING_RATE: Final = 0.01
"""AdamW's first updates move every weight by it: each step's adapter answers otherwise than the one before."""
_LOGPROB_TOLERANCE: Final = 0.15


@dataclass(frozen=True, slots=True)
class Handoff:
    """One way to the first token."""

    ms: dict[str, float]
    """By part; together the whole."""
    size_bytes: int
    """What the engine's node needs of the new weights."""
    moved_bytes: int
    """What went to and from the object store."""
    logprob: float
    inside_ms: dict[str, float] = field(default_factory=dict)
    """What the services say of their parts."""

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())


class Trainer(Protocol):
    """Holds the policy's weights."""

    async def train(self, seed: int) -> None:
        """One optimizer step."""

    async def save(self, fence: int) -> common_pb2.TrainingState:
        """Store the state."""

    async def logprob(self, prompt: Sequence[int], token_id: int) -> float | None:
        """Of a token after the prompt, by the trainer's own weights; None if it computes none."""


class SessionTrainer:
    """MinT's trainer by its step API."""

    def __init__(self, client: MintClient, session: str, next_seq: int, vocab_size: int) -> None:
        self._sessions = client.sessions
        self._session = session
        self._next_seq = next_seq
        self._vocab_size = vocab_size

    @classmethod
    async def open(
        cls, client: MintClient, policy: str, base_digest: str, lora: common_pb2.LoraConfig, vocab_size: int
    ) -> SessionTrainer:
        session = await client.sessions.create(
            _TENANT, "handoff", policy=policy, base_digest=base_digest, lora=lora, timeout_s=600
        )
        return cls(client, session.name, session.next_seq, vocab_size)

    async def train(self, seed: int) -> None:
        token_ids = np.random.default_rng(seed).integers(3, self._vocab_size, 9).tolist()
        datum = session_service_pb2.Datum(tokens=token_ids[:-1], targets=token_ids[1:], weights=[1.0] * 8)
        await self._sessions.forward_backward(self._session, self._next_seq, [datum])
        optimizer = run_service_pb2.OptimizerConfig(learning_rate=_LEARNING_RATE)
        await self._sessions.optim_step(self._session, self._next_seq + 1, optimizer=optimizer, gradient_scale=1.0)
        self._next_seq += 2

    async def save(self, fence: int) -> common_pb2.TrainingState:
        return await self._sessions.save_state(self._session, fence=fence, for_export=True)

    async def logprob(self, prompt: Sequence[int], token_id: int) -> float | None:
        weights = [0.0] * (len(prompt) - 1) + [1.0]
        datum = session_service_pb2.Datum(tokens=prompt, targets=[*prompt[1:], token_id], weights=weights)
        result = await self._sessions.forward(self._session, [datum])
        return float(result.logprobs[0].values[-1])


class ExpertTrainer:
    """A trainer outside of MinT, whose adapters are on routed experts too, stacked as transformers has them. It saves
    for an export as MinT's does: float32 weights in the base's type and packed layout, stored under the object key that
    the catalog has for them."""

    def __init__(
        self,
        base: Path,
        base_digest: str,
        work: WorkClient,
        store: S3ObjectStore,
        folder: Path,
        lora: tuple[int, float],
    ) -> None:
        rank, alpha = lora
        self._work = work
        self._store = store
        self._path = folder / "weights.safetensors"
        self._step = 0
        shapes = _stacked_shapes(base)
        self._config = AdapterConfig(
            rank=rank,
            alpha=alpha,
            target_modules=tuple({module.rpartition(".")[2] for module in shapes}),
            base_model=base.name,
            base_digest=base_digest,
            dtype="bfloat16",
            layout=LAYOUT_PACKED,
        )
        self._generator = torch.Generator().manual_seed(0)
        self._tensors: dict[str, torch.Tensor] = {}
        for module, (num_experts, in_features, out_features) in shapes.items():
            stem = f"base_model.model.{module}"
            self._tensors[f"{stem}.lora_A.weight"] = self._randn(*num_experts, rank, in_features) / in_features**0.5
            self._tensors[f"{stem}.lora_B.weight"] = self._randn(*num_experts, out_features, rank) * 0.02

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    async def train(self, seed: int) -> None:
        self._generator.manual_seed(seed)
        for name, values in self._tensors.items():
            if ".self_attn." in name and ".lora_B." in name:
                self._tensors[name] = self._randn(*values.shape) * 0.02

    async def save(self, fence: int) -> common_pb2.TrainingState:
        self._step += 1
        sources = {
            name: TensorSource.of(values.to(torch.bfloat16).view(torch.uint16).numpy(), "BF16")
            for name, values in self._tensors.items()
        }
        written = write_safetensors(self._path, sources, self._config.to_metadata(), durable=False)
        record = await self._work.stage_blob(str(BlobName(_TENANT, written.digest)), written.size_bytes)
        if record.state != publish_service_pb2.BLOB_STATE_VERIFIED:
            await self._store.put_file(record.object_key, self._path, digest=written.digest)
        blob = common_pb2.BlobRef(digest=written.digest, size_bytes=written.size_bytes)
        return common_pb2.TrainingState(step=self._step, fence=fence, weights_key=record.object_key, weights=blob)

    async def logprob(self, prompt: Sequence[int], token_id: int) -> float | None:
        del prompt, token_id
        return None


def _stacked_shapes(base: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """(number of experts or nothing, in_features, out_features) of every target module."""
    geometry = BaseGeometry.from_folder(base)
    shapes: dict[str, tuple[tuple[int, ...], int, int]] = {
        name: ((), in_features, out_features)
        for name, (out_features, in_features) in geometry.linears.items()
        if name.rpartition(".")[2] in DEFAULT_TARGET_MODULES
    }
    for block, experts in geometry.experts.items():
        for leaf, shape in experts.items():
            shapes[f"{block}.{leaf}"] = ((shape.num_experts,), shape.in_features, shape.out_features)
    return shapes


class AdapterWay:
    """One policy of a running installation, made by :func:`adapter_way`."""

    def __init__(self, client: MintClient, exporter: ExporterClient, policy: str, fence: common_pb2.Fence) -> None:
        self.trainer: Trainer
        self._client = client
        self._exporter = exporter
        self._policy = policy
        self._alias = f"{policy}/aliases/live"
        self._fence = fence

    async def handoff(self, prompt: Sequence[int]) -> Handoff:
        """From the trainer's weights to the first token. Raises RuntimeError if another revision answers."""
        at = [time.perf_counter()]
        state = await self.trainer.save(self._fence.token)
        at.append(time.perf_counter())
        exported = await self._exporter.export(self._policy, state, self._fence)
        revision = exported.revision
        at.append(time.perf_counter())
        await self._client.aliases.promote(self._alias, revision.number)
        at.append(time.perf_counter())
        header, chunk, header_at = await self._first_token(prompt)
        at += [header_at, time.perf_counter()]
        answered = (header.resolution.revision, header.resolution.blob.digest)
        if answered != (revision.name, revision.blob.digest):
            raise RuntimeError(f"{answered} answered, published was {revision.name} ({revision.blob.digest})")
        expected = await self.trainer.logprob(prompt, chunk.token_ids[0])
        if expected is not None and abs(expected - chunk.logprobs[0]) > _LOGPROB_TOLERANCE:
            raise RuntimeError(f"the engine answers with {chunk.logprobs[0]}, the trainer with {expected}")
        parts = ("save", "export", "promote", "load", "first_token")
        timings = exported.timings
        return Handoff(
            {name: (end - begin) * 1e3 for name, begin, end in zip(parts, at, at[1:], strict=False)},
            revision.blob.size_bytes,
            _moved_bytes(state, revision),
            chunk.logprobs[0],
            {name: getattr(timings, f"{name}_ms") for name in ("fetch", "pack", "upload", "publish")},
        )

    async def _first_token(self, prompt: Sequence[int]) -> tuple[Any, Any, float]:
        """Header, first chunk with a token, and when the header came."""
        sampling = inference_service_pb2.SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
        header, chunk, header_at = None, None, 0.0
        async for response in self._client.generate(
            self._alias,
            list(prompt),
            sampling=sampling,
            return_logprobs=True,
            consistency=common_pb2.Consistency(strong=True),
        ):
            if response.WhichOneof("content") == "header":
                header, header_at = response.header, time.perf_counter()
            elif response.chunk.token_ids and chunk is None:
                chunk = response.chunk
        if header is None or chunk is None:
            raise RuntimeError(f"{self._alias} answered without a token")
        return header, chunk, header_at


def _moved_bytes(state: common_pb2.TrainingState, revision: revision_service_pb2.Revision) -> int:
    """Up by the trainer, down to the exporter, down to the engine; up and back again if the exporter stored it anew."""
    num_moves = 1 if state.weights_key == revision.object_key else 3
    return 2 * state.weights.size_bytes + state.optimizer.size_bytes + num_moves * revision.blob.size_bytes


@contextlib.asynccontextmanager
async def adapter_way(stack: Stack, *, rank: int, alpha: float, has_experts: bool) -> AsyncIterator[AdapterWay]:
    """A policy on the installation's base, its lease, and its trainer."""
    async with contextlib.AsyncExitStack() as opened:
        client = await opened.enter_async_context(stack.client())
        work = await opened.enter_async_context(WorkClient(stack.address("catalog", runtime=True)))
        exporter = await opened.enter_async_context(ExporterClient(stack.address("exporter", runtime=True)))
        lora = common_pb2.LoraConfig(rank=rank, alpha=alpha)
        policy = await client.policies.create(_TENANT, "handoff", base_model=stack.base_model, lora=lora)
        base = await client.base_models.get(stack.base_model)
        lease = await work.acquire_lease(policy.name, "bench-handoff", ttl_s=_LEASE_S)
        way = AdapterWay(client, exporter, policy.name, lease.fence)
        if has_experts:
            store = await opened.enter_async_context(stack.object_store())
            way.trainer = ExpertTrainer(stack.base, base.digest, work, store, stack.state, (rank, alpha))
        else:
            way.trainer = await SessionTrainer.open(client, policy.name, base.digest, lora, 384)
        yield way
