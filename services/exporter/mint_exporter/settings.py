"""What the exporter can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mint_blobs import ObjectStoreSettings
from mint_core.base_model import cache_folder
from mint_core.config import ServiceSettings

__all__ = ["ExporterSettings"]

_GIB = 1 << 30


class ExporterSettings(ServiceSettings):
    """Settings of ``mint-exporter``, table ``[exporter]``."""

    section: ClassVar[str] = "exporter"

    catalog_address: str
    """host:port or unix:PATH of the catalog's public services."""
    catalog_runtime_address: str
    """host:port or unix:PATH of the catalog's services for our own processes."""
    object_store: ObjectStoreSettings = ObjectStoreSettings()
    """Where training states are read from and blobs go to."""
    scratch_dir: Path = Field(default_factory=lambda: cache_folder() / "exporter")
    """Folder for work in progress; what a killed exporter left there is removed at start."""
    max_scratch_bytes: int = Field(default=32 * _GIB, gt=0)
    """Bytes of work in progress; exports wait for room, uploads are refused."""
    max_adapter_bytes: int = Field(default=4 * _GIB, gt=0)
    """Largest weights object."""
    max_blob_bytes: int = Field(default=8 * _GIB, gt=0)
    """Largest upload, and largest archive that is imported."""
    max_rank: int = Field(default=512, ge=1, le=512)
    """Largest rank that is published."""
    signing_key_file: Path | None = None
    """Private ed25519 key in PEM (``openssl genpkey -algorithm ed25519``); what is published here is signed with it."""
    max_concurrent_exports: int = Field(default=2, ge=1, le=64)
    """Exports worked on at one time; more wait."""
    upload_idle_timeout_s: float = Field(default=3600.0, gt=0)
    """An upload that nobody carries on is given up after this time."""
    catalog_timeout_s: float = Field(default=15.0, gt=0)
    """Deadline of one call to the catalog."""
