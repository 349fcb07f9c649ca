"""Request ids: a write with one is applied at most once, however often and through however many catalogs it comes.

The id's key is written in the transaction of the write itself, which compares that no key of it exists; so there is
no moment between "done" and "remembered". The key holds a hash of the payload and the stored answer. Keys lie in
buckets of one day, so that expired ids go by deleting ranges; the buckets before and after the present one are looked
up too, for ids that cross midnight and for catalogs whose clocks differ by up to a day. An id is remembered for at
least one day.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import KeyValue
from mint_core.clock import wall_s
from mint_core.errors import InvalidArgument, RequestIdReused

__all__ = ["Request", "StoredAnswer", "bucket_at"]

_BUCKET_S: Final = 86_400
_HEADER: Final = struct.Struct(">B32sQHB")
_VERSION: Final = 1


def bucket_at(time_s: float) -> int:
    """The bucket of ids that are written at a time, in seconds since the epoch."""
    return int(time_s // _BUCKET_S)


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What a request id was answered with."""

    kv: KeyValue | None
    """The record as it was stored, None where the answer carries none."""

    catalog_revision: int
    """Revision of the write."""


@dataclass(frozen=True, slots=True)
class Request:
    """Identity of one call that must apply at most once."""

    tenant: str
    principal: str
    method: str
    request_id: str
    payload: bytes
    """SHA-256 of the request without its id."""

    @classmethod
    def of(cls, *, tenant: str, principal: str, method: str, request_id: str, payload: bytes) -> Request | None:
        """The identity of a call, or None for a call without an id. ``payload`` is the serialized request."""
        if not request_id:
            return None
        try:
            parsed = uuid.UUID(request_id)
        except ValueError:
            parsed = None
        if parsed is None or parsed.version != 4 or str(parsed) != request_id.lower():
            raise InvalidArgument(
                f"request_id is {request_id[:60]!r}: expected a UUID4, a new one for each new request",
                field="request_id",
            )
        return cls(tenant, principal, method, str(parsed), hashlib.sha256(payload).digest())

    def keys(self, keys: Keys) -> list[bytes]:
        """The key to write, and the others that the id may lie under."""
        identity = "\0".join((self.principal, self.method, self.request_id))
        name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        bucket = bucket_at(wall_s())
        return [keys.request(bucket + offset, self.tenant, name) for offset in (0, -1, 1)]

    def encode(self, key: bytes, value: bytes | None, mod_revision: int) -> bytes:
        """The value under the id's key; ``mod_revision`` is 0 when the record is written by this transaction."""
        header = _HEADER.pack(_VERSION, self.payload, mod_revision, len(key), value is not None)
        return header + key + (value or b"")

    def decode(self, kv: KeyValue) -> StoredAnswer:
        """The stored answer; raises :class:`RequestIdReused` when it belongs to another payload."""
        _, payload, mod_revision, key_length, has_value = _HEADER.unpack_from(kv.value)
        if payload != self.payload:
            raise RequestIdReused(
                f"request_id {self.request_id} was used for another {self.method}; choose a new one",
                metadata={"request_id": self.request_id},
            )
        key = kv.value[_HEADER.size : _HEADER.size + key_length]
        value = kv.value[_HEADER.size + key_length :]
        revision = mod_revision or kv.create_revision
        record = KeyValue(key, value, revision, revision) if has_value else None
        return StoredAnswer(record, kv.create_revision)
