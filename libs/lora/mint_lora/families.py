"""How model families name their modules, as a table.

Adapters come with the names of whatever trained them: Mixtral's experts are ``block_sparse_moe.experts.3.w1`` in its
checkpoints and ``mlp.experts`` in transformers 5. The packed layout has one name for one thing:
``mlp.experts.{gate,up,down}_proj``. Names of other modules are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mint_core.errors import InvalidArgument

__all__ = ["FAMILIES", "Family", "canonical_end", "canonical_module", "family_of"]

_GQA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
# q_proj where a model has no query compression (DeepSeek-V2-Lite), q_a_proj and q_b_proj where it has.
_MLA = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
_DSA = ("self_attn.indexer.wq_b", "self_attn.indexer.wk", "self_attn.indexer.weights_proj")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MLP = tuple(f"mlp.{each}" for each in _PROJECTIONS)
_EXPERTS = ("mlp.gate", *(f"mlp.experts.{each}" for each in _PROJECTIONS))
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{each}" for each in _PROJECTIONS)

_LAYER = re.compile(r"model\.layers\.(?:0|[1-9][0-9]{0,4})\.(?P<module>.+)")
_EXPERT_NUMBER = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose modules have the same names."""

    name: str
    architectures: tuple[str, ...]
    """As ``architectures`` in ``config.json`` says it."""
    modules: tuple[str, ...]
    """Canonical names of what can be adapted in a layer; a stack of experts without the expert's number."""
    checkpoint_block: str = "mlp"
    """What checkpoints, and PEFT adapters of single experts, call the canonical ``mlp`` around routed experts."""
    checkpoint_leaves: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What they call an expert's projections, by canonical name, where that differs."""

    @property
    def has_experts(self) -> bool:
        """Whether its models have routed experts."""
        return "mlp.gate" in self.modules

    def checkpoint_module(self, module: str) -> str:
        """What checkpoints call the canonical module of one expert; other modules keep their name."""
        match = _EXPERT.fullmatch(module)
        if match is None:
            return module
        leaf = self.checkpoint_leaves.get(match["leaf"], match["leaf"])
        return f"{match['before']}{self.checkpoint_block}.experts{match['expert'] or ''}.{leaf}"

    def check_modules(self, modules: Iterable[str]) -> None:
        """Raise :class:`InvalidArgument` naming the first canonical module that no model of this family has."""
        for module in modules:
            match = _LAYER.fullmatch(_EXPERT_NUMBER.sub(".experts.", module))
            if module != "lm_head" and (match is None or match["module"] not in self.modules):
                raise InvalidArgument(
                    f"module {module[:200]!r} is not in models of the {self.name} family; there are "
                    f"model.layers.<layer>. with {', '.join(self.modules)}",
                    field="weights",
                )


FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"), _GQA + _MLP),
    Family("Qwen3", ("Qwen3ForCausalLM",), _GQA + _MLP),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), _GQA + _MLP + _EXPERTS),
    Family(
        "Mixtral",
        ("MixtralForCausalLM",),
        _GQA + _EXPERTS,
        "block_sparse_moe",
        MappingProxyType({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    ),
    Family(
        "DeepSeek-V2/V3",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
        _MLA + _MLP + _EXPERTS + _SHARED_EXPERTS,
    ),
    Family("GLM-4-MoE", ("Glm4MoeForCausalLM",), _GQA + _MLP + _EXPERTS + _SHARED_EXPERTS),
    Family(
        "DeepSeek-V3.2/GLM-DSA",
        ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        _MLA + _DSA + _MLP + _EXPERTS + _SHARED_EXPERTS,
    ),
)
"""Every family this room knows. Others work as long as their names are canonical already."""

_BLOCKS = sorted({each.checkpoint_block for each in FAMILIES} - {"mlp"})
_LEAVES = {theirs: ours for each in FAMILIES for ours, theirs in each.checkpoint_leaves.items()}
_EXPERT = re.compile(r"(?P<before>.*\.)mlp\.experts(?P<expert>\.[0-9]+)?\.(?P<leaf>\w+)")


def family_of(architecture: str) -> Family | None:
    """The family of an architecture such as ``Qwen3MoeForCausalLM``, if this room knows it."""
    return next((each for each in FAMILIES if architecture in each.architectures), None)


def canonical_module(module: str) -> str:
    """The packed layout's name of a module: ``…block_sparse_moe.experts.3.w1`` is ``…mlp.experts.3.gate_proj``."""
    block, _, leaf = module.rpartition(".")
    if leaf in _LEAVES and (".experts." in block or block.endswith(".experts")):
        module = f"{block}.{_LEAVES[leaf]}"
    for block in _BLOCKS:
        module = module.replace(f".{block}.", ".mlp.")
    return module


def canonical_end(key: str) -> str:
    """The same for the end of a name, as targets and patterns are written (``w1``); for adapters that have such names
    only, other families may mean something else by them."""
    *before, leaf = ("mlp" if part in _BLOCKS else part for part in key.split("."))
    return ".".join((*before, _LEAVES.get(leaf, leaf)))
