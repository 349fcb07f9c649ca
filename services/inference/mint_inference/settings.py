"""What inference can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mint_core.config import ServiceSettings

__all__ = ["InferenceSettings"]


class InferenceSettings(ServiceSettings):
    """Settings of ``mint-inference``, table ``[inference]``."""

    section: ClassVar[str] = "inference"

    catalog_address: str
    """Public address of the catalog."""
    catalog_runtime_address: str = ""
    """Address of the catalog's endpoint for MinT's own services, which takes usage; empty: usage is not counted."""
    usage_report_s: float = Field(default=10.0, gt=0)
    """Pause between two reports of usage."""
    max_streams: int = Field(default=1024, gt=0)
    """Requests under way at one time; more are refused."""
    staleness_s: float = Field(default=5.0, gt=0)
    """Age of the alias watch's last word from which the catalog is asked instead of the cache."""
    serve_stale_for_s: float = Field(default=600.0, ge=0)
    """How long the last known meaning of an alias serves, marked stale, while the catalog is away."""
    resolve_timeout_s: float = Field(default=3.0, gt=0)
    """Longest wait for one answer of the catalog."""
    max_cached_names: int = Field(default=100_000, gt=0)
    """Aliases, and revisions, whose meaning is kept in memory."""
    replica_poll_s: float = Field(default=1.0, gt=0)
    """Pause between two looks at the registry of engine replicas."""
    residency_poll_s: float = Field(default=2.0, gt=0)
    """Pause between two questions to each engine replica what it holds and how much it runs."""
    start_timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for an engine to accept a request while another one could be asked instead."""
    gone_silence_s: float = Field(default=5.0, gt=0)
    """Longest silence inside a stream of an engine whose registration has ended; shorter than ``silence_s``."""
    max_copies: int = Field(default=2, ge=0)
    """Hot adapters that are copied to another replica at one time; 0 copies none."""
    generate_timeout_s: float = Field(default=600.0, gt=0)
    """Longest generation of a caller that brings no deadline."""
    silence_s: float = Field(default=60.0, gt=0)
    """Longest silence of an engine inside a stream, after which the replica counts as lost."""
    load_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for an adapter to be loaded."""
    trusted_keys: Path | None = None
    """TOML file of the public keys that tenants' adapters must be signed with, as the loaders have it; none demands no
    signatures."""
    load_priority: int = 10
    """Priority of loads that a client waits for; prefetches have 0."""
    max_loads: int = Field(default=4, gt=0)
    """How often one request has its adapter loaded if others push it out before it is used."""
    place_wait_s: float = Field(default=10.0, ge=0)
    """How long a request waits for a place in an engine whose adapters are all in use."""
