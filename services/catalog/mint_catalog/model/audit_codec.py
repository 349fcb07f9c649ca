"""Stored form of an audit entry: a protobuf message behind one byte that tells whether it is compressed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from mint_api.runtime.v1 import audit_entry_pb2 as pb
from mint_catalog.model.audit_records import AuditChange, AuditChangeType, AuditEntry
from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import KeyValue

__all__ = ["AuditCodec", "pack"]

_PLAIN: Final = b"\0"
_ZLIB: Final = b"\1"
_COMPRESSED_ABOVE: Final = 256
_LEVEL: Final = 1  # the changes of one transaction repeat each other; more effort than the least finds little more
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def pack(
    prefix: bytes, changes: Sequence[AuditChange], *, principal: str, method: str, request_id: str, reason: str
) -> bytes:
    """The value of an entry's key; ``prefix`` is what all keys begin with."""
    entry = pb.StoredAuditEntry(principal=principal, method=method, request_id=request_id, reason=reason)
    for change in changes:
        entry.changes.add(
            key=change.key[len(prefix) :].decode(),
            type=int(change.type),
            before=change.before or b"",
            after=change.after or b"",
        )
    value: bytes = entry.SerializeToString()
    if len(value) <= _COMPRESSED_ABOVE:
        return _PLAIN + value
    return _ZLIB + zlib.compress(value, _LEVEL)


class AuditCodec:
    """Reads entries."""

    def __init__(self, keys: Keys, needle: bytes = b"") -> None:
        """An entry that holds these bytes nowhere is read without its changes: a search drops it anyway."""
        self._keys = keys
        self._needle = needle

    def encode(self, record: AuditEntry) -> bytes:
        """The value of the entry's key."""
        return pack(
            self._keys.prefix,
            record.changes,
            principal=record.principal,
            method=record.method,
            request_id=record.request_id,
            reason=record.reason,
        )

    def decode(self, kv: KeyValue) -> AuditEntry:
        """The entry under one key of the family ``audit``."""
        name = self._keys.audit_entry_name(kv.key)
        body = zlib.decompress(kv.value[1:]) if kv.value[:1] == _ZLIB else kv.value[1:]
        stored = pb.StoredAuditEntry.FromString(body)
        changes = stored.changes if self._needle in body else ()
        return AuditEntry(
            name=name,
            time=_EPOCH + timedelta(microseconds=int(name.audit_entry.partition("-")[0])),
            catalog_revision=kv.create_revision,
            principal=stored.principal,
            method=stored.method,
            request_id=stored.request_id,
            reason=stored.reason,
            changes=tuple(
                AuditChange(
                    self._keys.prefix + change.key.encode(),
                    AuditChangeType(change.type),
                    change.before or None,
                    change.after or None,
                )
                for change in changes
            ),
        )
