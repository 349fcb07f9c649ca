"""What can be set about a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mint_blobs import ObjectStoreSettings
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

    object_store: ObjectStoreSettings | None = None
    """Where blobs, rollouts and states lie: the catalog deletes and lists there, and never reads bytes. None: garbage
    is not collected."""

    defragment_interval_s: float = Field(default=86_400.0, gt=0)
    """At most one etcd member is defragmented this often. It answers nobody meanwhile, some seconds for each GiB."""

    defragment_min_free_bytes: int = Field(default=1 << 30, ge=0)
    """A member is defragmented when this much of its file, and half of it, is not in use."""

    gc_interval_s: float = Field(default=6 * 3600.0, gt=0)
    """Garbage is collected this often, over all catalogs and restarts."""

    gc_grace_s: float = Field(default=30 * 86_400.0, ge=0)
    """Blobs, unfinished uploads and objects that nothing refers to are kept this long. It must be longer than the
    oldest backup that may be restored is old, or its blobs are gone."""

    gc_condemned_s: float = Field(default=3600.0, ge=0)
    """A condemned blob is deleted after this time: whoever resolved it before has fetched it by then."""

    undelete_grace_s: float = Field(default=30 * 86_400.0, ge=0)
    """A deleted policy can be undeleted this long; after that its records are removed."""

    erasure_settle_s: float = Field(default=5.0, ge=0)
    """Before a tenant's erasure looks for the last time, uploads that were under way get this long to end."""

    tick_interval_s: float = Field(default=1.0, gt=0)
    """One catalog writes the tick key this often; a watcher's bookmarks follow it."""

    watch_queue_events: int = Field(default=10_000, ge=100)
    """A watcher further behind than this reads on from etcd's history instead of from memory."""

    cache_entries: int = Field(default=100_000, ge=0)
    """Aliases that Resolve answers from memory, about 1.5 KiB each; 0 keeps none."""

    cache_staleness_s: float = Field(default=5.0, gt=0)
    """What Resolve answers from memory, or from one member of etcd alone, is no older than this."""

    recent_records: int = Field(default=50_000, ge=0)
    """Records read, written or heard of lately, about 0.6 KiB each, that moves of aliases are first decided on instead
    of a read; 0 keeps none."""

    reap_interval_s: float = Field(default=2.0, gt=0)
    """Claims whose lease ended are looked for this often, besides at each lease's end."""

    max_run_attempts: int = Field(default=5, ge=1)
    """Retriable failures and lost leases after which a run has failed for good."""

    run_retry_backoff_s: float = Field(default=1.0, ge=0)
    """Pause after a run's first failure before it is claimed again; it doubles with each further one."""

    run_retry_backoff_max_s: float = Field(default=300.0, ge=0)
    """Longest pause between two attempts."""

    audit_keep_s: float = Field(default=90 * 86_400.0, ge=86_400)
    """Audit entries are kept this long, and a day more."""

    usage_keep_s: float = Field(default=400 * 86_400.0, ge=86_400)
    """Usage counts of a day are kept this long after it, and a day more."""

    keep_history_s: float = Field(default=3600.0, ge=60)
    """History younger than this is never compacted: page tokens and watches can start there."""
