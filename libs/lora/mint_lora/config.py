"""The effective configuration of an adapter, in one canonical spelling: part of what its digest means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Self, TypeVar

from mint_core.errors import InvalidArgument
from mint_core.names import check_digest

__all__ = [
    "LAYOUT_PACKED",
    "LAYOUT_PARAMETERS",
    "LAYOUT_PEFT",
    "LAYOUT_SHARED_OUTER",
    "MAX_RANK",
    "METADATA_KEY",
    "ORIENTATION",
    "AdapterConfig",
    "ends",
    "load_json_object",
]

METADATA_KEY = "mint.adapter"
"""The one key under ``__metadata__`` that holds the configuration. One key only: the safetensors library writes several
in random order, and equal adapters would get different digests."""

LAYOUT_PEFT = "peft-1"
"""Tensors as PEFT saves them; each expert has its own."""

LAYOUT_PARAMETERS = "peft-parameters-1"
"""Tensors as PEFT saves them with ``target_parameters``: all experts in one flat matrix, gate and up fused."""

LAYOUT_PACKED = "packed-1"
"""Serving layout: one tensor for all experts of a module, one rank, one scaling. A side that all experts share may
have a first dimension of 1."""

LAYOUT_SHARED_OUTER = "shared-outer-1"
"""As packed, where all experts share A of gate and up, and B of down: SGLang's ``experts_shared_outer_loras``."""

ORIENTATION = "A[r,in] B[out,r]"
"""How the last two dimensions are meant: delta W = scaling * B @ A."""

MAX_RANK = 512
"""Largest rank believed."""

_DTYPES = ("bfloat16", "float16", "float32")
_LAYOUTS = (LAYOUT_PEFT, LAYOUT_PARAMETERS, LAYOUT_PACKED, LAYOUT_SHARED_OUTER)
# What PEFT, on a model with routed experts, takes for the experts' even where a dense module is meant.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_JSON_BYTES = 1024 * 1024
_MAX_PATTERNS = 50_000

_T = TypeVar("_T")


def _refuse(key: str, value: object, expected: str) -> InvalidArgument:
    return InvalidArgument(f"adapter configuration: {key} is {str(value)[:100]!r}, expected {expected}", field=key)


def ends(module: str) -> Iterator[str]:
    """A dotted name and all its ends: ``a.b.c``, ``b.c``, ``c``."""
    while True:
        yield module
        _, dot, module = module.partition(".")
        if not dot:
            return


