"""PEFT's layout of parameters (``target_parameters``): all experts of a projection in one flat matrix.

transformers 5 holds the experts of a layer as two parameters of one module, ``gate_up_proj`` [experts, 2 inner,
hidden] (gate's rows first) and ``down_proj`` [experts, hidden, inner]. PEFT wraps both around that module, so their
matrices are called ``…experts.base_layer`` and ``…experts``, and flattens them differently: A [experts * r, in] with
the expert slowest, B [out, r * experts] with the expert fastest. Older PEFT took such a parameter for its transpose,
with A on the side of the outputs; both are read, and since hidden and inner sizes must agree between the two
parameters, the shapes say which one it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mint_core.errors import InvalidArgument
from mint_lora.config import LAYOUT_PARAMETERS, AdapterConfig, ends
from mint_lora.dtypes import DTYPES
from mint_lora.layout_packed import packed_tensors
from mint_lora.layout_peft import is_flattened
from mint_lora.pivot import EXPERT_MODULE, LoraName, PackedTensor, Pivot, Unpacked, parse_lora_name
from mint_lora.stacks import expanded, same, transformed, whole
from mint_lora.tensors import Array, TensorFile, TensorSource

__all__ = ["DOWN", "GATE_UP", "ParametersLayout"]

GATE_UP = "gate_up_proj"
DOWN = "down_proj"

_GATE, _UP = "gate_proj", "up_proj"
_WRAPPED = ".base_layer"
_READ_HIDDEN = {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"}
_WRITE_HIDDEN = {"o_proj"}


@dataclass(frozen=True, slots=True)
class _Flat:
    """The two matrices of one parameter, as PEFT saves them."""

    block: str
    a: TensorSource
    """[experts * r, in]"""
    b: TensorSource
    """[out, r * experts]"""

    @property
    def sizes(self) -> tuple[int, int]:
        """in, out"""
        return self.a.shape[1], self.b.shape[0]

    def __str__(self) -> str:
        return f"lora_A {list(self.a.shape)}, lora_B {list(self.b.shape)}"


@dataclass(frozen=True, slots=True)
class _Stack:
    """The two matrices of one projection, its experts apart."""

    module: str
    a: TensorSource
    """[experts, r, in]"""
    b: TensorSource
    """[experts, out, r]"""
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


class ParametersLayout:
    """The codec. It reads adapters of every family alike: transformers 5 has one name for all of them."""

    name = LAYOUT_PARAMETERS

    def to_packed(self, file: TensorFile, config: AdapterConfig) -> Pivot:
        dense, flat = _sorted_out(file)
        hidden = _hidden_size(dense)
        named: list[tuple[str, _Flat, bool]] = []
        for block, wrappers in flat.items():
            named += _parameters(block, wrappers, config, hidden)
        config.check_targets([*(name.module for name in dense), *(f"{flat.block}.{name}" for name, flat, _ in named)])
        stacks = list(_stacks(named, config))
        packed = dict(dense)
        ranks = {name.module: (config.rank_of(name.module), config.alpha_of(name.module)) for name in dense}
        for stack in stacks:
            packed[LoraName(stack.module, "A")] = PackedTensor(stack.a, (stack.module,))
            packed[LoraName(stack.module, "B")] = PackedTensor(stack.b, (stack.module,))
            ranks[stack.module] = (stack.rank, stack.alpha)
        canonical = replace(
            config,
            target_modules=tuple({module.rpartition(".")[2] for module in ranks}),
            rank_pattern={module: rank for module, (rank, _) in ranks.items() if rank != config.rank},
            alpha_pattern={module: alpha for module, (_, alpha) in ranks.items() if alpha != config.alpha},
        )
        return Pivot(packed, canonical)

    def from_packed(self, file: TensorFile, config: AdapterConfig, architecture: str) -> Unpacked:  # noqa: ARG002
        if not config.is_uniform:
            raise InvalidArgument(
                f"{file.path.name} has a rank_pattern or alpha_pattern, which packed adapters have not: pack it again",
                field="rank_pattern",
            )
        packed = {name: each.source for name, each in packed_tensors(file).items()}
        num_experts = max((each.shape[0] for each in packed.values() if len(each.shape) == 3), default=0)
        stacks = {name: expanded(each, num_experts) for name, each in packed.items() if len(each.shape) == 3}
        dense = {name: each for name, each in packed.items() if name not in stacks}
        tensors = {str(name): each for name, each in dense.items()}
        targets = {_dense_target(name.module) for name in dense}
        blocks = sorted({name.module.rpartition(".")[0] for name in stacks})
        is_joined = all(_reads_alike(packed, block) for block in blocks)
        for block in blocks:
            fused = _fused(block, stacks, is_joined)
            down = _pair(block, DOWN, stacks)
            parameters = {key: pair for key, pair in ((GATE_UP, fused), (DOWN, down)) if pair is not None}
            # PEFT wraps gate_up_proj first, which makes it the inner one where there are two.
            wrappers = (f"{block}{_WRAPPED}", block)[-len(parameters) :]
            for (parameter, (a, b)), wrapper in zip(parameters.items(), wrappers, strict=True):
                tensors[str(LoraName(wrapper, "A"))] = replace(a, shape=(a.shape[0] * a.shape[1], a.shape[2]))
                tensors[str(LoraName(wrapper, "B"))] = _expert_fastest(b)
                targets.add(".".join((*block.split(".")[-2:], parameter)))
        config = replace(config, target_modules=tuple(targets))
        if stacks and not is_joined:
            ratio = config.divisor(2 * config.rank) / config.divisor(config.rank)
            key = f"experts.{GATE_UP}"
            config = replace(config, rank_pattern={key: 2 * config.rank}, alpha_pattern={key: config.alpha * ratio})
        return Unpacked(tensors, config)


def _sorted_out(file: TensorFile) -> tuple[dict[LoraName, PackedTensor], dict[str, dict[str, _Flat]]]:
    """Dense modules, and the flat parameters by block, then by ``inner`` and ``outer``."""
    dense: dict[LoraName, PackedTensor] = {}
    flat: dict[str, dict[str, TensorSource]] = {}
    for tensor, info in file.header.tensors.items():
        name = parse_lora_name(tensor)
        if EXPERT_MODULE.fullmatch(name.module) or len(info.shape) != 2 or 0 in info.shape:
            raise InvalidArgument(
                f"tensor {tensor!r} {list(info.shape)} does not belong into a file of layout {LAYOUT_PARAMETERS}: all "
                "experts are in one matrix of two dimensions there",
                field="weights",
            )
        if is_flattened(name.module):
            flat.setdefault(name.module, {})[name.side] = file.source(tensor)
        else:
            dense[name] = PackedTensor(file.source(tensor), (name.module,))
    blocks: dict[str, dict[str, _Flat]] = {}
    for module, sides in flat.items():
        block = module.removesuffix(_WRAPPED)
        if not block.endswith(".experts"):
            raise InvalidArgument(
                f"{module} is a parameter of {block}, which is no block of experts: only parameters of experts are "
                "supported",
                field="weights",
            )
        if missing := {"A", "B"} - sides.keys():
            raise InvalidArgument(
                f"module {module} has no lora_{missing.pop()}: A and B come in pairs", field="weights"
            )
        wrapper = "outer" if module == block else "inner"
        blocks.setdefault(block, {})[wrapper] = _Flat(block, sides["A"], sides["B"])
    return dense, blocks


def _hidden_size(dense: Mapping[LoraName, PackedTensor]) -> int | None:
    """The base's hidden size, where the adapter's attention modules tell."""
    found = set()
    for name, tensor in dense.items():
        leaf = name.module.rpartition(".")[2]
        if leaf in _READ_HIDDEN and name.side == "A":
            found.add(tensor.source.shape[1])
        elif leaf in _WRITE_HIDDEN and name.side == "B":
            found.add(tensor.source.shape[0])
    return found.pop() if len(found) == 1 else None


def _parameters(
    block: str, wrappers: Mapping[str, _Flat], config: AdapterConfig, hidden: int | None
) -> list[tuple[str, _Flat, bool]]:
    """Which matrices belong to which parameter, and whether they are for its transpose."""
    if len(wrappers) == 2:
        for (gate_up, down), is_swapped in itertools.product(itertools.permutations(wrappers.values()), (False, True)):
            (reads, writes), (inner, hidden_out) = gate_up.sizes, down.sizes
            if is_swapped:
                reads, writes, inner, hidden_out = writes, reads, hidden_out, inner
            if reads == hidden_out and writes == 2 * inner:
                # Sizes are positive, so no other of the four ways to read them can hold as well.
                return [(GATE_UP, gate_up, is_swapped), (DOWN, down, is_swapped)]
        described = "; ".join(f"{wrapper} {flat}" for wrapper, flat in sorted(wrappers.items()))
        raise InvalidArgument(
            f"{block}: {described} are not those of gate_up_proj [experts, 2 inner, hidden] and down_proj [experts, "
            "hidden, inner]",
            field="weights",
        )
    (flat,) = wrappers.values()
    named = [each for each in (GATE_UP, DOWN) if not set(config.target_modules).isdisjoint(ends(f"{block}.{each}"))]
    if len(named) != 1:
        raise InvalidArgument(
            f"{block} has matrices for one parameter, the configuration targets {named or 'none'} of it",
            field="target_modules",
        )
    sides = [size == hidden for size in flat.sizes]
    if sides.count(True) != 1:
        raise InvalidArgument(
            f"{block}.{named[0]}: {flat} do not tell inputs from outputs, which PEFT's versions order differently; "
            "adapt gate_up_proj and down_proj both, or an attention module with them",
            field="weights",
        )
    return [(named[0], flat, sides[1] if named[0] == GATE_UP else sides[0])]


def _stacks(named: list[tuple[str, _Flat, bool]], config: AdapterConfig) -> Iterator[_Stack]:
    """Every projection with its experts apart."""
    parameters = [_apart(f"{flat.block}.{name}", flat, is_swapped, config) for name, flat, is_swapped in named]
    fused = [each for each in parameters if each.module.endswith(GATE_UP)]
    # Where PEFT or we fused gate and up from two adapters of half the rank, they are taken apart again.
    is_split = all(map(_is_block_diagonal, fused))
    for each in parameters:
        if each.module.endswith(GATE_UP):
            yield from _halves(each, is_split, config)
        else:
            yield each


def _apart(module: str, flat: _Flat, is_swapped: bool, config: AdapterConfig) -> _Stack:
    rank = config.rank_of(module)
    num_experts = flat.a.shape[0] // rank
    if flat.a.shape[0] != num_experts * rank or flat.b.shape[1] != num_experts * rank:
        raise InvalidArgument(
            f"{module}: {flat} do not fit rank {rank}: expected [experts * r, in] and [out, r * experts]", field="rank"
        )
    (size_in, size_out), shape_b = flat.sizes, (flat.b.shape[0], rank, num_experts)
    stacked_a = replace(flat.a, shape=(num_experts, rank, size_in))
    if not is_swapped:
        stacked_b = transformed(
            flat.b, (num_experts, size_out, rank), lambda array: array.reshape(shape_b).transpose(2, 0, 1)
        )
        return _Stack(module, stacked_a, stacked_b, config.alpha_of(module))
    # delta W of the transpose is A.T @ B.T: what reads the inputs is B.T, what writes the outputs A.T.
    return _Stack(
        module,
        transformed(flat.b, (num_experts, rank, size_out), lambda array: array.reshape(shape_b).transpose(2, 1, 0)),
        transformed(stacked_a, (num_experts, size_in, rank), lambda array: array.transpose(0, 2, 1)),
        config.alpha_of(module),
    )


def _is_block_diagonal(fused: _Stack) -> bool:
    """Whether gate's half of B uses the first half of the rank only, up's half the second only, and both do."""
    if fused.rank % 2:
        return False
    b, half, inner = whole(fused.b), fused.rank // 2, fused.b.shape[1] // 2
    return not (b[:, :inner, half:].any() or b[:, inner:, :half].any()) and bool(
        b[:, :inner, :half].any() and b[:, inner:, half:].any()
    )


def _halves(fused: _Stack, is_split: bool, config: AdapterConfig) -> Iterator[_Stack]:
    num_experts, num_rows, rank = fused.b.shape
    inner, half, alpha = num_rows // 2, rank, fused.alpha
    if is_split:
        half = rank // 2
        alpha = alpha * config.divisor(half) / config.divisor(rank)
        # The square roots of rsLoRA do not come back to the last bit.
        if abs(alpha - config.alpha) <= 1e-12 * abs(config.alpha):
            alpha = config.alpha
    for index, leaf in enumerate((_GATE, _UP)):
        rows = slice(index * inner, (index + 1) * inner)
        columns = slice(index * half, (index + 1) * half) if is_split else slice(0, rank)
        yield _Stack(
            fused.module.removesuffix(GATE_UP) + leaf,
            _cut(fused.a, (num_experts, half, fused.a.shape[2]), (slice(None), columns)),
            _cut(fused.b, (num_experts, inner, half), (slice(None), rows, columns)),
            alpha,
        )


def _cut(source: TensorSource, shape: tuple[int, ...], place: tuple[slice, ...]) -> TensorSource:
    return source if source.shape == shape else transformed(source, shape, lambda array: array[place])


_Pair = tuple[TensorSource, TensorSource]


def _pair(block: str, leaf: str, stacks: Mapping[LoraName, TensorSource]) -> _Pair | None:
    a, b = (stacks.get(LoraName(f"{block}.{leaf}", side)) for side in "AB")
    return None if a is None or b is None else (a, b)


def _reads_alike(packed: Mapping[LoraName, TensorSource], block: str) -> bool:
    """Whether gate and up have one A, so that fusing them needs no higher rank."""
    gate, up = (packed.get(LoraName(f"{block}.{leaf}", "A")) for leaf in (_GATE, _UP))
    return gate is None or up is None or same(gate, up)


def _fused(block: str, stacks: Mapping[LoraName, TensorSource], is_joined: bool) -> _Pair | None:
    """Gate and up as one parameter; the half that the adapter leaves alone is zero."""
    halves = [_pair(block, leaf, stacks) for leaf in (_GATE, _UP)]
    present = next(filter(None, halves), None)
    if present is None:
        return None
    a, b = present
    num_experts, inner, rank = b.shape
    step = 0 if is_joined else rank

    def fuse(side: int, source: TensorSource, row_step: int, column_step: int) -> TensorSource:
        shape = (num_experts, source.shape[1] + row_step, source.shape[2] + column_step)

        def read() -> tuple[Array]:
            fused = np.zeros(shape, dtype=DTYPES[source.dtype].view)
            for index, pair in enumerate(halves):
                if pair is not None:
                    row, column = index * row_step, index * column_step
                    fused[:, row : row + source.shape[1], column : column + source.shape[2]] = whole(pair[side])
            return (fused,)

        return TensorSource(source.dtype, shape, read)

    return fuse(0, a, step, 0), fuse(1, b, inner, step)


def _expert_fastest(b: TensorSource) -> TensorSource:
    """[experts, out, r] as [out, r * experts]."""
    num_experts, size_out, rank = b.shape
    shape = (size_out, rank * num_experts)
    return transformed(b, shape, lambda array: array.transpose(1, 2, 0).reshape(shape))


def _dense_target(module: str) -> str:
    # With its block where PEFT would take the leaf alone for the experts'.
    *_, block, leaf = ("", *module.split("."))
    return f"{block}.{leaf}" if leaf in ("gate", _GATE, _UP, DOWN) else leaf
