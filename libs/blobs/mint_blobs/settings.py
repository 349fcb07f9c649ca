"""How a service is told about its object store; services nest this model in their own settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr

__all__ = ["ObjectStoreSettings"]

_MIB = 1 << 20


class ObjectStoreSettings(BaseModel):
    """Address, credentials and limits of one S3 bucket."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint_url: str = ""
    """Where the S3 API answers, as ``http://host:port``; empty means AWS itself."""

    bucket: str = Field(default="mint", min_length=3, max_length=63)
    """The bucket that holds everything; ``ensure_bucket`` creates it where the credentials allow that."""

    region: str = "us-east-1"
    """Region that requests are signed for; servers other than AWS accept any."""

    access_key_id: str = ""
    """Empty means the usual AWS chain: environment, shared files, instance role."""

    secret_access_key: SecretStr = SecretStr("")
    """Secret of ``access_key_id``."""

    path_style: bool = True
    """Bucket in the path rather than in the host name; what self-hosted servers want."""

    connect_timeout_s: float = Field(default=3.0, gt=0)
    """Limit for opening one connection."""

    read_timeout_s: float = Field(default=20.0, gt=0)
    """Limit for one silence of the server."""

    operation_timeout_s: float = Field(default=30.0, gt=0)
    """Limit for one small call (head, delete, one page of a list, a put or get of bytes), with all its attempts."""

    transfer_timeout_s: float = Field(default=900.0, gt=0)
    """Limit for one whole file up or down, with all its attempts."""

    max_attempts: int = Field(default=4, ge=1, le=20)
    """Attempts per request where the failure may pass: connection, timeout, 5xx, throttling."""

    backoff_s: float = Field(default=0.1, gt=0)
    """First pause between attempts; doubles up to 2 s, with jitter."""

    max_concurrency: int = Field(default=12, ge=1, le=256)
    """Requests that carry file bytes at one time, over all transfers of this client; a quarter of them is left to
    transfers that have none yet."""

    part_size_bytes: int = Field(default=8 * _MIB, ge=5 * _MIB)
    """Size of one uploaded part (S3 asks for at least 5 MiB). Memory is bounded by ``max_concurrency`` parts."""

    range_size_bytes: int = Field(default=8 * _MIB, ge=64 * 1024)
    """Size of one ranged read; a file above it is read by several ranges at one time."""
