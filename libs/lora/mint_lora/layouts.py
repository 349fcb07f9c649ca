"""The layouts adapters come in, and how each becomes the packed one and back.

The packed layout is the pivot: a codec knows its own layout and this one, so that N layouts need N codecs. A codec is
right when delta W of every module and expert is the same before and after, which the tests ask with random A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mint_core.errors import InvalidArgument
from mint_lora.layout_packed import PackedLayout, SharedOuterLayout
from mint_lora.layout_parameters import ParametersLayout
from mint_lora.layout_peft import PeftLayout
from mint_lora.pivot import Layout, LoraName, PackedTensor, Pivot, Unpacked, parse_lora_name

__all__ = [
    "LAYOUTS",
    "Layout",
    "LoraName",
    "PackedTensor",
    "Pivot",
    "Unpacked",
    "layout_named",
    "parse_lora_name",
]

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {each.name: each for each in (PeftLayout(), ParametersLayout(), PackedLayout(), SharedOuterLayout())}
)
"""Every codec by its layout's name."""


def layout_named(name: str) -> Layout:
    """The codec of a layout, or :class:`InvalidArgument` naming those there are."""
    if name not in LAYOUTS:
        raise InvalidArgument(f"layout is {name[:80]!r}, known are {', '.join(sorted(LAYOUTS))}", field="layout")
    return LAYOUTS[name]
