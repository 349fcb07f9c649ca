"""Decides whether a folder may be shown to the engine.

SGLang's own loader reads pickled files when it finds them, leaves out modules it does not know, takes a missing
``up_proj`` for zeros and finds shape errors only in the middle of serving. So it never sees a folder that was not
checked here: two regular files and nothing else, the configuration exactly the one the weights imply, every module
shaped as the base has it, nothing that SGLang would drop or read differently than it was trained.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from mint_core.errors import DigestMismatch, InvalidArgument, NotFound
from mint_engine.base_geometry import BaseGeometry
from mint_lora.config import LAYOUT_PACKED, AdapterConfig, load_json_object
from mint_lora.folders import CONFIG_NAME, WEIGHTS_NAME
from mint_lora.validation import ModuleInfo, validate_adapter

__all__ = ["AdapterFolder", "AdapterRules", "check_adapter_folder"]

_MAX_CONFIG_BYTES = 1 << 20
_JOINED_MODULES = (
    # SGLang joins these into one projection and looks for the second whenever it finds the first.
    (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"q_proj", "v_proj"})),
    (frozenset({"gate_proj", "up_proj"}), frozenset({"gate_proj"})),
    (frozenset({"q_a_proj", "kv_a_proj_with_mqa"}), frozenset({"q_a_proj", "kv_a_proj_with_mqa"})),
)
_EXPERT_MODULES = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, slots=True)
class AdapterRules:
    """What this engine accepts."""

    base_digest: str
    geometry: BaseGeometry
    max_lora_rank: int
    target_modules: frozenset[str]
    spreads_shared_experts: bool = False
    """Whether a matrix that all experts share may be stored once: then the engine copies it to each of them."""
    verify_digest: bool = True
    """Hash the weights and compare with the digest they are asked for by."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder that passed."""

    path: Path
    rank: int
    num_tensors: int
    size_bytes: int


def check_adapter_folder(path: Path, digest: str, rules: AdapterRules) -> AdapterFolder:
    """Check everything that can be known before the engine reads the adapter; blocks while it reads.

    Raises :class:`NotFound` without the folder, :class:`DigestMismatch` when the bytes are not ``digest``,
    :class:`BaseModelMismatch` when it was made for another base, :class:`ResourceExhausted` when its rank is too high,
    and
    :class:`InvalidArgument` for everything else, naming the first thing found wrong.
    """
    _check_listing(path)
    weights = path / WEIGHTS_NAME
    info = validate_adapter(
        weights,
        expected_base_digest=rules.base_digest,
        max_rank=rules.max_lora_rank,
        layout=LAYOUT_PACKED,
        # Finite when it was packed, and the digest says that these are the packed bytes.
        check_finite=False,
    )
    _check_config(path, info.config)
    for module in info.modules:
        _check_module(path, module, rules)
    _check_joined(path, info.modules, rules.geometry)
    if rules.verify_digest:
        _check_digest(weights, digest)
    return AdapterFolder(path, info.config.rank, info.num_tensors, info.size_bytes)


def _wrong(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument(f"the adapter in {path.name} cannot be loaded: {what}", field="folder")


def _check_listing(path: Path) -> None:
    """Exactly our two files, none of them a link: SGLang falls back to pickled files wherever it sees one."""
    try:
        names = {entry.name: entry.lstat().st_mode for entry in path.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"there is no adapter folder {path.name} below {path.parent}; let the loader write it first",
            metadata={"folder": path.name},
        ) from None
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise _wrong(path, "it is a link and not a folder")
    expected = {CONFIG_NAME, WEIGHTS_NAME}
    if missing := expected - names.keys():
        raise _wrong(path, f"{', '.join(sorted(missing))} is missing")
    if foreign := names.keys() - expected:
        raise _wrong(path, f"it also holds {', '.join(sorted(foreign)[:5])}; only {CONFIG_NAME} and {WEIGHTS_NAME} may")
    for name, mode in names.items():
        if not stat.S_ISREG(mode):
            raise _wrong(path, f"{name} is not a regular file")


def _check_config(path: Path, config: AdapterConfig) -> None:
    """``adapter_config.json`` must be the one generated from the weights' own configuration, value for value.

    SGLang believes this file about rank, scaling and targets, and ignores options that would change the result.
    """
    if not config.is_uniform:
        raise _wrong(path, "its modules differ in rank or scaling, which the engine ignores; pack it first")
    file = path / CONFIG_NAME
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise _wrong(path, f"{CONFIG_NAME} is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        found = load_json_object(file.read_text(encoding="utf-8"), what=CONFIG_NAME)
    except UnicodeDecodeError:
        raise _wrong(path, f"{CONFIG_NAME} is not UTF-8") from None
    expected = config.to_serving_config()
    for key in sorted(expected.keys() | found.keys()):
        if key not in found or key not in expected or found[key] != expected[key]:
            there, wanted = found.get(key, "absent"), expected.get(key, "absent")
            raise _wrong(path, f"{CONFIG_NAME} has {key} {there!r}, the weights need {wanted!r}; write it anew")


def _check_module(path: Path, module: ModuleInfo, rules: AdapterRules) -> None:
    block, _, leaf = module.name.rpartition(".")
    if leaf not in rules.target_modules:
        raise _wrong(path, f"it changes {module.name}; this engine has slots for {sorted(rules.target_modules)}")
    if (experts := rules.geometry.experts.get(block)) is not None:
        shape = experts.get(leaf)
        if shape is None:
            raise _wrong(path, f"the base's {block} has no {leaf}")
        expected: tuple[int | None, int, int] = (shape.num_experts, shape.out_features, shape.in_features)
    else:
        linear = rules.geometry.linears.get(module.name)
        if linear is None:
            raise _wrong(path, f"the base has no linear module {module.name}")
        expected = (None, *linear)
    found = (module.num_experts, module.out_features, module.in_features)
    if found != expected:
        raise _wrong(
            path,
            f"{module.name} has (num_experts, out_features, in_features) {found}, the base has {expected}",
        )
    if (module.is_a_shared or module.is_b_shared) and not rules.spreads_shared_experts:
        raise _wrong(
            path, f"the experts of {module.name} share a matrix, which this engine cannot take; give each its own"
        )


def _check_joined(path: Path, modules: tuple[ModuleInfo, ...], geometry: BaseGeometry) -> None:
    """Reject what SGLang would drop without a word or could not join."""
    leaves: dict[str, set[str]] = {}
    for module in modules:
        block, _, leaf = module.name.rpartition(".")
        leaves.setdefault(block, set()).add(leaf)
    for block, found in leaves.items():
        if block in geometry.experts:
            if missing := sorted(_EXPERT_MODULES - found):
                raise _wrong(
                    path, f"{block} lacks {missing}; expert LoRA needs gate, up and down together (zeros will do)"
                )
            continue
        for joined, needed in _JOINED_MODULES:
            if found & joined and (missing := sorted(needed - found)):
                raise _wrong(path, f"{block} has {sorted(found & joined)} and lacks {missing} (zeros will do)")


def _check_digest(weights: Path, digest: str) -> None:
    with weights.open("rb") as stream:
        found = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    if found != digest:
        raise DigestMismatch(
            f"{WEIGHTS_NAME} in {weights.parent.name} has digest {found}, asked for was {digest}; fetch it again",
            field="digest",
            metadata={"expected": digest, "found": found},
        )
