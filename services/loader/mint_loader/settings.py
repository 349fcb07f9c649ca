"""What the loader can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mint_blobs import ObjectStoreSettings
from mint_core.config import ServiceSettings

__all__ = ["LoaderSettings"]


class LoaderSettings(ServiceSettings):
    """Settings of ``mint-loader``, table ``[loader]``."""

    section: ClassVar[str] = "loader"

    engine_address: str
    """Runtime address of the engine on this node."""
    cache_dir: Path
    """Folder of the disk cache; the engine reads adapters from the same folder (its ``adapter_dir``)."""
    object_store: ObjectStoreSettings = ObjectStoreSettings()
    """The store that adapters come from."""
    catalog_address: str = ""
    """Public address of the catalog, for prefetching where aliases move; empty turns prefetching off."""
    max_cache_bytes: int = Field(default=20 * 1024**3, gt=0)
    """Bytes the disk cache may hold."""
    max_fetches: int = Field(default=4, gt=0)
    """Adapters read from the object store at one time."""
    max_loads: int = Field(default=2, gt=0)
    """Adapters brought into the engine at one time."""
    max_queued: int = Field(default=4096, gt=0)
    """Adapters that may wait for a fetch, and as many for a load; more are refused."""
    max_open_tickets: int = Field(default=1024, gt=0)
    """Unfinished load tickets; more are refused."""
    ensure_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait of a caller that brings no deadline."""
    fetch_timeout_s: float = Field(default=300.0, gt=0)
    """Longest fetch from the object store, with the wait for room on the disk."""
    load_timeout_s: float = Field(default=60.0, gt=0)
    """Longest load into the engine."""
    ticket_timeout_s: float = Field(default=600.0, gt=0)
    """Longest life of a load ticket."""
    prefetch_recent_s: float = Field(default=3600.0, gt=0)
    """An alias is followed if its policy was served on this node within this time."""
    wish_poll_s: float = Field(default=1.0, gt=0)
    """Pause between two looks at what the engine is asked to hold because a promotion waits for it."""
