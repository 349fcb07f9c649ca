"""The configuration of an adapter out of PEFT's ``adapter_config.json`` and the tensors that are really there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mint_core.errors import InvalidArgument
from mint_lora.config import (
    LAYOUT_PACKED,
    LAYOUT_PARAMETERS,
    LAYOUT_PEFT,
    AdapterConfig,
    ends,
    load_json_object,
)
from mint_lora.dtypes import DTYPES, common_dtype
from mint_lora.families import canonical_module, family_of
from mint_lora.header import Header
from mint_lora.layout_parameters import DOWN, GATE_UP
from mint_lora.layout_peft import is_flattened
from mint_lora.pivot import parse_lora_name

__all__ = ["CONFIG_NAME", "config_from_peft"]

CONFIG_NAME = "adapter_config.json"

_PATTERN_KEY = re.compile(r"(?P<start>\^|\.\*\\?\.|\(\.\*\\\.\)\?)?(?P<name>[A-Za-z0-9_]+(?:\\?\.[A-Za-z0-9_]+)*)\$?")
"""A plain name, also if spelled as the regular expression of itself: ``^model\\.layers``, ``.*\\.down_proj``."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}
"""PEFT options that change what an adapter does and that are not supported, each with the values that mean "off"."""


def config_from_peft(
    text: str, header: Header, *, base_model: str, base_digest: str, architecture: str = ""
) -> AdapterConfig:
    """The configuration of a PEFT adapter from its ``adapter_config.json`` and the tensors it really has.

    PEFT matches the keys of its patterns as regular expressions, first match first; here they are plain names, resolved
    to one entry per module. The layout is the one the tensors' names and shapes say, the type the narrowest one that
    holds all of theirs. With ``architecture`` (``Qwen3MoeForCausalLM``) of a known family, names that no module of such
    a model has are refused. Raises :class:`InvalidArgument` naming what is wrong or not supported.
    """
    values = load_json_object(text, what=CONFIG_NAME)
    if str(values.get("peft_type", "")).upper() != "LORA":
        raise _unsupported("peft_type", values.get("peft_type"), "LORA")
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral:
            raise _unsupported(key, values[key], str(neutral[-1]))
    if not header.tensors:
        raise InvalidArgument("the adapter has no tensors", field="weights")
    found = sorted({parse_lora_name(name).module for name in header.tensors})
    layout = _layout_of(found, header)
    parameters = _names(values, "target_parameters")
    modules = _with_parameters(found, parameters) if layout == LAYOUT_PARAMETERS else found
    if family := family_of(architecture):
        family.check_modules(_projections(modules))
    # PEFT knows a dense module whose weight was targeted as a parameter by that parameter's name.
    known = {each: f"{each}.weight" if _is_among(f"{each}.weight", parameters) else each for each in modules}
    rank, alpha = values.get("r"), values.get("lora_alpha")
    return AdapterConfig(
        rank=rank,  # type: ignore[arg-type]  # checked by AdapterConfig, which names the field
        alpha=alpha,  # type: ignore[arg-type]
        use_rslora=values.get("use_rslora") or False,
        target_modules=tuple({each.rpartition(".")[2] for each in modules}),
        base_model=base_model,
        base_digest=base_digest,
        dtype=_dtype_of(header),
        rank_pattern=_resolved(values.get("rank_pattern"), "rank_pattern", known, rank),
        alpha_pattern=_resolved(values.get("alpha_pattern"), "alpha_pattern", known, alpha),
        layout=layout,
    )


def _unsupported(key: str, value: Any, expected: str) -> InvalidArgument:
    return InvalidArgument(
        f"{CONFIG_NAME}: {key} is {str(value)[:100]!r}, which is not supported; expected {expected}", field=key
    )


def _layout_of(modules: Iterable[str], header: Header) -> str:
    if any(len(each.shape) == 3 for each in header.tensors.values()):
        return LAYOUT_PACKED
    return LAYOUT_PARAMETERS if any(map(is_flattened, modules)) else LAYOUT_PEFT


def _names(values: Mapping[str, Any], key: str) -> frozenset[str]:
    names = values.get(key) or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise _unsupported(key, names, "an array of names")
    return frozenset(names)


def _is_among(module: str, targets: frozenset[str]) -> bool:
    return not targets.isdisjoint(ends(module))


def _with_parameters(found: Iterable[str], parameters: frozenset[str]) -> list[str]:
    """The modules, with ``…experts.gate_up_proj`` and ``…experts.down_proj`` for what PEFT calls ``…experts`` and
    ``…experts.base_layer``."""
    flat = [each for each in found if is_flattened(each)]
    modules = [each for each in found if not is_flattened(each)]
    for block in sorted({each.removesuffix(".base_layer") for each in flat}):
        both = [f"{block}.{GATE_UP}", f"{block}.{DOWN}"]
        if f"{block}.base_layer" not in flat:
            both = [each for each in both if _is_among(each, parameters)]
        modules += both
    return modules


def _projections(modules: Iterable[str]) -> Iterable[str]:
    for each in map(canonical_module, modules):
        if each.endswith(f".experts.{GATE_UP}"):
            yield from (each.replace(GATE_UP, leaf) for leaf in ("gate_proj", "up_proj"))
        else:
            yield each


def _dtype_of(header: Header) -> str:
    dtypes = {each.dtype for each in header.tensors.values()}
    dtype = common_dtype(dtypes)
    if dtype is None:
        raise InvalidArgument(
            f"the adapter has tensors of type {', '.join(sorted(dtypes))}: expected F32, F16, BF16, F8_E4M3 or F8_E5M2",
            field="dtype",
        )
    return DTYPES[dtype].common_name


def _resolved(pattern: Any, what: str, modules: Mapping[str, str], default: Any) -> dict[str, Any]:
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        raise _unsupported(what, pattern, "an object")
    by_name: dict[str, tuple[int, Any]] = {}
    by_end: dict[str, tuple[int, Any]] = {}
    for order, (key, value) in enumerate(pattern.items()):
        match = _PATTERN_KEY.fullmatch(key)
        if match is None:
            raise _unsupported(what, key, "plain module names as keys, not regular expressions")
        (by_name if match["start"] == "^" else by_end).setdefault(match["name"].replace("\\", ""), (order, value))
    resolved: dict[str, Any] = {}
    for module, name in modules.items():
        matching = [by_end[end] for end in ends(name) if end in by_end]
        if name in by_name:
            matching.append(by_name[name])
        _, value = min(matching, key=lambda each: each[0], default=(0, default))
        if value != default:
            resolved[module] = value
    return resolved
