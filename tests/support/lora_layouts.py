"""Adapters of every model family in every layout, written and read here by the layouts' definitions.

Nothing in this file uses the product's codecs: what they make is compared with what these few lines of numpy say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from mint_lora.config import (
    LAYOUT_PARAMETERS,
    LAYOUT_PEFT,
    LAYOUT_SHARED_OUTER,
    METADATA_KEY,
    AdapterConfig,
)
from support.adapters import BASE_DIGEST

__all__ = [
    "FAMILY_SHAPES",
    "NUM_EXPERTS",
    "Truth",
    "is_stack",
    "make_truth",
    "read_deltas",
    "same_deltas",
    "write_layout",
]

Floats: TypeAlias = npt.NDArray[np.floating]
NUM_EXPERTS = 3
_HIDDEN, _INNER, _LATENT = 12, 8, 10
_PREFIX = "base_model.model."
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _layer(layer: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _mlp(block: str) -> dict[str, tuple[int, int]]:
    down = {f"{block}.down_proj": (_INNER, _HIDDEN)}
    return {f"{block}.{each}": (_HIDDEN, _INNER) for each in ("gate_proj", "up_proj")} | down


_GQA = {
    "self_attn.q_proj": (_HIDDEN, 16),
    "self_attn.k_proj": (_HIDDEN, 6),
    "self_attn.v_proj": (_HIDDEN, 6),
    "self_attn.o_proj": (16, _HIDDEN),
}
_MLA_COMMON = {
    "self_attn.kv_a_proj_with_mqa": (_HIDDEN, 9),
    "self_attn.kv_b_proj": (7, 18),
    "self_attn.o_proj": (16, _HIDDEN),
}
_MLA_LITE = {"self_attn.q_proj": (_HIDDEN, 20)} | _MLA_COMMON
_MLA = {"self_attn.q_a_proj": (_HIDDEN, _LATENT), "self_attn.q_b_proj": (_LATENT, 20)} | _MLA_COMMON
_DSA = {
    "self_attn.indexer.wq_b": (_LATENT, 6),
    "self_attn.indexer.wk": (_HIDDEN, 3),
    "self_attn.indexer.weights_proj": (_HIDDEN, 2),
}
_DENSE, _EXPERTS, _SHARED = _mlp("mlp"), _mlp("mlp.experts"), _mlp("mlp.shared_experts")

FAMILY_SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "LlamaForCausalLM": _layer(0, _GQA | _DENSE) | _layer(1, _GQA | _DENSE),
    "Qwen3ForCausalLM": _layer(0, _GQA | _DENSE),
    "Qwen3MoeForCausalLM": _layer(0, _GQA | _EXPERTS) | _layer(1, _GQA | _EXPERTS),
    "MixtralForCausalLM": _layer(0, _GQA | _EXPERTS) | _layer(1, _GQA | _EXPERTS),
    "DeepseekV2ForCausalLM": _layer(0, _MLA_LITE | _DENSE) | _layer(1, _MLA_LITE | _EXPERTS | _SHARED),
    "DeepseekV3ForCausalLM": _layer(0, _MLA | _DENSE) | _layer(1, _MLA | _EXPERTS | _SHARED),
    "DeepseekV32ForCausalLM": _layer(0, _MLA | _DSA | _DENSE) | _layer(1, _MLA | _DSA | _EXPERTS | _SHARED),
    "GlmMoeDsaForCausalLM": _layer(0, _MLA | _DSA | _DENSE) | _layer(1, _MLA | _DSA | _EXPERTS | _SHARED),
}
"""(in_features, out_features) by canonical module name; a stack of experts has one entry."""


@dataclass(frozen=True)
class Truth:
    """What an adapter does."""

    architecture: str
    factors: dict[str, list[tuple[Floats, Floats]]]
    """B [out, r] and A [r, in] by module: one pair for a dense module, else one per expert."""
    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        return self.alpha / (np.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def has_experts(self) -> bool:
        return any(map(is_stack, self.factors))

    def deltas(self) -> dict[str, Floats]:
        """scaling * B @ A [experts or 1, out, in] by canonical module name."""
        return {
            module: np.stack([self.scaling * (b.astype(np.float64) @ a.astype(np.float64)) for b, a in pairs])
            for module, pairs in self.factors.items()
        }


def is_stack(module: str) -> bool:
    """Whether a canonical name is that of a stack of experts."""
    return ".mlp.experts." in module


def make_truth(
    architecture: str, *, seed: int = 0, rank: int = 4, alpha: float = 6.0, use_rslora: bool = False, kind: str = ""
) -> Truth:
    """Random non-zero factors. ``kind``: ``one-a`` gives gate and up of an expert the same A, ``shared`` all experts
    one A for gate, one for up, and one B for down."""
    random = np.random.default_rng(seed)
    factors: dict[str, list[tuple[Floats, Floats]]] = {}
    for module, (size_in, size_out) in FAMILY_SHAPES[architecture].items():
        pairs = [
            (
                random.standard_normal((size_out, rank), dtype=np.float32),
                random.standard_normal((rank, size_in), dtype=np.float32),
            )
            for _ in range(NUM_EXPERTS if is_stack(module) else 1)
        ]
        if kind == "shared":
            is_down = module.endswith("down_proj")
            pairs = [(pairs[0][0] if is_down else b, a if is_down else pairs[0][1]) for b, a in pairs]
        elif kind == "one-a" and is_stack(module) and module.endswith("up_proj"):
            gate = factors[module.replace("up_proj", "gate_proj")]
            pairs = [(b, a) for (b, _), (_, a) in zip(pairs, gate, strict=True)]
        factors[module] = pairs
    return Truth(architecture, factors, rank, alpha, use_rslora)


def _config(truth: Truth, layout: str, targets: set[str], **changes: object) -> AdapterConfig:
    values: dict[str, object] = {
        "rank": truth.rank,
        "alpha": truth.alpha,
        "use_rslora": truth.use_rslora,
        "target_modules": tuple(targets),
        "base_model": "tiny",
        "base_digest": BASE_DIGEST,
        "dtype": "float32",
        "layout": layout,
    }
    return AdapterConfig(**(values | changes))  # type: ignore[arg-type]


def write_layout(path: Path, truth: Truth, layout: str, *, is_transposed: bool = False) -> AdapterConfig:
    """Write the adapter in ``layout``; ``is_transposed`` is for parameters as old PEFT took them."""
    tensors: dict[str, Floats] = {}
    targets: set[str] = set()
    changes: dict[str, object] = {}

    def put(module: str, b: Floats, a: Floats) -> None:
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)

    for module, pairs in truth.factors.items():
        block, _, leaf = module.rpartition(".")
        if not is_stack(module):
            put(module, *pairs[0])
        elif layout == LAYOUT_PEFT:
            if truth.architecture == "MixtralForCausalLM":
                block, leaf = block.replace("mlp", "block_sparse_moe"), _MIXTRAL[leaf]
            for expert, (b, a) in enumerate(pairs):
                put(f"{block}.{expert}.{leaf}", b, a)
        elif layout == LAYOUT_PARAMETERS:
            if leaf == "down_proj":
                put(block, *_flat(np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs]), is_transposed))
            elif leaf == "gate_proj":
                put(f"{block}.base_layer", *_flat(*_block_diagonal(truth, block), is_transposed))
                changes |= _fused_patterns(truth)
            leaf = leaf if leaf == "down_proj" else "gate_up_proj"
        else:
            b, a = np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs])
            if layout == LAYOUT_SHARED_OUTER:
                b, a = (b[:1], a) if leaf == "down_proj" else (b, a[:1])
            put(module, b, a)
        targets.add(leaf)
    config = _config(truth, layout, targets, **changes)
    safetensors.numpy.save_file(tensors, path, {METADATA_KEY: config.to_json()})
    return config


def _fused_patterns(truth: Truth) -> dict[str, object]:
    ratio = np.sqrt(2.0) if truth.use_rslora else 2.0
    return {
        "rank_pattern": {"gate_up_proj": 2 * truth.rank},
        "alpha_pattern": {"gate_up_proj": float(truth.alpha * ratio)},
    }


def _block_diagonal(truth: Truth, block: str) -> tuple[Floats, Floats]:
    """Gate and up as one, [[B, 0], [0, B']] and [[A], [A']] for every expert."""
    gate, up = truth.factors[f"{block}.gate_proj"], truth.factors[f"{block}.up_proj"]
    return (
        np.stack([np.block([[b, b * 0], [c * 0, c]]) for (b, _), (c, _) in zip(gate, up, strict=True)]),
        np.stack([np.concatenate((a, c)) for (_, a), (_, c) in zip(gate, up, strict=True)]),
    )


def _flat(b: Floats, a: Floats, is_transposed: bool) -> tuple[Floats, Floats]:
    """[experts, out, r] and [experts, r, in] as [out, r * experts] and [experts * r, in]."""
    if is_transposed:
        b, a = a.transpose(0, 2, 1), b.transpose(0, 2, 1)
    return b.transpose(1, 2, 0).reshape(b.shape[1], -1), a.reshape(-1, a.shape[2])


def read_deltas(path: Path) -> dict[str, Floats]:
    """delta W [experts or 1, out, in] by canonical module name, of a file in any layout."""
    config = AdapterConfig.from_json(safetensors.safe_open(path, "np").metadata()[METADATA_KEY])
    tensors = safetensors.numpy.load_file(path)
    deltas: dict[str, Floats] = {}
    experts: dict[str, dict[int, Floats]] = {}
    for name in tensors:
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if module == name.removeprefix(_PREFIX):
            continue
        a = tensors[name].astype(np.float64)
        b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        block, _, leaf = module.rpartition(".")
        block = block.replace("block_sparse_moe", "mlp")
        leaf = {theirs: ours for ours, theirs in _MIXTRAL.items()}.get(leaf, leaf)
        if leaf in ("experts", "base_layer"):
            inner, parameter = leaf == "base_layer", "gate_up_proj" if leaf == "base_layer" else "down_proj"
            block = block if inner else f"{block}.experts"
            rank = config.rank_of(f"{block}.{parameter}")
            num_experts = a.shape[0] // rank
            # As peft 0.21.2 has it, ParamWrapper.get_delta_weight, for a parameter [experts, out, in].
            delta = config.scaling_of(f"{block}.{parameter}") * np.einsum(
                "ore,eri->eoi", b.reshape(b.shape[0], -1, num_experts), a.reshape(num_experts, -1, a.shape[1])
            )
            if inner:
                half = delta.shape[1] // 2
                deltas[f"{block}.gate_proj"], deltas[f"{block}.up_proj"] = delta[:, :half], delta[:, half:]
            else:
                deltas[f"{block}.down_proj"] = delta
        elif a.ndim == 3:
            deltas[module] = config.scaling_of(module) * np.matmul(b, a)
        elif ".experts." in f"{block}.":
            stack, _, expert = block.rpartition(".")
            experts.setdefault(f"{stack}.{leaf}", {})[int(expert)] = config.scaling_of(module) * (b @ a)
        else:
            deltas[f"{block}.{leaf}"] = config.scaling_of(module) * (b @ a)[None]
    deltas |= {stack: np.stack([found[each] for each in sorted(found)]) for stack, found in experts.items()}
    return deltas


def same_deltas(ours: Mapping[str, Floats], theirs: Mapping[str, Floats], *, tolerance: float = 1e-12) -> None:
    """Assert that both do the same to every module and expert, and that it is not nothing."""
    assert ours.keys() == theirs.keys()
    for module, delta in ours.items():
        scale = np.abs(delta).max()
        assert scale > 0.1, "a zero adapter would prove nothing"
        np.testing.assert_allclose(delta, theirs[module], rtol=0, atol=tolerance * scale, err_msg=module)
