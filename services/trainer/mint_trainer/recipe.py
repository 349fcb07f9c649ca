"""What a policy's adapter is made from: the part of a policy that training needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mint_core.errors import InvalidArgument

__all__ = ["AdapterRecipe"]

MAX_RANK = 512
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """Hyper-parameters of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685).

    Together with the base model it determines the initial weights bit for bit.
    """

    rank: int
    """r of A ``[r, in]`` and B ``[out, r]``."""
    alpha: float
    """Numerator of the scaling."""
    target_modules: tuple[str, ...]
    """Last name components of the linear modules that carry an adapter, sorted, without doubles."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732) instead of ``alpha / rank``."""
    dropout: float = 0.0
    """Dropout on the adapter's input during forward_backward."""
    init_seed: int = 0
    """Seed of A's initial values; B starts at zero."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise InvalidArgument(f"lora.rank is {self.rank}: must be 1 to {MAX_RANK}", field="session.lora.rank")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidArgument(
                f"lora.alpha is {self.alpha}: must be a positive finite number", field="session.lora.alpha"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidArgument(
                f"lora.dropout is {self.dropout}: must be at least 0 and below 1", field="session.lora.dropout"
            )
        if not 0 <= self.init_seed <= MAX_SEED:
            raise InvalidArgument(
                f"lora.init_seed is {self.init_seed}: must be 0 to 2**64 - 1", field="session.lora.init_seed"
            )
        if not self.target_modules:
            raise InvalidArgument(
                "lora.target_modules is empty: name at least one linear module, e.g. 'q_proj'",
                field="session.lora.target_modules",
            )
        object.__setattr__(self, "target_modules", tuple(sorted(set(self.target_modules))))

    @property
    def scaling(self) -> float:
        """Factor on ``B A``."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
