"""Where each tensor of a packed adapter belongs in SGLang's slots, known before a slot is touched.

SGLang keeps one pair of buffers for each layer and joined module (``qkv_proj``, ``gate_up_proj_moe``, …), each with one
position per slot. A :class:`Bank` is such a pair; its parts are the modules that an adapter names one by one. The map
is read off the running pool and its wrapped layers, so shapes are those of the buffers and not of a model family.
Whatever it does not understand is left to SGLang's own path: :meth:`SlotMap.read` says why.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mint_core.errors import InvalidArgument
from mint_lora.families import canonical_module

__all__ = ["Bank", "PartWeights", "SlotMap", "SlotPlan"]

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_EXPERT_PARTS = {"gate_up_proj_moe": ("gate_proj", "up_proj"), "down_proj_moe": ("down_proj",)}
_OPTIONAL_PARTS = frozenset({"k_proj", "up_proj"})
"""SGLang takes these for zeros when their neighbours are there."""
_MAX_ARRANGEMENTS = 16
_Arrangement = tuple[tuple[tuple[str, str] | None, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Bank:
    """The buffers of one joined module of one layer."""

    name: str
    """Module as SGLang names it, such as ``model.layers.0.self_attn.qkv_proj`` or ``….mlp.experts.gate_up_proj``."""
    layer: int
    lora_a: Tensor
    """[num_slots, num_parts · max_rank, in]; for experts [num_slots, E or 1, num_parts · max_rank, in]."""
    lora_b: Tensor
    """[num_slots, out, max_rank]; for experts [num_slots, E or 1, out, max_rank]."""
    parts: tuple[str, ...]
    """Modules an adapter names, in the order of their rows."""
    offsets: tuple[int, ...]
    """num_parts + 1 places in ``out``."""

    @property
    def has_experts(self) -> bool:
        return self.lora_a.dim() == 4

    def module_of(self, part: str) -> str:
        """What a packed adapter calls one of the parts, such as ``model.layers.0.self_attn.q_proj``."""
        return canonical_module(f"{self.name.rpartition('.')[0]}.{part}")

    @property
    def max_rank(self) -> int:
        return int(self.lora_b.shape[-1])


@dataclass(frozen=True, slots=True)
class PartWeights:
    """One module of an adapter: A [r, in] and B [out, r], or for experts [E or 1, r, in] and [E or 1, out, r]."""

    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """A packed adapter, sorted for the upload; checked against every buffer."""

    rank: int
    scaling: float
    banks: tuple[tuple[PartWeights | None, ...] | None, ...]
    """By bank of the map: its parts, ``None`` for a part that counts as zeros; ``None`` for a bank left alone."""


class SlotMap:
    """The banks of one pool."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        self.banks = tuple(banks)
        self._names = [[_tensor_names(bank.module_of(part)) for part in bank.parts] for bank in self.banks]
        self._known = {name for parts in self._names for names in parts for name in names}
        self._arrangements: dict[tuple[Hashable | None, int], _Arrangement] = {}

    @classmethod
    def read(cls, pool: Any, lora_modules: Sequence[Mapping[str, Any]]) -> SlotMap | str:
        """Read the map off SGLang's pool and wrapped layers; a sentence where its own path must be used."""
        if pool.tp_size != 1 or pool.moe_ep_size != 1 or pool.moe_tp_size != 1 or pool.attn_tp_size != 1:
            return "weights are spread over several devices"
        if pool.enable_lora_overlap_loading:
            return "loading overlaps with computing"
        if pool.lora_added_tokens_size or pool.embedding_A_buffer or pool.lm_head_A_buffer:
            return "embeddings have slots"
        banks: list[Bank] = []
        taken: set[tuple[int, str]] = set()
        for layer, modules in enumerate(lora_modules):
            for name, module in modules.items():
                found = _expert_banks(pool, layer, name, module) or _dense_banks(pool, layer, name, module)
                if isinstance(found, str):
                    return found
                for key, bank in found:
                    if (layer, key) in taken:
                        return f"two modules of layer {layer} share the buffers of {key}"
                    taken.add((layer, key))
                    banks.append(bank)
        return cls(banks)

    def plan(
        self, weights: Mapping[str, Tensor], *, rank: int, scaling: float, layout: Hashable | None = None
    ) -> SlotPlan | str:
        """Sort an adapter's tensors by bank; a sentence where SGLang's own path must be used.

        ``layout`` stands for the names and shapes of ``weights``: what was given with an equal one is not checked
        again. Raises :class:`InvalidArgument` for a tensor that does not fit its buffer, before anything is written.
        """
        arrangement = self._arrangements.get((layout, rank))
        if arrangement is None:
            found = self._arrange(weights, rank)
            if isinstance(found, str):
                return found
            arrangement = found
            if layout is not None:
                if len(self._arrangements) >= _MAX_ARRANGEMENTS:
                    self._arrangements.clear()
                self._arrangements[layout, rank] = arrangement
        banks = (None if names is None else tuple(_part(weights, pair) for pair in names) for names in arrangement)
        return SlotPlan(rank, scaling, tuple(banks))

    def _arrange(self, weights: Mapping[str, Tensor], rank: int) -> _Arrangement | str:
        """The names of the tensors by bank and part."""
        if strangers := weights.keys() - self._known:
            return f"{min(strangers)} has no place of its own in the slots"
        banks: list[tuple[tuple[str, str] | None, ...] | None] = []
        for bank, names in zip(self.banks, self._names, strict=True):
            found = tuple(pair if _fits(bank, place, weights, pair, rank) else None for place, pair in enumerate(names))
            missing = [part for part, pair in zip(bank.parts, found, strict=True) if pair is None]
            if len(missing) == len(bank.parts):
                banks.append(None)
            elif set(missing) <= _OPTIONAL_PARTS:
                banks.append(found)
            else:
                return f"{bank.name} has some of its parts and lacks {missing}"
        return tuple(banks)


