"""AuditService."""

from __future__ import annotations

from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from mint_api.v1 import audit_service_pb2 as pb
from mint_api.v1 import audit_service_pb2_grpc as pb_grpc
from mint_catalog.model.audit_records import AuditChange, AuditEntry
from mint_catalog.model.codec import from_message
from mint_catalog.model.codecs import HolderCodec, MessageCodecs
from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import KeyValue
from mint_catalog.trail.audit import Audited, audited
from mint_catalog.trail.audit_trail import AuditQuery, AuditTrail

__all__ = ["AuditServicer"]


class AuditServicer(pb_grpc.AuditServiceServicer):
    def __init__(self, trail: AuditTrail, keys: Keys, codecs: MessageCodecs) -> None:
        self._trail = trail
        self._keys = keys
        self._codecs = codecs

    async def ListAuditEntries(self, request: pb.ListAuditEntriesRequest, _context: Any) -> Any:
        page = await self._trail.list(from_message(request, AuditQuery))
        return pb.ListAuditEntriesResponse(
            audit_entries=map(self._entry, page.records),
            next_page_token=page.next_page_token,
            catalog_revision=page.catalog_revision,
        )

    def _entry(self, entry: AuditEntry) -> pb.AuditEntry:
        message = pb.AuditEntry(
            name=str(entry.name),
            catalog_revision=entry.catalog_revision,
            principal=entry.principal,
            method=entry.method,
            request_id=entry.request_id,
            reason=entry.reason,
        )
        message.time.FromDatetime(entry.time)
        for change in entry.changes:
            family = audited(self._keys, change.key)
            if family is not None:
                message.changes.append(self._change(family, change, entry.catalog_revision))
        return message

    def _change(self, family: Audited, change: AuditChange, revision: int) -> pb.AuditChange:
        resource = family.resource(self._keys, change.key)
        message = pb.AuditChange(resource=resource, type=int(change.type))  # type: ignore[arg-type]
        if change.before is not None:  # of which revision it was, the entry does not know
            message.before.CopyFrom(self._any(family, KeyValue(change.key, change.before, 0, 0)))
        if change.after is not None:
            message.after.CopyFrom(self._any(family, KeyValue(change.key, change.after, revision, revision)))
        return message

    def _any(self, family: Audited, kv: KeyValue) -> AnyMessage:
        codec = getattr(self._codecs, family.codec)
        record = codec.decode(kv)
        packed = AnyMessage()
        if isinstance(codec, HolderCodec):
            packed.Pack(codec.to_message(self._keys.lease_resource(kv.key), record), deterministic=True)
        else:
            packed.Pack(codec.to_message(record), deterministic=True)
        return packed
