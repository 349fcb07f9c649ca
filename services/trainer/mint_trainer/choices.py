"""What the settings may choose from; apart from torch, so that settings can be read without loading it."""

from __future__ import annotations

from typing import Literal

__all__ = ["Attention", "Dtype"]

Dtype = Literal["float32", "bfloat16"]
"""Compute type of a base."""

Attention = Literal["sdpa", "eager"]
"""Attention implementation of transformers; both are deterministic on CPU."""
