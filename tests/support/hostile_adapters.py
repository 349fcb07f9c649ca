"""Files that want to hurt whoever opens them, and a process with little memory that opens them all.

Run as a program: ``hostile_adapters.py FOLDER HEADROOM_BYTES`` tries every file and folder in FOLDER, with no more
address space than it has and HEADROOM_BYTES, and writes one JSON line: how each was refused, in how many seconds.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mint_core.errors import MintError
from mint_lora import METADATA_KEY, AdapterConfig, pack, read_peft_folder, validate_adapter

__all__ = ["HOSTILE", "write_hostile"]

_PREFIX = "base_model.model.model.layers.0."
_Q = f"{_PREFIX}self_attn.q_proj"
_MAX_SIZE_BYTES = 1 << 30
_BASE_DIGEST = "sha256:" + "ba5e" * 16
_CONFIG = AdapterConfig(
    rank=4, alpha=8.0, target_modules=("q_proj",), base_model="tiny", base_digest=_BASE_DIGEST, dtype="float32"
)


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _good(**changes: object) -> dict[str, Any]:
    metadata = {METADATA_KEY: json.dumps(json.loads(_CONFIG.to_json()) | changes)}
    return {
        "__metadata__": metadata,
        f"{_Q}.lora_A.weight": _tensor(0, 64, [4, 4]),
        f"{_Q}.lora_B.weight": _tensor(64, 128, [4, 4]),
    }


def _file(header: object, data: bytes = bytes(128), size_bytes: int | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        if size_bytes is not None:
            os.truncate(path, 8 + len(text) + size_bytes)

    return write


def _announcing(num_bytes: int, size_bytes: int = 1 << 10) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", num_bytes) + b"{")
        os.truncate(path, size_bytes)

    return write


def _metadata(text: str) -> Callable[[Path], None]:
    return _file(_good() | {"__metadata__": {METADATA_KEY: text}})


def _folder(changes: dict[str, object], tensors: dict[str, Any] | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        header = tensors or {key: each for key, each in _good().items() if key != "__metadata__"}
        size_bytes = max(each["data_offsets"][1] for each in header.values())
        _file(header, bytes(size_bytes))(path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(_CONFIG.to_peft_config() | changes))

    return write


def _pairs(names: list[str], size_a: list[int], size_b: list[int]) -> dict[str, Any]:
    """Modules whose tensors lie one after the other."""
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        for side, shape in (("A", size_a), ("B", size_b)):
            end = at + 4 * shape[0] * shape[1]
            header[f"{name}.lora_{side}.weight"] = _tensor(at, end, shape)
            at = end
    return header


_GREEDY_NAMES = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2000)]

HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    # lengths
    "length-negative": (_announcing((1 << 64) - 1), "announce a header"),
    "length-2^63": (_announcing(1 << 63), "announce a header"),
    "length-past-end": (_announcing(1 << 20), "announce a header"),
    "length-4gib-in-a-hole": (_announcing(4 << 30, 8 << 30), "allowed are"),
    "length-zero": (_announcing(0), "announce a header"),
    # JSON that grows
    "deep": (_file(b'{"a":' + b"[" * 4_000_000), "brackets"),
    "deep-and-closed": (_file(b'{"a":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}"), "brackets"),
    "million-lists": (_file(b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"), "brackets"),
    "million-objects": (_file(b'{"a":[' + b"{}," * 8_000_000 + b"{}]}"), "brackets"),
    "million-numbers": (_file(b'{"a":[' + b"1," * 12_000_000 + b"1]}"), "brackets"),
    "million-strings": (_file(b'{"a":[' + b'"",' * 8_000_000 + b'""]}'), "brackets"),
    "million-keys": (_file(b"{" + b",".join(b'"%d":1' % n for n in range(2_000_000)) + b"}"), "brackets"),
    "marks-behind-quotes": (
        _file(b'{"\\"":"' + b'\\"' * 2_000_000 + b'","a":[' + b"1," * 2_000_000 + b"1]}"),
        "brackets",
    ),
    "too-many-tensors": (
        _file(b"{" + b",".join(b'"%d":{"data_offsets":0}' % n for n in range(260_000)) + b"}"),
        "allowed",
    ),
    "long-number": (
        _file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}'),
        "not JSON",
    ),
    "long-name": (_file(_good() | {"a" * 1_000_000: _tensor(0, 0, [0])}), "longer than"),
    "lone-surrogate": (_file(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""), "unprintable"),
    "nan-for-a-header": (_file(b'{"a":NaN}'), "not JSON"),
    # keys twice
    "tensor-twice": (_file(json.dumps(_good()).encode()[:-1] + f',"{_Q}.lora_A.weight":1}}'.encode()), "twice"),
    "dtype-twice": (_file(b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}'), "twice"),
    "rank-twice": (_metadata('{"rank":4,' + _CONFIG.to_json()[1:]), "twice"),
    # ranges and shapes
    "negative-offsets": (_file({"a": _tensor(-4, 0, [1])}), "two counts"),
    "reversed-offsets": (_file({"a": _tensor(128, 0, [32])}), "bytes"),
    "offsets-2^64": (_file({"a": _tensor(0, 1 << 64, [1 << 62])}), "counts"),
    "float-offsets": (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4e0]}}), "counts"),
    "overflowing-product": (_file({"a": _tensor(0, 128, [1 << 62, 1 << 62, 1 << 62, 4])}), "needs"),
    "product-that-wraps-to-fit": (_file({"a": _tensor(0, 128, [1 << 32, 1 << 30, 1])}), "needs"),
    "terabytes-claimed": (_file(_good() | {f"{_Q}.lora_A.weight": _tensor(0, 1 << 40, [4, 1 << 36])}), "expected"),
    "overlap": (_file(_good() | {f"{_Q}.lora_B.weight": _tensor(0, 64, [4, 4])}), "overlaps"),
    "hole": (_file(_good() | {f"{_Q}.lora_B.weight": _tensor(128, 192, [4, 4])}, bytes(192)), "leaves a gap"),
    "missing-bytes": (_file(_good(), bytes(127)), "cut off"),
    "bytes-behind": (_file(_good(), bytes(129)), "after its last"),
    "nine-dimensions": (_file({"a": _tensor(0, 4, [1] * 9)}), "at most 8"),
    "zero-times-huge": (
        _file(_good() | {f"{_Q}.lora_A.weight": _tensor(0, 0, [0, 1 << 62]), "b": _tensor(0, 64, [16])}),
        "no LoRA",
    ),
    "terabyte-in-a-hole": (_file(_good() | _pairs([_Q], [4, 1 << 35], [4, 4]), b"", (1 << 41) + 64), "allowed are"),
    # names
    "path-for-a-name": (
        _file({"__metadata__": _good()["__metadata__"], "../../etc/passwd": _tensor(0, 128, [32])}),
        "no LoRA",
    ),
    "expert-a-billion": (
        _file(_good() | _pairs([f"{_PREFIX}mlp.experts.999999.up_proj"], [4, 2], [2, 4]), bytes(64)),
        "overlaps",
    ),
    "one-expert-of-a-million": (
        _file(
            {"__metadata__": _good(target_modules=["up_proj"])["__metadata__"]}
            | _pairs([f"{_PREFIX}mlp.experts.999999.up_proj"], [4, 2], [2, 4]),
            bytes(64),
        ),
        "lacks 999999 of 1000000",
    ),
    # configuration
    "metadata-no-json": (_metadata("{"), "not JSON"),
    "metadata-deep": (_metadata("[" * 900_000), "not JSON"),
    "metadata-long": (_metadata('"' + "a" * 4_000_000 + '"'), "allowed are"),
    "rank-a-billion": (_file(_good(rank=10**9)), "rank"),
    "rank-nan": (_metadata(_CONFIG.to_json().replace('"alpha":8.0', '"alpha":NaN')), "not JSON"),
    "rank-pattern-for-one": (
        _file(
            {"__metadata__": _good(rank=1, rank_pattern={"layers.0.self_attn.q_proj": 512})["__metadata__"]}
            | _pairs(_GREEDY_NAMES, [1, 600], [600, 1]),
            bytes(2000 * 4800),
        ),
        "has rank 1",
    ),
    "foreign-base": (_file(_good(base_digest="sha256:" + "0" * 64)), "adapter for base"),
    "unknown-field": (_file(_good(code="import os")), "unknown"),
    # folders
    "regular-expression": (_folder({"rank_pattern": {"(a+)+$": 8}}), "not regular expressions"),
    "patterns-and-modules": (
        _folder(
            {"rank_pattern": {f"x{n}.q_proj": 2 for n in range(40_000)} | {"q_proj": 0}},
            _pairs(_GREEDY_NAMES, [4, 1], [1, 4]),
        ),
        "rank_pattern.model.layers",
    ),
    "patterns-as-list": (_folder({"alpha_pattern": [1]}), "an object"),
    "names-as-object": (_folder({"target_parameters": {"a": 1}}), "an array of names"),
    "config-too-long": (_folder({"x": "a" * 2_000_000}), "allowed are"),
    # numbers
    "nan": (_file(_good(), struct.pack("<32f", *[1.0] * 31, float("nan"))), "infinity or NaN"),
    "infinity": (_file(_good(), struct.pack("<32f", float("-inf"), *[1.0] * 31)), "infinity or NaN"),
}
"""By file name: how it is written, and what the refusal says."""


def write_hostile(folder: Path) -> None:
    """Write them all into ``folder``."""
    for name, (write, _) in HOSTILE.items():
        write(folder / name)


def _open(path: Path, target: Path) -> None:
    if path.is_dir():
        weights, config = read_peft_folder(path, base_model="tiny", base_digest=_BASE_DIGEST)
        pack(weights, target, config, max_size_bytes=_MAX_SIZE_BYTES)
        return
    validate_adapter(path, expected_base_digest=_BASE_DIGEST, max_size_bytes=_MAX_SIZE_BYTES)
    pack(path, target, max_size_bytes=_MAX_SIZE_BYTES)


def _main(folder: Path, headroom_bytes: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom_bytes,) * 2)
    found: dict[str, dict[str, object]] = {}
    for path in sorted(folder.iterdir()):
        start = time.perf_counter()
        said = "accepted"
        try:
            _open(path, folder.parent / "target")
        except MintError as error:
            said = str(error)
        except MemoryError:
            said = "MemoryError"
        found[path.name] = {"said": said[:300], "seconds": time.perf_counter() - start}
    sys.stdout.write(json.dumps({"found": found, "is_written": (folder.parent / "target").exists()}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
