"""One servicer for each service: decode, one domain call, encode."""

from __future__ import annotations

__all__: list[str] = []
