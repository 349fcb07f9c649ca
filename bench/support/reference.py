"""What adapters must answer, by transformers in float32: the base, and in each row of a batch one adapter's update.

Nothing of an engine is involved. The update is added to the output of each module, x·Aᵀ·Bᵀ·scaling; :meth:`check` shows
that this is the same as weights with B·A·scaling added to them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.support.random_adapters import Floats, RandomAdapters

__all__ = ["Expected", "Reference"]


@dataclass(frozen=True, slots=True)
class Expected:
    """Of each row and each token of its completion; natural logarithms."""

    logprobs: Floats
    """Of the token that is there, ``[n, k]``."""
    best_logprobs: Floats
    """Of the most probable token, ``[n, k]``."""
    best_tokens: np.ndarray[Any, Any]
    """The most probable token, ``[n, k]``."""


class Reference:
    """The base with a row of adapters."""

    def __init__(self, base: Path, adapters: RandomAdapters) -> None:
        from transformers import AutoModelForCausalLM

        self._adapters = adapters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()
        self._updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in adapters.modules:
            self._model.get_submodule(module).register_forward_hook(functools.partial(self._add, module))

    def of(self, numbers: Sequence[int], prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Expected:
        """What the adapters ``numbers`` make of the prompt, each followed by its own completion."""
        matrices = self._adapters.matrices(numbers)
        self._updates = {
            module: (torch.from_numpy(first), torch.from_numpy(second)) for module, (first, second) in matrices.items()
        }
        try:
            return self._expected(prompt, completions)
        finally:
            self._updates = {}

    def exact(self, number: int, prompt: Sequence[int], completion: Sequence[int]) -> Expected:
        """One row of :meth:`of`, computed in float64 but for the rotary angles, which are float32 everywhere.

        There are random adapters on which a relative change of 1e-6 in the embeddings moves a log-probability by 7e-3:
        where engine and float32 disagree, this says who is right.
        """
        model, updates = self._model, self._adapters.matrices([number])
        self._updates = {
            module: (torch.from_numpy(first).double(), torch.from_numpy(second).double())
            for module, (first, second) in updates.items()
        }
        model.double()
        try:
            # transformers names float32 in norms and softmax, whatever the model's type.
            with mock.patch.object(torch, "float32", torch.float64):
                return self._expected(prompt, [completion])
        finally:
            self._updates = {}
            # What was float32 is float32 again, bit for bit.
            model.float()

    def of_base(self, prompt: Sequence[int], completion: Sequence[int]) -> Expected:
        """What the base makes of it."""
        return self._expected(prompt, [completion])

    def check(self, numbers: Sequence[int], prompt: Sequence[int]) -> float:
        """Largest difference of log-probabilities between rows of updates and weights that were merged."""
        completions = [prompt] * len(numbers)
        together = self.of(numbers, prompt, completions)
        found = 0.0
        for row, number in enumerate(numbers):
            weights = {module: self._model.get_submodule(module).weight for module in self._adapters.modules}
            before = {module: weight.detach().clone() for module, weight in weights.items()}
            with torch.no_grad():
                for module, (first, second) in self._adapters.matrices([number]).items():
                    delta = torch.from_numpy(second[0]).double() @ torch.from_numpy(first[0]).double()
                    weights[module] += (self._adapters.scaling * delta).float()
                merged = self._expected(prompt, [prompt])
                for module, weight in weights.items():
                    weight.copy_(before[module])
            found = max(found, float(np.abs(merged.logprobs[0] - together.logprobs[row]).max()))
        return found

    def _expected(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Expected:
        ids = torch.tensor([[*prompt, *completion] for completion in completions])
        with torch.inference_mode():
            # A large vocabulary at every token of a batch would take more memory than all the rest.
            logits = self._model(ids, logits_to_keep=ids.shape[1] - len(prompt) + 1).logits[:, :-1]
            logprobs = torch.log_softmax(logits, -1)
            best = logprobs.max(-1)
            picked = logprobs.gather(-1, ids[:, len(prompt) :, None])[..., 0]
        return Expected(picked.numpy(), best.values.numpy(), best.indices.numpy())

    def _add(self, module: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        update = self._updates.get(module)
        if update is None:
            return None
        first, second = update
        return output + self._adapters.scaling * (inputs[0] @ first.mT @ second.mT)