def load_json_object(text: str, *, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most 1 MiB, without NaN or a key twice; :class:`InvalidArgument` names ``what``."""

    def no_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("an object has a key twice")
        return found

    if len(text) > _MAX_JSON_BYTES:
        raise InvalidArgument(f"{what} has {len(text)} characters, allowed are {_MAX_JSON_BYTES}", field=what)
    try:
        value = json.loads(text, parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is not JSON: {str(error)[:200]}", field=what) from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is a JSON {type(value).__name__}, expected an object", field=what)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What turns A and B into a change of the base's weights, and which base that is.

    LoRA after Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling after Kalajdzievski 2023 (arXiv 2312.03732).
    Every value is checked when the object is made: :class:`InvalidArgument` names the field.
    """

    rank: int
    """Rank r of A [r, in] and B [out, r] where no pattern says otherwise; 1 to 512."""
    alpha: float
    """Numerator of the scaling where no pattern says otherwise."""
    target_modules: tuple[str, ...]
    """Last names of the adapted modules (``q_proj``), sorted."""
    base_model: str
    """Id of the base model in the catalog."""
    base_digest: str
    """Digest of the base model's folder."""
    dtype: str
    """Element type of all tensors: ``float32``, ``float16`` or ``bfloat16``."""
    use_rslora: bool = False
    """Scaling is alpha / sqrt(r) instead of alpha / r."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules that differ, by the end of the module's dotted name; the longest matching key counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of modules that differ, likewise."""
    layout: str = LAYOUT_PEFT
    """Layout version of the tensors beside this configuration."""
    orientation: str = ORIENTATION
    """Meaning of the last two dimensions; only one is known."""

    def __post_init__(self) -> None:
        def check(key: str, good: bool, expected: str) -> None:
            if not good:
                raise _refuse(key, getattr(self, key), expected)

        check("rank", _is_rank(self.rank), f"a whole number from 1 to {MAX_RANK}")
        check("alpha", _is_alpha(self.alpha), "a finite number other than 0")
        check("use_rslora", type(self.use_rslora) is bool, "true or false")
        check("dtype", self.dtype in _DTYPES, f"one of {', '.join(_DTYPES)}")
        check("layout", self.layout in _LAYOUTS, f"one of {', '.join(_LAYOUTS)}")
        check("orientation", self.orientation == ORIENTATION, repr(ORIENTATION))
        check("base_model", isinstance(self.base_model, str) and 0 < len(self.base_model) <= 200, "an id")
        check_digest(str(self.base_digest), field="base_digest")
        for key in self.target_modules:
            check("target_modules", isinstance(key, str) and bool(_MODULE.fullmatch(key)), "names of modules")
        check("target_modules", 0 < len(self.target_modules) <= 1000, "1 to 1000 names of modules")
        for name, is_good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
            pattern = getattr(self, name)
            check(name, isinstance(pattern, Mapping) and len(pattern) <= _MAX_PATTERNS, "an object")
            for key, value in pattern.items():
                # PEFT would take regular expressions here; tenants' expressions are not run in our services.
                if not isinstance(key, str) or not _MODULE.fullmatch(key):
                    raise _refuse(name, key, "plain module names as keys, not regular expressions")
                if not is_good(value):
                    raise _refuse(f"{name}.{key}", value, "a number as for the whole adapter")
        set_field = object.__setattr__  # the dataclass is frozen; this brings equal configurations to equal values
        set_field(self, "alpha", float(self.alpha))
        set_field(self, "target_modules", tuple(sorted(set(self.target_modules))))
        set_field(self, "rank_pattern", MappingProxyType(dict(sorted(self.rank_pattern.items()))))
        alphas = {key: float(value) for key, value in sorted(self.alpha_pattern.items())}
        set_field(self, "alpha_pattern", MappingProxyType(alphas))

    @property
    def is_uniform(self) -> bool:
        """Whether all modules have the same rank and scaling."""
        return not self.rank_pattern and not self.alpha_pattern

    def rank_of(self, module: str) -> int:
        """Rank of a module, by its dotted name without prefix: ``model.layers.0.self_attn.q_proj``."""
        return _longest_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module, likewise."""
        return _longest_match(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """Factor of B @ A for a module."""
        return self.alpha_of(module) / self.divisor(self.rank_of(module))

    def divisor(self, rank: int) -> float:
        """What alpha is divided by to give the scaling of a module of this rank."""
        return math.sqrt(rank) if self.use_rslora else rank

    @property
    def scaling(self) -> float:
        """Factor of B @ A where no pattern says otherwise."""
        return self.alpha / self.divisor(self.rank)

    def check_targets(self, modules: Iterable[str]) -> None:
        """Raise :class:`InvalidArgument` unless every module is targeted, and every target is the end of a module."""
        targets, used = set(self.target_modules), set[str]()
        for module in modules:
            matching = targets.intersection(ends(module))
            if not matching:
                raise InvalidArgument(
                    f"module {module} is adapted but is none of target_modules {list(self.target_modules)[:50]}",
                    field="target_modules",
                )
            used |= matching
        if unused := targets - used:
            raise InvalidArgument(
                f"target_modules names {sorted(unused)[:50]}, but no tensor belongs to them", field="target_modules"
            )

    def with_layout(self, layout: str) -> Self:
        """The same adapter in another layout."""
        return replace(self, layout=layout)

    def to_json(self) -> str:
        """The canonical JSON: equal configurations give equal text."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["rank_pattern"] = dict(self.rank_pattern)
        values["alpha_pattern"] = dict(self.alpha_pattern)
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote; every field must be there and no other."""
        values = load_json_object(text, what=METADATA_KEY)
        known = {each.name for each in fields(cls)}
        if values.keys() != known:
            missing, unknown = sorted(known - values.keys()), sorted(values.keys() - known)
            raise InvalidArgument(
                f"{METADATA_KEY} lacks {missing} and has the unknown {unknown}: another version of MinT wrote it",
                field=METADATA_KEY,
            )
        if not isinstance(values["target_modules"], list):
            raise _refuse("target_modules", values["target_modules"], "an array")
        return cls(**(values | {"target_modules": tuple(values["target_modules"])}))

    def to_metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of a file in this configuration."""
        return {METADATA_KEY: self.to_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, file_name: str) -> Self:
        """The configuration in a file's ``__metadata__``; :class:`InvalidArgument` if there is none."""
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise InvalidArgument(
                f"{file_name} has no {METADATA_KEY!r} metadata: it was not written by MinT; import it with its "
                "adapter_config.json",
                field=METADATA_KEY,
            )
        return cls.from_json(text)

    def to_peft_config(self) -> dict[str, object]:
        """The content of ``adapter_config.json`` as PEFT reads it."""
        values = self._peft(self.rank, self.alpha, self.use_rslora) | {
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }
        if self.layout == LAYOUT_PARAMETERS:
            values |= self._peft_targets()
        return values

    def _peft_targets(self) -> dict[str, object]:
        # On models with routed experts PEFT 0.21 moves every target module called gate_proj, up_proj or down_proj to
        # the experts. A dense module of that name is kept by naming its weight as a parameter; its tensors are the
        # same.
        modules, parameters = [], []
        for target in self.target_modules:
            block, _, leaf = target.rpartition(".")
            if block == "experts" or block.endswith(".experts"):
                parameters.append(target)
            elif leaf in _TAKEN_FOR_EXPERTS:
                parameters.append(f"{target}.weight")
            else:
                modules.append(target)
        return {"target_modules": modules, "target_parameters": parameters}

    def to_serving_config(self) -> dict[str, object]:
        """The content of ``adapter_config.json`` for an engine that knows ``lora_alpha / r`` and nothing else.

        SGLang ignores ``use_rslora`` and both patterns without a word, so the effective scaling is put into
        ``lora_alpha``. Raises :class:`InvalidArgument` for an adapter with patterns: pack it first.
        """
        if not self.is_uniform:
            raise InvalidArgument(
                "the adapter has a rank_pattern or alpha_pattern, which engines ignore: pack it before serving it",
                field="rank_pattern",
            )
        return self._peft(self.rank, self.scaling * self.rank, use_rslora=False)

    def _peft(self, rank: int, alpha: float, use_rslora: bool) -> dict[str, object]:
        return {
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": list(self.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": use_rslora,
        }


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value != 0  # type: ignore[arg-type]


def _longest_match(pattern: Mapping[str, _T], module: str, default: _T) -> _T:
    if not pattern:
        return default
    return next((pattern[key] for key in ends(module) if key in pattern), default)
