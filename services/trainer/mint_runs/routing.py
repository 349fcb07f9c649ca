"""Whether the base routes tokens to experts."""

from __future__ import annotations

import json
from pathlib import Path

from mint_core.errors import FailedPrecondition

__all__ = ["routed_top_k"]


def routed_top_k(base_model_path: Path) -> int:
    """Experts that each layer of the base chooses for a token, by its ``config.json``; 0 if it routes nothing."""
    path = base_model_path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # Models that see and hear keep their language model's figures apart.
        top_k = config.get("text_config", config).get("num_experts_per_tok")
        return int(top_k or 0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}; name a complete Hugging Face folder") from error
