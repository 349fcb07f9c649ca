"""What adapters must answer, from torch and PEFT alone: the judge of what an engine said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["ExpectedLogprobs"]


class ExpectedLogprobs:
    """Log-probabilities of a base in float32 under any of several adapters."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        """``adapters``: PEFT folders by digest."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._names = {digest: f"adapter{number}" for number, digest in enumerate(adapters)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
            first, *others = adapters
            self._model = PeftModel.from_pretrained(model, adapters[first], adapter_name=self._names[first])
            for digest in others:
                self._model.load_adapter(adapters[digest], adapter_name=self._names[digest])
        self._model.eval()

    def of(self, digest: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Natural logarithm of each completion token's probability given all before it."""
        self._model.set_adapter(self._names[digest])
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = self._model(ids).logits[0, len(prompt) - 1 : -1]
        picked = torch.tensor(completion)[:, None]
        return [float(value) for value in torch.log_softmax(logits, -1).gather(1, picked)[:, 0]]
