"""What lies between two adapters: configuration, and delta W per module, by low-rank algebra.

delta W is never built whole. With a difference written as ``L @ R`` (L = [s B, -s' B'], R = [A; A']) and the QR
factorisation ``R.T = Q T``, the Frobenius norm of ``L @ R`` is that of the small ``L @ T.T``, without the cancellation
that a difference of squared norms would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mint_core.errors import InvalidArgument
from mint_lora.config import AdapterConfig
from mint_lora.dtypes import to_float32
from mint_lora.layouts import LoraName, PackedTensor, layout_named
from mint_lora.tensors import TensorFile
from mint_lora.validation import check_modules

__all__ = ["AdapterDiff", "ConfigChange", "ModuleDiff", "diff_adapters"]

_Floats: TypeAlias = npt.NDArray[np.float64]
_Factors: TypeAlias = tuple[_Floats, _Floats]
"""scaling * B and A"""
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One field of the configuration that differs."""

    field: str
    one: object
    other: object


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """delta W of one module, all its experts together. Norms are Frobenius norms."""

    module: str
    """Dotted name in the base; for a stack of experts without the expert's number."""
    num_experts: int | None
    """None for a dense module."""
    rank_one: int
    """0 where the first adapter leaves the module alone."""
    rank_other: int
    norm_one: float
    norm_other: float
    norm_difference: float
    """Of delta W of the first minus delta W of the second."""
    cosine: float | None
    """Of the angle between them; None where one is zero."""
    max_abs_difference: float
    """Largest absolute element of the difference, or a bound above it where ``is_max_exact`` is false."""
    is_max_exact: bool


@dataclass(frozen=True, slots=True)
class AdapterDiff:
    """Two adapters side by side."""

    config: tuple[ConfigChange, ...]
    """Fields that differ, by name."""
    modules: tuple[ModuleDiff, ...]
    """Every module that at least one of them adapts, by name."""
    norm_one: float
    norm_other: float
    norm_difference: float
    cosine: float | None
    max_abs_difference: float
    is_max_exact: bool

    @property
    def is_same(self) -> bool:
        """Whether both change the base alike, whatever their configurations say."""
        return self.norm_difference == 0.0


def diff_adapters(one: Path, other: Path, *, max_elements: int = 1 << 28) -> AdapterDiff:
    """Compare two adapter files with ``mint.adapter`` metadata, in any layout; blocks while it computes.

    The largest difference is exact while delta W of all modules together has at most ``max_elements`` elements (they
    are looked at in blocks), above that a bound. Raises :class:`InvalidArgument` for files that are no adapters and for
    a module whose shape differs between them: they were not made for one base.
    """
    with TensorFile(one) as one_file, TensorFile(other) as other_file:
        sides = (_Side(one_file), _Side(other_file))
        names = sorted({name for side in sides for name in side.modules})
        budget = max_elements
        modules: list[ModuleDiff] = []
        products: list[float] = []
        for name in names:
            module, product, num_elements = _diff_module(name, sides[0], sides[1], budget)
            modules.append(module)
            products.append(product)
            budget -= num_elements
    norm_one, norm_other, norm_difference = (
        math.sqrt(sum(getattr(each, key) ** 2 for each in modules))
        for key in ("norm_one", "norm_other", "norm_difference")
    )
    return AdapterDiff(
        config=_config_changes(sides[0].config, sides[1].config),
        modules=tuple(modules),
        norm_one=norm_one,
        norm_other=norm_other,
        norm_difference=norm_difference,
        cosine=_cosine(sum(products), norm_one, norm_other),
        max_abs_difference=max((each.max_abs_difference for each in modules), default=0.0),
        is_max_exact=all(each.is_max_exact for each in modules),
    )


class _Side:
    """One adapter, read module by module."""

    def __init__(self, file: TensorFile) -> None:
        config = AdapterConfig.from_metadata(file.header.metadata, file_name=file.path.name)
        pivot = layout_named(config.layout).to_packed(file, config)
        self.name = file.path.name
        self.config = config
        self._pivot = pivot
        self.modules = {each.name: each for each in check_modules(pivot.tensors, pivot.config)}

    def factors(self, module: str) -> tuple[_Floats, _Floats]:
        """``scaling * B`` [experts, out, r] and ``A`` [experts, r, in]; a side that all experts share has one."""
        tensors = self._pivot.tensors
        a, b = tensors[LoraName(module, "A")], tensors[LoraName(module, "B")]
        return _floats(b) * self._pivot.config.scaling_of(b.modules[0]), _floats(a)


