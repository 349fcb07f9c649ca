"""PEFT's layout of modules: dense ones, and each expert by itself: ``…mlp.experts.7.up_proj.lora_A.weight`` [r, in]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mint_core.errors import InvalidArgument
from mint_lora.config import LAYOUT_PEFT, AdapterConfig
from mint_lora.families import canonical_end, canonical_module, family_of
from mint_lora.pivot import EXPERT_MODULE, LoraName, PackedTensor, Pivot, Unpacked, parse_lora_name
from mint_lora.stacks import at_expert
from mint_lora.tensors import Array, TensorFile, TensorSource

__all__ = ["PeftLayout", "is_flattened"]


def is_flattened(module: str) -> bool:
    """Whether a tensor's module is PEFT's way to name parameters of a block of experts, and no module."""
    return module.rpartition(".")[2] in ("experts", "base_layer")


class PeftLayout:
    """The codec; with ``architecture`` it writes the names that family's checkpoints have."""

    name = LAYOUT_PEFT

    def to_packed(self, file: TensorFile, config: AdapterConfig) -> Pivot:
        packed: dict[LoraName, PackedTensor] = {}
        stacks: dict[LoraName, dict[int, str]] = {}
        is_renamed = False
        for tensor in file.header.tensors:
            name = parse_lora_name(tensor)
            module = canonical_module(name.module)
            is_renamed |= module != name.module
            match = EXPERT_MODULE.fullmatch(module)
            if match is None:
                if is_flattened(module):
                    # All experts in one matrix, A and B ordered differently: read as a dense module it would serve
                    # wrong numbers.
                    raise InvalidArgument(
                        f"tensor {tensor!r} comes from PEFT's target_parameters, but the configuration says layout "
                        f"{self.name}: import it with its adapter_config.json",
                        field="weights",
                    )
                _add(packed, LoraName(module, name.side), PackedTensor(file.source(tensor), (module,)))
            else:
                stack = stacks.setdefault(LoraName(f"{match['before']}.{match['after']}", name.side), {})
                if stack.setdefault(int(match["expert"]), tensor) != tensor:
                    raise InvalidArgument(f"{tensor!r} is there under two names", field="weights")
        num_experts = 1 + max((max(experts) for experts in stacks.values()), default=-1)
        for name, experts in stacks.items():
            missing = num_experts - len(experts)
            if missing:
                first = next(each for each in range(num_experts) if each not in experts)
                raise InvalidArgument(
                    f"{name} lacks {missing} of {num_experts} experts, expert {first} first: an adapter has all "
                    f"experts of a module or none",
                    field="weights",
                )
            _add(packed, name, _stacked(file, name, [experts[each] for each in range(num_experts)]))
        return Pivot(packed, _renamed(config) if is_renamed else config)

    def from_packed(self, file: TensorFile, config: AdapterConfig, architecture: str) -> Unpacked:
        family = family_of(architecture)
        shapes = [each.shape for each in file.header.tensors.values() if len(each.shape) == 3]
        num_experts = max((shape[0] for shape in shapes), default=0)
        tensors: dict[str, TensorSource] = {}
        for tensor in file.header.tensors:
            name, source = parse_lora_name(tensor), file.source(tensor)
            if len(source.shape) == 2:
                tensors[str(name)] = source
                continue
            before, _, after = name.module.rpartition(".")
            for expert in range(num_experts):
                module = f"{before}.{expert}.{after}"
                if family is not None:
                    module = family.checkpoint_module(module)
                tensors[str(LoraName(module, name.side))] = at_expert(source, expert)
        if num_experts and config.use_rslora:
            # PEFT 0.21 fuses gate and up of single experts with twice the rank and twice the alpha, which with rsLoRA
            # is sqrt(2) too much: the scaling it is to have is said without.
            config = replace(config, alpha=config.scaling * config.rank, use_rslora=False)
        if family is not None and family.checkpoint_leaves:
            targets = tuple(family.checkpoint_leaves.get(each, each) for each in config.target_modules)
            config = replace(config, target_modules=targets)
        return Unpacked(tensors, config)


def _add(packed: dict[LoraName, PackedTensor], name: LoraName, tensor: PackedTensor) -> None:
    if name in packed:
        raise InvalidArgument(
            f"{name} is there twice: under two names, or both as one tensor and by expert", field="weights"
        )
    packed[name] = tensor


def _renamed(config: AdapterConfig) -> AdapterConfig:
    return replace(
        config,
        target_modules=tuple(map(canonical_end, config.target_modules)),
        rank_pattern={canonical_end(key): value for key, value in config.rank_pattern.items()},
        alpha_pattern={canonical_end(key): value for key, value in config.alpha_pattern.items()},
    )


def _stacked(file: TensorFile, name: LoraName, tensors: list[str]) -> PackedTensor:
    infos = [file.header.tensors[each] for each in tensors]
    for info in infos:
        if (info.dtype, info.shape) != (infos[0].dtype, infos[0].shape):
            raise InvalidArgument(
                f"{info.name} is {info.dtype} {list(info.shape)}, expert 0 is {infos[0].dtype} "
                f"{list(infos[0].shape)}: the experts of a module must be alike",
                field="weights",
            )

    def read() -> Iterator[Array]:
        # Experts are the slowest dimension, so the stack's bytes are the experts' bytes one after the other.
        return (file.array(each) for each in tensors)

    before, _, after = name.module.rpartition(".")
    modules = tuple(f"{before}.{expert}.{after}" for expert in range(len(tensors)))
    return PackedTensor(TensorSource(infos[0].dtype, (len(tensors), *infos[0].shape), read), modules)
