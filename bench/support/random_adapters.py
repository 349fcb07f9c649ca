"""As many distinct adapters of one base as are wanted, each a pure function of a seed and its number.

All have one shape, so a packed blob is one header and, after it, the adapter's own numbers. The header is the one that
``mint_lora.pack`` writes, and the first blob is compared with its, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mint_core.base_model import digest_of_folder
from mint_lora import AdapterConfig, pack, read_header, write_safetensors
from mint_lora.header import TensorInfo
from support.serving_adapters import adapter_shapes

__all__ = ["MODULES", "RandomAdapters"]

MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""The linear modules of a layer."""
_PREFIX = "base_model.model."
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor's place among an adapter's numbers."""

    start: int
    stop: int
    shape: tuple[int, ...]


class RandomAdapters:
    """float32 adapters on linear modules of a dense base, A and B normal with the same deviation."""

    def __init__(
        self,
        base: Path,
        work: Path,
        *,
        rank: int,
        deviation: float,
        seed: int,
        modules: Sequence[str] = MODULES,
    ) -> None:
        """``work`` is a folder for two files; ``modules`` are adapted in each layer. The scaling is 2, which is no
        neutral element of anything."""
        self.rank = rank
        self.scaling = 2.0
        self._deviation = np.float32(deviation)
        self._seed = seed
        config = AdapterConfig(
            rank=rank,
            alpha=self.scaling * rank,
            target_modules=tuple(modules),
            base_model=base.name,
            base_digest=digest_of_folder(base, use_cache=False).digest,
            dtype="float32",
        )
        shapes: dict[str, tuple[int, int]] = {}
        for module, (in_features, out_features) in adapter_shapes(base, tuple(modules)).items():
            shapes[f"{_PREFIX}{module}.lora_A.weight"] = (rank, in_features)
            shapes[f"{_PREFIX}{module}.lora_B.weight"] = (out_features, rank)
        self.num_tensors = len(shapes)
        self._num_values = sum(rows * columns for rows, columns in shapes.values())
        self._places = self._lay_out(work, shapes, config)
        self.modules = [
            name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in self._places if ".lora_A." in name
        ]

    @property
    def size_bytes(self) -> int:
        """Of one blob."""
        return len(self._header) + 4 * self._num_values

    def blob(self, number: int) -> bytes:
        """The packed blob of an adapter."""
        return self._header + self._values(number).tobytes()

    def matrices(self, numbers: Sequence[int]) -> dict[str, tuple[Floats, Floats]]:
        """A ``[n, r, in]`` and B ``[n, out, r]`` of some adapters by the base's module."""
        values = np.stack([self._values(number) for number in numbers])
        found = {}
        for module in self.modules:
            first, second = (self._places[f"{_PREFIX}{module}.lora_{side}.weight"] for side in "AB")
            found[module] = (_cut(values, first), _cut(values, second))
        return found

    def _values(self, number: int) -> Floats:
        random = np.random.default_rng((self._seed, number))
        return random.standard_normal(self._num_values, dtype=np.float32) * self._deviation

    def _lay_out(self, work: Path, shapes: Mapping[str, tuple[int, int]], config: AdapterConfig) -> dict[str, _Place]:
        """Have one adapter packed for its header and the order of its tensors."""
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        infos = self._packed(work, zeros, config)
        places = {info.name: _place(info, len(self._header)) for info in infos}
        values = self._values(0)
        own = {name: values[each.start : each.stop].reshape(each.shape) for name, each in places.items()}
        self._packed(work, own, config)
        if self.blob(0) != (work / "packed.safetensors").read_bytes():
            raise RuntimeError("mint_lora packs this adapter into other bytes than the benchmark makes")
        return places

    def _packed(self, work: Path, tensors: Mapping[str, Floats], config: AdapterConfig) -> Sequence[TensorInfo]:
        source, target = work / "source.safetensors", work / "packed.safetensors"
        target.unlink(missing_ok=True)
        write_safetensors(source, tensors, config.to_metadata())
        manifest = pack(source, target).manifest
        self._header = target.read_bytes()[: min(info.begin for info in read_header(target).tensors.values())]
        return manifest


def _place(info: TensorInfo, header_bytes: int) -> _Place:
    return _Place((info.begin - header_bytes) // 4, (info.end - header_bytes) // 4, info.shape)


def _cut(values: Floats, place: _Place) -> Floats:
    return values[:, place.start : place.stop].reshape(len(values), *place.shape)
