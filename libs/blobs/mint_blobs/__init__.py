"""The object store client: whole, immutable, SHA-256 checked objects in any S3, and an in-memory twin for tests.

========================  ==========================================================
:mod:`mint_blobs.objects`   the contract every store keeps (:class:`ObjectStore`)
:mod:`mint_blobs.s3`        the store over S3
:mod:`mint_blobs.memory`    its twin in memory
:mod:`mint_blobs.keys`      where things lie
:mod:`mint_blobs.digests`   SHA-256 of bytes and files
:mod:`mint_blobs.settings`  how a service is told about its store
========================  ==========================================================
"""

from __future__ import annotations

from mint_blobs.digests import digest_bytes, digest_file
from mint_blobs.keys import StateKeys, blob_key, blob_prefix, rollout_key, rollout_prefix, state_keys
from mint_blobs.objects import ObjectInfo, ObjectStore, PartUpload
from mint_blobs.settings import ObjectStoreSettings

__all__ = [
    "ObjectInfo",
    "ObjectStore",
    "ObjectStoreSettings",
    "PartUpload",
    "StateKeys",
    "blob_key",
    "blob_prefix",
    "digest_bytes",
    "digest_file",
    "rollout_key",
    "rollout_prefix",
    "state_keys",
]