def _floats(tensor: PackedTensor) -> _Floats:
    source = tensor.source
    flat = np.concatenate([to_float32(each.reshape(-1), source.dtype) for each in source.read()])
    shape = source.shape if len(source.shape) == 3 else (1, *source.shape)
    return flat.reshape(shape).astype(np.float64)


def _diff_module(name: str, one: _Side, other: _Side, budget: int) -> tuple[ModuleDiff, float, int]:
    infos = [side.modules.get(name) for side in (one, other)]
    info = infos[0] or infos[1]
    assert info is not None
    for found in infos:
        if found is not None and (found.shape, found.num_experts) != (info.shape, info.num_experts):
            raise InvalidArgument(
                f"module {name} is {list(info.shape)} in {one.name} and {list(found.shape)} in {other.name}: the "
                "adapters were not made for the same base",
                field="weights",
            )
    factors = [side.factors(name) if name in side.modules else None for side in (one, other)]
    num_experts = info.num_experts or 1
    squares = [0.0, 0.0, 0.0]
    product = highest = 0.0
    num_elements = num_experts * info.in_features * info.out_features
    is_exact = num_elements <= budget
    for one_pair, other_pair in _experts(factors, num_experts):
        left, right = _difference(one_pair, other_pair)
        _, t = qr = np.linalg.qr(right.T)
        norm = float(np.linalg.norm(left @ t.T))
        squares[0] += _inner_product(one_pair, one_pair)
        squares[1] += _inner_product(other_pair, other_pair)
        squares[2] += norm**2
        product += _inner_product(one_pair, other_pair)
        highest = max(highest, _max_abs(left, right) if is_exact else _max_bound(left, *qr))
    norm_one, norm_other, norm_difference = map(math.sqrt, squares)
    found_ranks = [0 if each is None else each.rank for each in infos]
    module = ModuleDiff(
        module=name,
        num_experts=info.num_experts,
        rank_one=found_ranks[0],
        rank_other=found_ranks[1],
        norm_one=norm_one,
        norm_other=norm_other,
        norm_difference=norm_difference,
        cosine=_cosine(product, norm_one, norm_other),
        max_abs_difference=highest,
        is_max_exact=is_exact or highest == 0.0,
    )
    return module, product, num_elements if is_exact else 0


def _experts(factors: list[_Factors | None], num_experts: int) -> Iterator[list[_Factors | None]]:
    for expert in range(num_experts):
        yield [None if each is None else (_at(each[0], expert), _at(each[1], expert)) for each in factors]


def _at(stack: _Floats, expert: int) -> _Floats:
    matrix: _Floats = stack[expert if len(stack) > 1 else 0]
    return matrix


def _difference(one: _Factors | None, other: _Factors | None) -> _Factors:
    """L and R with L @ R the first delta W minus the second."""
    if one is None or other is None:
        alone = one or other
        assert alone is not None
        return (alone[0], alone[1]) if other is None else (-alone[0], alone[1])
    if np.array_equal(one[1], other[1]):
        # Equal A leave the difference of B, exactly: adapters that are the same are told so, to the last bit.
        return one[0] - other[0], one[1]
    return np.concatenate((one[0], -other[0]), axis=1), np.concatenate((one[1], other[1]))


def _inner_product(one: _Factors | None, other: _Factors | None) -> float:
    """Of two delta W as vectors: trace(A.T B.T B' A')."""
    return 0.0 if one is None or other is None else float(np.sum((one[0].T @ other[0]) * (one[1] @ other[1].T)))


def _max_abs(left: _Floats, right: _Floats) -> float:
    rows = max(1, _BLOCK_ELEMENTS // right.shape[1])
    return max(
        float(np.abs(left[start : start + rows] @ right).max(initial=0.0)) for start in range(0, len(left), rows)
    )


def _max_bound(left: _Floats, q: _Floats, t: _Floats) -> float:
    """An element is the product of a row of L T.T and a row of Q, so at most that of their lengths (Cauchy-Schwarz)."""
    lengths = np.linalg.norm(left @ t.T, axis=1).max(initial=0.0), np.linalg.norm(q, axis=1).max(initial=0.0)
    return float(lengths[0] * lengths[1])


def _cosine(product: float, norm_one: float, norm_other: float) -> float | None:
    if not norm_one or not norm_other:
        return None
    return max(-1.0, min(1.0, product / norm_one / norm_other))


def _config_changes(one: AdapterConfig, other: AdapterConfig) -> tuple[ConfigChange, ...]:
    changes = []
    for field in sorted(each.name for each in fields(AdapterConfig)):
        values = getattr(one, field), getattr(other, field)
        if values[0] != values[1]:
            changes.append(ConfigChange(field, *values))
    return tuple(changes)
