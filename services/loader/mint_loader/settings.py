"""What the loader can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

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
    eviction: Literal["gdsf", "lfu", "lru"] = "gdsf"
    """What leaves a full disk cache first: what saves the least fetching time for its size (gdsf), what is used least
    often (lfu) or what was used longest ago (lru)."""
    verify_again_s: float = Field(default=86400.0, gt=0)
    """What lies on the disk is verified again at its first use after this time, in case the disk has lost bits."""
    max_fetches: int = Field(default=4, gt=0)
    """Adapters read from the object store at one time."""
    max_loads: int = Field(default=2, gt=0)
    """Adapters brought into the engine at one time."""
    slow_fetch_s: float = Field(default=5.0, gt=0)
    """A fetch that takes longer lends its place to the next one."""
    max_queued: int = Field(default=4096, gt=0)
    """Adapters that may wait for a fetch, and as many for a load; more are refused."""
    max_queued_per_tenant: int = Field(default=2048, gt=0)
    """As many of them may be one tenant's."""
    max_waiting: int = Field(default=16_384, gt=0)
    """Callers that may wait at one time; more are refused."""
    tenant_weights: dict[str, float] = Field(default_factory=dict)
    """Share of a tenant (its id) where several wait for loads of one priority; 1 for those not named."""
    burst: float = Field(default=4.0, ge=0)
    """Small adapters that a tenant which asked for little lately may have loaded ahead of others' queues."""
    max_open_tickets: int = Field(default=4096, gt=0)
    """Unfinished load tickets; more are refused."""
    max_open_tickets_per_tenant: int = Field(default=1024, gt=0)
    """As many of them may be one tenant's."""
    ensure_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait of a caller that brings no deadline."""
    fetch_timeout_s: float = Field(default=300.0, gt=0)
    """Longest fetch from the object store, with the wait for room on the disk."""
    load_timeout_s: float = Field(default=60.0, gt=0)
    """Longest load into the engine."""
    ticket_timeout_s: float = Field(default=600.0, gt=0)
    """Longest life of a load ticket."""
    trusted_keys: Path | None = None
    """TOML file of the public keys that tenants' adapters must be signed with; none demands no signatures."""
    pins_path: Path | None = None
    """File of this node's pins; by default ``.pins.json`` in ``cache_dir``."""
    max_pins: int = Field(default=1000, gt=0)
    """Pins of this node; more are refused."""
    max_pinned_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the disk cache that pins may keep."""
    pin_lead_s: float = Field(default=300.0, ge=0)
    """How long before its start a scheduled pin's adapters are brought to the disk."""
    pin_poll_s: float = Field(default=2.0, gt=0)
    """Pause between two looks whether pins are held."""
    prefetch_recent_s: float = Field(default=3600.0, gt=0)
    """A policy's alias moves and publications are followed if it was served on this node within this time."""
    wish_poll_s: float = Field(default=1.0, gt=0)
    """Pause between two looks at what the engine is asked to hold because a promotion waits for it."""

    @field_validator("tenant_weights")
    @classmethod
    def _weights_are_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for tenant, weight in weights.items():
            if not (0.001 <= weight <= 1000):
                raise ValueError(f"the weight of {tenant!r} is {weight}: expected 0.001 to 1000")
        return weights
