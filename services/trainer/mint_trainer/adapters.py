"""Several LoRA policies on one resident base; switching between them moves a name and copies nothing.

The layers are PEFT's. Its model-wide ``add_adapter`` and ``set_adapter`` visit every adapter of every layer (30 ms for
a switch among 17 policies on a 135M base, growing with their number); here both cost the same for the hundredth
policy as for the first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import mint_trainer.torchvision_ops  # noqa: F401  # before PEFT

# isort: split
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from mint_core.errors import InvalidArgument
from mint_trainer.base import ResidentBase
from mint_trainer.recipe import AdapterRecipe

__all__ = ["PolicyAdapter", "ResidentAdapters"]

_NAME_PREFIX = "base_model.model."  # how PEFT names tensors in adapter_model.safetensors
_NOBODY = ""


class _PolicyLinear(LoraLinear):
    """PEFT's LoRA layer around one frozen linear module, with a switch that does not touch other adapters."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # PEFT would also freeze every adapter that is not active; here all stay trainable, active or not.
        del inference_mode
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names


class PolicyAdapter:
    """The trainable weights of one policy: float32 parameters by PEFT name, in sorted order."""

    def __init__(
        self, key: str, recipe: AdapterRecipe, parameters: dict[str, nn.Parameter], dropouts: list[nn.Module]
    ) -> None:
        self.key = key
        self.recipe = recipe
        self.parameters = dict(sorted(parameters.items()))
        """``base_model.model.….lora_A.weight`` ``[rank, in]`` and ``….lora_B.weight`` ``[out, rank]``."""
        self._dropouts = dropouts

    def initialise(self) -> None:
        """Set A to Kaiming-uniform values (a = sqrt 5, as PEFT does) and B to zero.

        Every module draws from its own generator, seeded by the recipe's seed and the module's name, so that the
        values depend neither on the order of modules nor on which other modules carry an adapter.
        """
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                if name.endswith(".lora_B.weight"):
                    parameter.zero_()
                    continue
                digest = hashlib.sha256(f"{self.recipe.init_seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    @contextmanager
    def dropout_on(self) -> Iterator[None]:
        """Apply this adapter's dropout inside the block; the base itself stays in eval mode."""
        for module in self._dropouts:
            module.train()
        try:
            yield
        finally:
            for module in self._dropouts:
                module.eval()


class ResidentAdapters:
    """All adapters on one base. Not thread-safe: everything happens on the torch thread."""

    def __init__(self, base: ResidentBase) -> None:
        self._base = base
        self._names_by_target = _linears_by_target(base.model)
        self._layers: dict[str, _PolicyLinear] = {}
        self._active = _NOBODY
        self._num_added = 0

    @property
    def targets(self) -> tuple[str, ...]:
        """Every name that a recipe's ``target_modules`` may have, sorted."""
        return tuple(sorted(self._names_by_target))

    def add(self, recipe: AdapterRecipe) -> PolicyAdapter:
        """Add an adapter with the initial weights of ``recipe``; :class:`InvalidArgument` for unknown targets."""
        for target in recipe.target_modules:
            if target not in self._names_by_target:
                raise InvalidArgument(
                    f"lora.target_modules has {target!r}, which is no adaptable linear module of "
                    f"{self._base.architecture}; those are {', '.join(sorted(self._names_by_target))}",
                    field="session.lora.target_modules",
                )
        key = f"p{self._num_added}"
        self._num_added += 1
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # PEFT only divides it: any real number is right
            use_rslora=recipe.use_rslora,
            lora_dropout=recipe.dropout,
            init_lora_weights=False,
        )
        parameters: dict[str, nn.Parameter] = {}
        dropouts: list[nn.Module] = []
        for target in recipe.target_modules:
            for name in self._names_by_target[target]:
                layer = self._layer(name, key, config)
                pair = (("lora_A", layer.lora_A[key]), ("lora_B", layer.lora_B[key]))
                for part, module in pair:
                    module.to(torch.float32)  # PEFT made it in the base's dtype
                    module.requires_grad_(True)
                    parameters[f"{_NAME_PREFIX}{name}.{part}.weight"] = module.weight
                dropouts.append(layer.lora_dropout[key].eval())
        adapter = PolicyAdapter(key, recipe, parameters, dropouts)
        adapter.initialise()
        return adapter

    def remove(self, adapter: PolicyAdapter) -> None:
        """Free the adapter's weights."""
        self._switch(_NOBODY)
        for layer in self._layers.values():
            layer.delete_adapter(adapter.key)

    def activate(self, adapter: PolicyAdapter | None) -> None:
        """Let the base compute with ``adapter``, or alone."""
        self._switch(_NOBODY if adapter is None else adapter.key)

    def _switch(self, key: str) -> None:
        if key != self._active:
            for layer in self._layers.values():
                layer.set_adapter(key)
            self._active = key

    def _layer(self, name: str, key: str, config: LoraConfig) -> _PolicyLinear:
        layer = self._layers.get(name)
        if layer is None:
            linear = self._base.model.get_submodule(name)
            layer = _PolicyLinear(linear, key, config=config, r=config.r, lora_alpha=config.lora_alpha)
            layer.eval()
            parent, _, attribute = name.rpartition(".")
            setattr(self._base.model.get_submodule(parent), attribute, layer)
            self._layers[name] = layer
        else:
            layer.update_layer(key, config.r, lora_alpha=config.lora_alpha, config=config)
        layer.set_adapter(self._active)
        return layer


def _linears_by_target(model: nn.Module) -> dict[str, list[str]]:
    # The output embedding is left out: with tied weights it is also the input embedding, and engines serve
    # adapters on the layers' own projections only.
    head = model.get_output_embeddings()
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            names.setdefault(name.rpartition(".")[2], []).append(name)
    return names
