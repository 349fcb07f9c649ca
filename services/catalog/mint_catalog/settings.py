"""What can be set about a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mint_core.config import ServiceSettings

__all__ = ["CatalogSettings", "EtcdSettings"]


class EtcdSettings(BaseModel):
    """Where etcd is and how to talk to it."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)

    endpoints: list[str] = Field(default=["127.0.0.1:2379"], min_length=1)
    """host:port of every member."""

    prefix: str = Field(default="/mint/v1/", pattern=r"^/[a-zA-Z0-9._/-]*/$")
    """All keys of this installation begin with it."""

    call_timeout_s: float = Field(default=5.0, gt=0)
    """Deadline of one call to etcd."""

    ca_file: Path | None = None
    """Certificate authority (PEM) that signed the members' certificates; none means plain text."""

    cert_file: Path | None = None
    """Client certificate (PEM)."""

    key_file: Path | None = None
    """Key of the client certificate (PEM)."""

    server_name: str | None = None
    """Name to expect in the members' certificates instead of the endpoint's."""


class CatalogSettings(ServiceSettings):
    """Settings of the catalog process, section ``catalog``."""

    section: ClassVar[str] = "catalog"

    etcd: EtcdSettings = EtcdSettings()
    """Where etcd is."""

    tick_interval_s: float = Field(default=1.0, gt=0)
    """One catalog writes the tick key this often; a watcher's bookmarks follow it."""

    watch_queue_events: int = Field(default=10_000, ge=100)
    """A watcher further behind than this reads on from etcd's history instead of from memory."""

    reap_interval_s: float = Field(default=2.0, gt=0)
    """Claims whose lease ended are looked for this often, besides at each lease's end."""

    max_run_attempts: int = Field(default=5, ge=1)
    """Times a run is claimed before a retriable failure or a lost lease fails it."""

    keep_history_s: float = Field(default=3600.0, ge=60)
    """History younger than this is never compacted: page tokens and watches can start there."""
