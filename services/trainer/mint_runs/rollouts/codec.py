"""A rollout batch as one safetensors file, and back; equal batches give equal bytes.

==================  ============  =======================================================================
tensor              type          holds
==================  ============  =======================================================================
prompt_token_ids    uint16/int32  all groups' prompts, one after the other
prompt_ends         int64 [G]     where each group's prompt ends
sample_ends         int64 [G]     where each group's samples end
token_ids           uint16/int32  all completions, one after the other: C tokens of S samples
token_ends          int64 [S]     where each completion ends
logprobs            float32 [C]   of each completion token
rewards             float32 [S]   0 where there is none
scored              bool [S]      whether there is a reward
finish_reasons      uint8 [S]     place in ``_FINISH_REASONS``
text                uint8         all completions' texts in UTF-8, one after the other
text_ends           int64 [S]     where each text ends
routed_experts      uint8/uint16  [R, num_layers, top_k]: of each sample all tokens but the last; only if recorded
==================  ============  =======================================================================

The metadata has one key, canonical JSON: who generated, and what no tensor holds. A type is the smallest that takes the
values. Nothing in the file depends on when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mint_api.v1 import common_pb2
from mint_core.errors import BlobCorrupt, InvalidArgument, WrongState
from mint_lora import TensorFile, WrittenFile, write_safetensors
from mint_runs.rollouts.batch import RolloutBatch, RolloutGroup, RolloutSample

__all__ = ["read_batch", "write_batch"]

METADATA_KEY = "mint.rollout"
FORMAT = 1

_FINISH_REASONS = ("stop", "length")
_NUMERICS = ("base_digest", "dtype", "quantization", "engine_version")
_TYPES: Mapping[str, tuple[str, ...]] = {
    "prompt_token_ids": ("U16", "I32"),
    "prompt_ends": ("I64",),
    "sample_ends": ("I64",),
    "token_ids": ("U16", "I32"),
    "token_ends": ("I64",),
    "logprobs": ("F32",),
    "rewards": ("F32",),
    "scored": ("BOOL",),
    "finish_reasons": ("U8",),
    "text": ("U8",),
    "text_ends": ("I64",),
    "routed_experts": ("U8", "U16"),
}

Array = npt.NDArray[Any]


def write_batch(batch: RolloutBatch, path: Path) -> WrittenFile:
    """Write ``batch`` to ``path``. Raises :class:`InvalidArgument` for what the format cannot hold."""
    groups, samples = batch.groups, list(batch.samples())
    texts = [sample.text.encode() for sample in samples]
    tensors: dict[str, Array] = {
        "prompt_token_ids": _token_ids(token_id for group in groups for token_id in group.prompt_token_ids),
        "prompt_ends": _ends(len(group.prompt_token_ids) for group in groups),
        "sample_ends": _ends(len(group.samples) for group in groups),
        "token_ids": _token_ids(token_id for sample in samples for token_id in sample.token_ids),
        "token_ends": _ends(len(sample.token_ids) for sample in samples),
        "logprobs": np.array([value for sample in samples for value in sample.logprobs], dtype=np.float32),
        "rewards": np.array([sample.reward or 0.0 for sample in samples], dtype=np.float32),
        "scored": np.array([sample.reward is not None for sample in samples], dtype=np.bool_),
        "finish_reasons": np.array([_finish_reason(sample) for sample in samples], dtype=np.uint8),
        "text": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_ends": _ends(map(len, texts)),
    }
    routed = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    if routed:
        if len(routed) != len(samples):
            raise InvalidArgument(
                f"{len(routed)} of {len(samples)} samples have routed experts: all of a batch have them or none"
            )
        tensors["routed_experts"] = _experts(np.concatenate(routed))
    document = {
        "format": FORMAT,
        "run": batch.run,
        "step": batch.step,
        "revision": batch.revision,
        "revision_digest": batch.revision_digest,
        "numerics": {name: getattr(batch.numerics, name) for name in _NUMERICS},
        "temperature": batch.temperature,
        "lines": [group.line for group in groups],
        "errors": {str(place): sample.error for place, sample in enumerate(samples) if sample.error},
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return write_safetensors(path, tensors, {METADATA_KEY: text})


def read_batch(path: Path, *, key: str) -> RolloutBatch:
    """The batch that was written to ``path``; ``key`` is its object key, for what is told about damage.

    Raises :class:`BlobCorrupt` if it is no batch, :class:`WrongState` if another MinT wrote it in another format.
    """
    try:
        file = TensorFile(path)
        return _Reader(file, key).batch()
    except InvalidArgument as error:
        raise _corrupt(key, error.message) from error


class _Reader:
    """Every tensor and figure is looked at before it is believed."""

    def __init__(self, file: TensorFile, key: str) -> None:
        self._file = file
        self._key = key

    def batch(self) -> RolloutBatch:
        document = self._document()
        prompts = self._ragged("prompt_token_ids", "prompt_ends")
        self._require(len(prompts) == len(document["lines"]), "it has not one line number for each prompt")
        completions = self._ragged("token_ids", "token_ends")
        num_samples = len(completions)
        logprobs = self._cut(self._tensor("logprobs"), self._tensor("token_ends"), "logprobs")
        rewards, scored, reasons = (self._tensor(name) for name in ("rewards", "scored", "finish_reasons"))
        texts = self._ragged("text", "text_ends")
        counts = {len(logprobs), len(rewards), len(scored), len(reasons), len(texts), num_samples}
        self._require(len(counts) == 1, f"its tensors disagree on the number of samples: {sorted(counts)}")
        self._require(bool(np.isfinite(rewards).all()), "a reward is not finite")
        self._require(bool((reasons < len(_FINISH_REASONS)).all()), "a finish reason is unknown")
        groups = self._cut(np.arange(num_samples), self._tensor("sample_ends"), "sample_ends")
        self._require(len(groups) == len(prompts), "it has not one group of samples for each prompt")
        lengths = [
            len(prompt) + len(completions[place]) - 1
            for prompt, places in zip(prompts, groups, strict=True)
            for place in places
        ]
        routed = self._routed(lengths)
        samples = [
            RolloutSample(
                token_ids=tuple(completions[place].tolist()),
                logprobs=tuple(logprobs[place].tolist()),
                finish_reason=_FINISH_REASONS[reasons[place]],
                text=self._decode(texts[place]),
                reward=float(rewards[place]) if scored[place] else None,
                error=document["errors"].get(str(place), ""),
                routed_experts=routed[place],
            )
            for place in range(num_samples)
        ]
        return RolloutBatch(
            run=document["run"],
            step=document["step"],
            revision=document["revision"],
            revision_digest=document["revision_digest"],
            numerics=common_pb2.Numerics(**document["numerics"]),
            temperature=document["temperature"],
            groups=tuple(
                RolloutGroup(line, tuple(prompt.tolist()), tuple(samples[place] for place in places))
                for line, prompt, places in zip(document["lines"], prompts, groups, strict=True)
            ),
        )

    def _document(self) -> dict[str, Any]:
        try:
            document = json.loads(self._file.header.metadata[METADATA_KEY])
            version = document["format"]
            typed = {
                "run": str,
                "step": int,
                "revision": str,
                "revision_digest": str,
                "numerics": dict,
                "temperature": float,
                "lines": list,
                "errors": dict,
            }
            wrong = [name for name, kind in typed.items() if not isinstance(document[name], kind)]
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(self._key, f"its metadata {METADATA_KEY!r} is unreadable ({error!r})") from error
        if version != FORMAT:
            raise WrongState(
                f"{self._key!r} has rollout format {version}, this worker reads {FORMAT}: use the MinT that wrote it"
            )
        self._require(not wrong, f"its metadata {METADATA_KEY!r} has no good {', '.join(wrong)}")
        self._require(set(document["numerics"]) == set(_NUMERICS), "its numerics are incomplete")
        texts = [*document["numerics"].values(), *document["errors"].values()]
        self._require(all(isinstance(text, str) for text in texts), "its numerics or errors are no texts")
        self._require(all(type(line) is int for line in document["lines"]), "its line numbers are no whole numbers")
        return document

    def _tensor(self, name: str, *, num_dims: int = 1) -> Array:
        info = self._file.header.tensors.get(name)
        if info is None:
            raise _corrupt(self._key, f"tensor {name!r} is absent")
        self._require(
            info.dtype in _TYPES[name] and len(info.shape) == num_dims,
            f"tensor {name!r} is {info.dtype} {list(info.shape)}, expected {' or '.join(_TYPES[name])} of {num_dims} "
            "dimensions",
        )
        return self._file.array(name)

    def _ragged(self, name: str, ends: str) -> list[Array]:
        return self._cut(self._tensor(name), self._tensor(ends), name)

    def _cut(self, values: Array, ends: Array, name: str) -> list[Array]:
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(ends)]
        last = int(ends[-1]) if len(ends) else 0
        self._require(
            bool((ends >= starts).all()) and last == len(values),
            f"the pieces of {name!r} do not cover its {len(values)} elements",
        )
        return [values[start:end] for start, end in zip(starts, ends, strict=True)]

    def _routed(self, lengths: Sequence[int]) -> list[npt.NDArray[np.int32] | None]:
        if "routed_experts" not in self._file.header.tensors:
            return [None] * len(lengths)
        experts = self._tensor("routed_experts", num_dims=3)
        ends = np.cumsum(np.array(lengths, dtype=np.int64))
        return [piece.astype(np.int32) for piece in self._cut(experts, ends, "routed_experts")]

    def _decode(self, text: Array) -> str:
        try:
            return text.tobytes().decode()
        except UnicodeDecodeError as error:
            raise _corrupt(self._key, f"a completion is not UTF-8 at byte {error.start + 1}") from error

    def _require(self, condition: bool, defect: str) -> None:
        if not condition:
            raise _corrupt(self._key, defect)


def _token_ids(token_ids: Any) -> Array:
    ids = np.array(list(token_ids), dtype=np.int32)
    return ids.astype(np.uint16) if ids.max(initial=0) < 1 << 16 else ids


def _experts(experts: Array) -> Array:
    least, most = int(experts.min(initial=0)), int(experts.max(initial=0))
    if least < 0 or most >= 1 << 16:
        raise InvalidArgument(f"routed experts are {least} to {most}: a batch holds those from 0 to {(1 << 16) - 1}")
    return experts.astype(np.uint8 if most < 1 << 8 else np.uint16)


def _ends(lengths: Any) -> Array:
    return np.cumsum(np.array(list(lengths), dtype=np.int64))


def _finish_reason(sample: RolloutSample) -> int:
    if sample.finish_reason not in _FINISH_REASONS:
        raise InvalidArgument(
            f"a sample ended by {sample.finish_reason!r}: a batch holds those that ended by {_FINISH_REASONS}"
        )
    return _FINISH_REASONS.index(sample.finish_reason)


def _corrupt(key: str, defect: str) -> BlobCorrupt:
    return BlobCorrupt(f"{key!r} is not the rollout batch it should be: {defect}", metadata={"object_key": key})
