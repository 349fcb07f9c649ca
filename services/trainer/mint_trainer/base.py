"""The resident base model: loaded once from a local Hugging Face folder, frozen, never copied.

Everything that a policy computes goes through two of its parts: ``trunk`` (token ids to hidden states) and ``head``
(hidden states to logits). They are kept apart so that logits are made only for the positions that need them, a chunk
at a time; :meth:`ResidentBase.load` proves on the loaded model that the two together are the whole model, and finds out
whether it computes shared rows (:mod:`mint_trainer.rows`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mint_trainer.torchvision_ops  # noqa: F401  # before transformers

# isort: split
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mint_core.base_model import digest_of_folder
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_trainer.batch import BatchLimits, Datum, MicroBatch, micro_batches
from mint_trainer.choices import Attention, Dtype
from mint_trainer.rows import MAX_SHARED_ROW_TOKENS

__all__ = ["ResidentBase"]

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PROBE_LENGTH = 4

_PROBE_PREFIX_LENGTH, _PROBE_BRANCH_LENGTHS = 12, (9, 12, 5)

_SHARED_ROW_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Norm of the difference that rounding may make in the probe's hidden states, relative to their norm."""

_WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "window_size")
"""Config fields, over all families, by which a token sees only so many before it."""


@dataclass(frozen=True, eq=False)
class ResidentBase:
    """A frozen causal language model and what identifies it."""

    model: nn.Module
    """The whole model, in eval mode, no parameter requiring gradients."""
    model_id: str
    """Its id in the catalog."""
    digest: str
    """``sha256:…`` over the manifest of the folder's files."""
    dtype: Dtype
    """Compute type of the base; adapters are float32 whatever this is."""
    attention: Attention
    """Attention implementation."""
    vocab_size: int
    """Rows of the embedding: token ids are in ``[0, vocab_size)``."""
    max_context_tokens: int
    """Positions the model was made for."""
    architecture: str
    """First of ``architectures`` in config.json."""
    shares_prefixes: bool
    """Whether it honours what shared rows need: any mask, and any positions."""

    @classmethod
    def load(
        cls, folder: Path, *, model_id: str, dtype: Dtype = "float32", attention: Attention = "sdpa"
    ) -> ResidentBase:
        """Load ``folder`` (config.json and safetensors weights) and freeze it.

        Raises :class:`InvalidArgument` when the folder is not a loadable model folder and :class:`FailedPrecondition`
        when the architecture does more between hidden states and logits than its output embedding.
        """
        if not (folder / "config.json").is_file():
            raise InvalidArgument(
                f"base_model_path is {str(folder)!r}: no config.json there; give a local Hugging Face model folder",
                field="base_model_path",
            )
        transformers_logging.disable_progress_bar()  # the log is JSON lines
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=_TORCH_DTYPES[dtype],
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,  # anything else on disk would be a pickle
            )
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise InvalidArgument(
                f"base_model_path is {str(folder)!r}: transformers cannot load it ({error})", field="base_model_path"
            ) from error
        model.eval()
        model.requires_grad_(False)
        base = cls(
            model=model,
            model_id=model_id,
            digest=digest_of_folder(folder).digest,
            dtype=dtype,
            attention=attention,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_context_tokens=int(getattr(config, "max_position_embeddings", 0)) or 1 << 20,
            architecture=(config.architectures or [type(model).__name__])[0],
            shares_prefixes=False,
        )
        base._prove_head(folder)
        return replace(base, shares_prefixes=base._computes_shared_rows())

    def trunk(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the final norm: ``[batch, length, hidden]``, for ids and mask ``[batch, length]``.

        With a mask of bool ``[batch, 1, length, length]`` a token sees what that says, and is at its position in
        ``position_ids`` ``[batch, length]``; that takes a base that ``shares_prefixes``.
        """
        more = {} if position_ids is None else {"position_ids": position_ids}
        if attention_mask.ndim == 4:
            # Added to the attention scores. A finite number, and small enough that its exponential is exactly 0.
            zeros = torch.zeros(attention_mask.shape, dtype=_TORCH_DTYPES[self.dtype])
            attention_mask = zeros.masked_fill_(~attention_mask, torch.finfo(zeros.dtype).min)
        outputs = self.model.base_model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False, **more)
        hidden: torch.Tensor = outputs.last_hidden_state
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, vocab]`` in the base's dtype for hidden states ``[n, hidden]``."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def _prove_head(self, folder: Path) -> None:
        # Some families scale or cap their logits after the output embedding; training without that would be silently
        # wrong, and asking the model itself covers families that do not exist yet.
        token_ids = torch.arange(_PROBE_LENGTH).remainder(self.vocab_size).unsqueeze(0)
        mask = torch.ones_like(token_ids)
        whole = self.model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
        parts = self.head(self.trunk(token_ids, mask))
        if whole.shape != parts.shape or not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
            raise FailedPrecondition(
                f"{self.architecture} in {str(folder)!r} changes its logits after the output embedding "
                "(scaling or soft-capping); the trainer does not support this architecture"
            )

    @torch.no_grad()
    def _computes_shared_rows(self) -> bool:
        # Windows longer than any shared row never come to bear in one; a shorter one would be lifted by our mask, and
        # the probe is too short to tell.
        config = self.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in _WINDOW_NAMES]
        if any(isinstance(window, int) and window < MAX_SHARED_ROW_TOKENS for window in windows):
            return False
        try:
            apart, (shared,) = (list(_probe(self.vocab_size, share_prefixes)) for share_prefixes in (False, True))
            expected = torch.cat([self._hidden(batch) for batch in apart])
            assert shared.position_ids is not None
            differences = [
                float((self._hidden(batch) - expected).norm() / expected.norm())
                for batch in (
                    shared,
                    # What a base computes that ignores the mask, or the positions: were that as near, the probe
                    # would prove nothing.
                    replace(shared, attention_mask=torch.ones_like(shared.attention_mask).tril()),
                    replace(shared, position_ids=torch.arange(shared.token_ids.shape[1]).expand_as(shared.token_ids)),
                )
            ]
        except Exception:  # noqa: BLE001 - families refuse in every way there is; all of them mean no
            return False
        return differences[0] <= min(_SHARED_ROW_TOLERANCES[self.dtype], *(each / 4 for each in differences[1:]))

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        hidden = self.trunk(batch.token_ids, batch.attention_mask, batch.position_ids)
        return hidden.flatten(0, 1).index_select(0, batch.places).float()


def _probe(vocab_size: int, share_prefixes: bool) -> Iterator[MicroBatch]:
    """Data that share a prefix, and a shorter one that does not, in as many micro-batches as there are rows or one."""
    ids = [[1] * 6]
    for first, length in zip((17, 29, 43), _PROBE_BRANCH_LENGTHS, strict=True):
        ids.append([*range(_PROBE_PREFIX_LENGTH), *range(first, first + length)])
    data = [Datum([i % vocab_size for i in each], [0] * len(each), [0.0] * len(each)) for each in ids]
    return micro_batches(data, BatchLimits(vocab_size, 0, 0, 1024 if share_prefixes else 1, share_prefixes))
