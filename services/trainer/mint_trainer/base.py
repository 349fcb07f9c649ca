"""The resident base model: loaded once from a local Hugging Face folder, frozen, never copied.

Everything that a policy computes goes through two of its parts: ``trunk`` (token ids to hidden states) and ``head``
(hidden states to logits). They are kept apart so that logits are made only for the positions that need them, a chunk
at a time; :meth:`ResidentBase.load` proves on the loaded model that the two together are the whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mint_trainer.torchvision_ops  # noqa: F401  # before transformers

# isort: split
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mint_core.base_model import digest_of_folder
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_trainer.choices import Attention, Dtype

__all__ = ["ResidentBase"]

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PROBE_LENGTH = 4


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
        )
        base._prove_head(folder)
        return base

    def trunk(self, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm: ``[batch, length, hidden]`` for ids and mask ``[batch, length]``."""
        outputs = self.model.base_model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False)
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