def _tensor_names(module: str) -> tuple[str, str]:
    """What a packed adapter calls A and B of a module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _part(weights: Mapping[str, Tensor], names: tuple[str, str] | None) -> PartWeights | None:
    return None if names is None else PartWeights(weights[names[0]], weights[names[1]])


def _fits(bank: Bank, place: int, weights: Mapping[str, Tensor], names: tuple[str, str], rank: int) -> bool:
    """Whether the adapter has a part of a bank; :class:`InvalidArgument` if it has and it does not fit."""
    lora_a, lora_b = (weights.get(name) for name in names)
    if lora_a is None and lora_b is None:
        return False
    if lora_a is None or lora_b is None:
        raise InvalidArgument(f"{bank.name}: {bank.parts[place]} has one of lora_A and lora_B only", field="weights")
    num_outputs = bank.offsets[place + 1] - bank.offsets[place]
    _check(bank, names[0], lora_a, bank.lora_a, (rank, bank.lora_a.shape[-1]), rank)
    _check(bank, names[1], lora_b, bank.lora_b, (num_outputs, rank), rank)
    return True


def _check(bank: Bank, name: str, tensor: Tensor, buffer: Tensor, matrix: tuple[int, int], rank: int) -> None:
    shape, expected = tuple(tensor.shape), tuple(matrix)
    if bank.has_experts:
        # One matrix may stand for all experts; the copy spreads it.
        expected = (1 if shape[:1] == (1,) else buffer.shape[1], *matrix)
    if shape != expected or rank > bank.max_rank:
        raise InvalidArgument(
            f"{name} has shape {list(shape)}, the slots of {bank.name} need {list(expected)} and a rank of at most "
            f"{bank.max_rank}: the adapter was made for another base or with another rank",
            field="weights",
        )


def _expert_banks(pool: Any, layer: int, name: str, module: Any) -> list[tuple[str, Bank]] | str | None:
    from sglang.srt.lora.layers import FusedMoEWithLoRA

    if getattr(getattr(module, "base_layer", module), "is_shared_fused_moe", False):
        return f"{name} keeps its shared experts in slots of their own"
    if not isinstance(module, FusedMoEWithLoRA):
        return None
    if module._uses_interleaved_gate_up or not module.base_layer.moe_runner_config.is_gated:
        return f"{name} does not keep gate and up side by side"
    found = []
    for key, parts in _EXPERT_PARTS.items():
        if key not in pool.A_buffer:
            return f"{name} has no buffers under {key}"
        lora_a, lora_b = pool.A_buffer[key][layer], pool.B_buffer[key][layer]
        width = lora_b.shape[-2] // len(parts)
        offsets = tuple(width * place for place in range(len(parts) + 1))
        found.append((key, Bank(f"{name}.{key.removesuffix('_moe')}", layer, lora_a, lora_b, parts, offsets)))
    return _checked(found)


def _dense_banks(pool: Any, layer: int, name: str, module: Any) -> list[tuple[str, Bank]] | str:
    from sglang.srt.lora.utils import get_target_module_name

    leaf, offsets = name.rpartition(".")[2], getattr(module, "lora_offsets", None)
    try:
        key = get_target_module_name(name, pool.target_modules)
    except ValueError:
        key = ""
    if key not in pool.A_buffer or offsets is None:
        return f"{name} has no buffers that are known here"
    lora_a, lora_b = pool.A_buffer[key][layer], pool.B_buffer[key][layer]
    return _checked([(key, Bank(name, layer, lora_a, lora_b, _PARTS.get(leaf, (leaf,)), tuple(offsets)))])


def _checked(found: list[tuple[str, Bank]]) -> list[tuple[str, Bank]] | str:
    """What a bank claims must be what its buffers have; another release may order them differently."""
    for _, bank in found:
        rows, columns = bank.lora_a.shape[-2], bank.lora_b.shape[-2]
        if rows != len(bank.parts) * bank.max_rank or bank.offsets[0] != 0 or bank.offsets[-1] != columns:
            return f"the buffers of {bank.name} have {rows} rows and {columns} outputs, which its parts do not explain"
        if len(bank.offsets) != len(bank.parts) + 1 or bank.lora_a.device.type != "cpu":
            return f"the buffers of {bank.name} are cut differently, or not in host memory"
    return found
