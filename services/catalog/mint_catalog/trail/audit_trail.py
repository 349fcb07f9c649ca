"""The audit trail's reading half.

Entries lie newest first. etcd counts the whole range asked for, however small the limit, so a listing walks back
through time in windows that grow while they are empty.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from mint_catalog.model.audit_codec import AuditCodec
from mint_catalog.model.audit_records import AuditEntry
from mint_catalog.model.keys import Keys
from mint_catalog.storage.paging import Page, Stretch, page_of
from mint_catalog.storage.store import Store, prefix_end
from mint_catalog.trail.audit import audited
from mint_core.clock import wall_s
from mint_core.errors import InvalidArgument
from mint_core.names import (
    AliasName,
    EvaluationName,
    FleetOperationName,
    PolicyName,
    ResourceName,
    RevisionName,
    RunName,
    TenantErasureName,
    TenantName,
)

__all__ = ["AuditQuery", "AuditTrail"]

_WINDOW_US: Final = 10_000_000
_WIDEST_US: Final = 400 * 86_400_000_000
_CHUNK: Final = 400
_LEASE: Final = "/lease"
_RESOURCES: Final[tuple[type[ResourceName], ...]] = (
    AliasName,
    EvaluationName,
    FleetOperationName,
    PolicyName,
    RevisionName,
    RunName,
    TenantErasureName,
    TenantName,
)


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Which entries to list."""

    parent: str = ""
    page_size: int = 0
    page_token: str = ""
    resource: str = ""
    """Only entries that change it or something below it."""
    start_time: datetime | None = None
    """Only entries of this time or later."""
    end_time: datetime | None = None
    """Only entries before this time."""


def _microseconds(time: datetime | None) -> int:
    """Since the epoch; 0 for no time."""
    return 0 if time is None else max(1, round(time.timestamp() * 1e6))


class AuditTrail:
    """Lists entries."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def list(self, query: AuditQuery) -> Page[AuditEntry]:
        """One page of a tenant's entries, newest first. Raises ``InvalidArgument``, ``RevisionCompacted``."""
        tenant, resource = TenantName.parse(query.parent, field="parent"), query.resource
        _check_resource(resource, tenant)
        start_us, end_us = _microseconds(query.start_time), _microseconds(query.end_time)
        everything = resource in ("", str(tenant))

        return await page_of(
            lambda position, revision, limit: self._walk(
                tenant.tenant,
                position,
                revision=revision,
                limit=min(limit, _CHUNK),
                start_us=start_us,
                end_us=end_us,
            ),
            lambda key: self._keys.parts(key)[2],
            AuditCodec(self._keys, b"" if everything else _needle(resource)),
            bound=f"audit\0{tenant.tenant}\0{resource}\0{start_us}\0{end_us}",
            page_size=query.page_size,
            page_token=query.page_token,
            keep=None if everything else lambda entry: self._changes(entry, resource),
            size_of=_size,
        )

    def _changes(self, entry: AuditEntry, resource: str) -> bool:
        for change in entry.changes:
            family = audited(self._keys, change.key)
            name = family.resource(self._keys, change.key) if family else ""
            if name == resource or name.startswith(resource + "/"):
                return True
        return False

    async def _walk(
        self, tenant: str, position: str, *, revision: int, limit: int, start_us: int, end_us: int
    ) -> AsyncIterator[Stretch]:
        prefix = self._keys.family("audit", tenant)
        stop = self._keys.audit_before(tenant, start_us) if start_us else prefix_end(prefix)
        if position:
            start = prefix + position.encode() + b"\0"
            try:
                time_us = self._keys.audit_time_us(start)
            except ValueError as error:
                raise InvalidArgument("page_token does not belong to this listing", field="page_token") from error
        else:
            # Without an end the first window holds the future too: another catalog's clock may be ahead.
            start = self._keys.audit_before(tenant, end_us) if end_us else prefix
            time_us = end_us or int(wall_s() * 1e6)
        span_us = _WINDOW_US
        while True:
            until = self._keys.audit_before(tenant, time_us - span_us) if span_us < _WIDEST_US else stop
            until = min(max(until, start), stop)
            result = await self._store.scan(start, until, limit=limit, revision=revision)
            revision = revision or result.revision
            last = not result.more and until >= stop
            yield Stretch(result.values, revision, last)
            if last:
                return
            if result.more:
                start, span_us = result.values[-1].key + b"\0", _WINDOW_US
                time_us = self._keys.audit_time_us(start)
            else:
                start, time_us, span_us = until, time_us - span_us, 4 * span_us


def _check_resource(resource: str, tenant: TenantName) -> None:
    if not resource:
        return
    for name_type in _RESOURCES:
        try:
            name = name_type.parse(resource.removesuffix(_LEASE), field="resource")
        except InvalidArgument:
            continue
        if resource == str(tenant) or str(name).startswith(f"{tenant}/"):
            return
    raise InvalidArgument(
        f"resource is {resource[:160]!r}: expected the name of a policy, revision, alias, evaluation, run, fleet "
        f"operation or erasure below {tenant}, or {tenant} itself",
        field="resource",
    )


def _needle(resource: str) -> bytes:
    """What every key of the resource or below it contains: the id below the tenant."""
    parts = resource.split("/")
    return f"/{parts[3]}".encode() if len(parts) > 3 else b""


def _size(entry: AuditEntry) -> int:
    # Keys and stored values, and about what a public message adds to them: names, etags, what the key tells.
    return sum(400 + len(change.before or b"") + len(change.after or b"") for change in entry.changes)
