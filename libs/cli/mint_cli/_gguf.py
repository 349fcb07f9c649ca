"""Turns a Llama-type GGUF file into a plain Hugging Face folder; run as a process of its own, because it needs torch.

::

    python -m mint_cli._gguf SOURCE.gguf FOLDER

The weights are dequantized and stored as bfloat16 safetensors. The tokenizer is built from the file's own vocabulary
and merges; its pre-tokenizer is the one that the ``smollm`` kind names (every digit by itself, then GPT-2's byte-level
split), which the generic conversion of transformers does not know.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["convert"]

_CONTROL_TOKEN = 3
_PRE_TOKENIZERS = ("smollm",)


def convert(source: Path, folder: Path) -> None:
    """Write configs, weights, tokenizer and chat template of the GGUF file ``source`` into ``folder``."""
    fields = _read_fields(source)
    _write_tokenizer(fields, folder)
    _write_model(source, fields, folder)


def _read_fields(source: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    reader = GGUFReader(source)
    return {name: field.contents() for name, field in reader.fields.items()}


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.pre"]
    if fields["tokenizer.ggml.model"] != "gpt2" or kind not in _PRE_TOKENIZERS:
        raise SystemExit(f"tokenizer.ggml.pre is {kind!r}: this conversion knows {', '.join(_PRE_TOKENIZERS)}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    bos, eos, pad, unknown = (tokens[i] for i in _special_ids(fields))
    config = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "extra_special_tokens": control,
        "model_max_length": int(fields["llama.context_length"]),
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_model(source: Path, fields: dict[str, Any], folder: Path) -> None:
    # transformers imports torchvision wherever one is installed, also one that was built for another torch and
    # fails at import. No image is read here: let it look absent.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    bos, eos, pad, _ = _special_ids(fields)
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = bos, eos, pad
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    config.name_or_path = ""  # the name inside the GGUF file is not a place to load from
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        _drop_version(folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a cache may be shared


def _drop_version(path: Path) -> None:
    """Leave out which transformers wrote the file: the same model keeps its digest over an upgrade."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    _write_json(path, config)


def _special_ids(fields: dict[str, Any]) -> tuple[int, int, int, int]:
    """Ids of the beginning, end, padding and unknown token."""
    names = ("bos", "eos", "padding", "unknown")
    bos, eos, pad, unknown = (int(fields[f"tokenizer.ggml.{name}_token_id"]) for name in names)
    return bos, eos, pad, unknown


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
