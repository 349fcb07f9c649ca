from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mint_core.errors import InvalidArgument
from mint_lora.config import METADATA_KEY, AdapterConfig
from support.adapters import BASE_DIGEST, config_for

SHAPES = {"model.layers.0.self_attn.q_proj": (4, 4), "model.layers.0.self_attn.v_proj": (4, 4)}


def test_canonical_text_depends_on_values_only() -> None:
    one = config_for(SHAPES, rank_pattern={"b": 2, "a": 3}, alpha=16, target_modules=("v_proj", "q_proj"))
    other = config_for(SHAPES, rank_pattern={"a": 3, "b": 2}, alpha=16.0, target_modules=("q_proj", "v_proj", "q_proj"))
    assert one == other
    assert one.to_json() == other.to_json()
    assert one.to_json() == (
        '{"alpha":16.0,"alpha_pattern":{},"base_digest":"' + BASE_DIGEST + '","base_model":"tiny","dtype":"float32",'
        '"layout":"peft-1","orientation":"A[r,in] B[out,r]","rank":4,"rank_pattern":{"a":3,"b":2},'
        '"target_modules":["q_proj","v_proj"],"use_rslora":false}'
    )
    assert AdapterConfig.from_json(one.to_json()) == one
    assert AdapterConfig.from_metadata(one.to_metadata(), file_name="f") == one


def test_scaling_by_module() -> None:
    config = config_for(
        SHAPES,
        rank=4,
        alpha=8,
        rank_pattern={"q_proj": 16, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 1},
    )
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 16
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.11.self_attn.q_proj") == 16
    assert config.rank_of("model.layers.0.self_attn.my_q_proj") == 4
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 0.5
    assert config.scaling_of("model.layers.0.self_attn.v_proj") == 0.25
    assert config.scaling == 2.0
    assert config_for(SHAPES, rank=16, alpha=8, use_rslora=True).scaling == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", 513),
        ("rank", True),
        ("rank", "4"),
        ("rank", None),
        ("alpha", 0),
        ("alpha", math.inf),
        ("alpha", "8"),
        ("alpha", False),
        ("dtype", "float64"),
        ("layout", "packed-9"),
        ("orientation", "A[in,r] B[r,out]"),
        ("base_model", ""),
        ("base_digest", "sha256:zz"),
        ("target_modules", ()),
        ("target_modules", ("a/b",)),
        ("target_modules", (1,)),
        ("use_rslora", 1),
        ("rank_pattern", {"^q_proj": 2}),
        ("rank_pattern", {"q_proj": 2.0}),
        ("alpha_pattern", {"(a+)+": 2.0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", []),
    ],
)
def test_bad_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        config_for(SHAPES, **{key: value})
    assert caught.value.field.startswith(key)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"rank":NaN}', "[" * 100_000, "1" * 10_000, '"' + "x" * 2_000_000 + '"']
)
def test_bad_json(text: str) -> None:
    with pytest.raises(InvalidArgument, match=METADATA_KEY):
        AdapterConfig.from_json(text)


def test_missing_and_unknown_fields() -> None:
    values = json.loads(config_for(SHAPES).to_json())
    with pytest.raises(InvalidArgument, match="color"):
        AdapterConfig.from_json(json.dumps(values | {"color": 1}))
    with pytest.raises(InvalidArgument, match="target_modules"):
        AdapterConfig.from_json(json.dumps(values | {"target_modules": "q_proj"}))
    del values["dtype"]
    with pytest.raises(InvalidArgument, match="dtype"):
        AdapterConfig.from_json(json.dumps(values))
    with pytest.raises(InvalidArgument, match="not written by MinT"):
        AdapterConfig.from_metadata({"format": "pt"}, file_name="f")


def test_serving_config_holds_the_effective_scaling() -> None:
    config = config_for(SHAPES, rank=16, alpha=8, use_rslora=True)
    assert config.to_peft_config()["lora_alpha"] == 8
    assert config.to_peft_config()["use_rslora"] is True
    serving = config.to_serving_config()
    assert (serving["r"], serving["lora_alpha"], serving["use_rslora"]) == (16, 32, False)
    with pytest.raises(InvalidArgument, match="engines ignore"):
        config_for(SHAPES, rank_pattern={"q_proj": 2}).to_serving_config()
