"""What can be set about an engine."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mint_core.config import ServiceSettings
from mint_engine.sglang_settings import SglangSettings

__all__ = ["EngineSettings"]


class EngineSettings(ServiceSettings):
    """Settings of the engine process, section ``engine``."""

    section: ClassVar[str] = "engine"

    base_model: str = "baseModels/default"
    """Name of the base model in the catalog; its registered digest must be the folder's."""

    base_model_path: Path
    """Local Hugging Face folder of the base model: config.json, safetensors weights, tokenizer."""

    adapter_dir: Path
    """Folder below which the loader of this node puts adapters, each in a folder of its own (its ``cache_dir``)."""

    verify_adapters: bool = True
    """Hash an adapter's weights once more before loading them, and refuse bytes that are not the digest asked for."""

    engine_replica: str = "engineReplicas/default"
    """Name this replica registers under."""

    catalog_address: str = ""
    """host:port or unix:PATH of the catalog's public endpoint; empty runs the engine unregistered."""

    catalog_runtime_address: str = ""
    """Address of the catalog's endpoint for MinT's own services; needed together with ``catalog_address``."""

    catalog_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start for a catalog that is not there yet."""

    advertise_address: str = ""
    """Address others reach ``runtime_listen`` by; empty takes ``runtime_listen`` itself, which then needs a fixed
    port."""

    loader_address: str = ""
    """Runtime address of the loader on this node, told to whoever looks for a replica."""

    lease_ttl_s: float = Field(default=10.0, ge=2, le=3600)
    """A replica that stops renewing is gone after this."""

    max_generate_s: float = Field(default=600.0, gt=0)
    """Longest stream of a caller that brings no deadline."""

    num_threads: int = Field(default=1, ge=1)
    """Threads inside one torch kernel on a machine without a GPU."""

    sglang: SglangSettings = SglangSettings()
    """The embedded engine."""
