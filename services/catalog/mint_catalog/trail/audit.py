"""The audit trail's writing half: which records are audited, and the key that a transaction adds.

One transaction leaves one entry, written with the changes themselves, so that there is no change without its entry and
no entry without its change. Whatever goes through :class:`mint_catalog.storage.draft.Transactions` is audited by
``Draft.commit``; a transaction that is put together by hand adds :func:`audit_put` to its operations.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from mint_catalog.model.audit_codec import pack
from mint_catalog.model.audit_records import AuditChange, AuditChangeType
from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import Put
from mint_core import calls
from mint_core.clock import wall_s
from mint_core.names import AuditEntryName

__all__ = ["AUDITED", "Audited", "RawChange", "audit_put", "audited", "is_state_change"]

RawChange: TypeAlias = tuple[bytes, bytes | None, bytes | None]
"""A key, its value before (None: it was created) and its value since (None: it was deleted)."""

_MAX_VALUE: Final = 64 * 1024
_MAX_VALUES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Audited:
    """One audited family of keys."""

    resource: Callable[[Keys, bytes], str]
    """Name of the resource under a key."""
    codec: str
    """Its codec in ``MessageCodecs``."""
    unaudited: frozenset[str] = frozenset()
    """Fields of the record that alone make no entry: what a worker reports all the time."""


_PROGRESS: Final = frozenset({"events", "latest_training_state", "mod_revision", "progress"})

AUDITED: Final[Mapping[str, Audited]] = {
    "aliases": Audited(lambda keys, key: str(keys.alias_name(key)), "alias"),
    "evaluations": Audited(lambda keys, key: str(keys.evaluation_name(key)), "evaluation"),
    "fleet": Audited(
        lambda keys, key: str(keys.fleet_operation_name(key)),
        "fleet_operation",
        frozenset({"mod_revision", "num_done", "num_failed"}),
    ),
    "leases": Audited(lambda keys, key: f"{keys.lease_resource(key)}/lease", "holder"),
    "policies": Audited(lambda keys, key: str(keys.policy_name(key)), "policy"),
    "revisions": Audited(lambda keys, key: str(keys.revision_name(key)), "revision"),
    "runs": Audited(lambda keys, key: str(keys.run_name(key)), "run", _PROGRESS),
}
"""Every audited family. What is no state of a tenant's, or tells of a change that is audited already (graves, the
queue, claims, figures of steps, request ids), is not here. A lease that runs out is removed by etcd, without entry."""


def audited(keys: Keys, key: bytes) -> Audited | None:
    """How the key's family is audited, None if it is not."""
    return AUDITED.get(key[len(keys.prefix) :].partition(b"/")[0].decode())


def is_state_change(family: Audited, before: Any, after: Any) -> bool:
    """Whether two versions of a record differ in more than what is not audited."""
    if before is None or after is None or type(before) is not type(after):
        return True
    return any(
        getattr(before, each.name) != getattr(after, each.name)
        for each in fields(after)
        if each.name not in family.unaudited
    )


def audit_put(
    keys: Keys,
    tenant: str,
    *,
    changes: Sequence[RawChange],
    principal: str | None = None,
    method: str | None = None,
    request_id: str = "",
    reason: str = "",
) -> Put:
    """The operation that records the changes of one transaction, to be committed with them.

    It writes a key that was never there, so it needs no compare. ``principal`` and ``method`` are those of the call
    being served unless given. Values above 64 KiB, or beyond 256 KiB in all, are left out: only what happened is kept.
    """
    name = AuditEntryName(tenant, f"{int(wall_s() * 1e6):016d}-{secrets.token_hex(8)}")
    value = pack(
        keys.prefix,
        _bounded(changes),
        principal=calls.principal() if principal is None else principal,
        method=calls.method() if method is None else method,
        request_id=request_id,
        reason=reason,
    )
    return Put(keys.audit_entry(name), value)


def _bounded(changes: Sequence[RawChange]) -> list[AuditChange]:
    left = _MAX_VALUES

    def kept(value: bytes | None) -> bytes | None:
        nonlocal left
        if value is None or len(value) > min(_MAX_VALUE, left):
            return None
        left -= len(value)
        return value

    bounded = []
    for key, before, after in changes:
        if before is None:
            type_ = AuditChangeType.CREATED
        else:
            type_ = AuditChangeType.DELETED if after is None else AuditChangeType.CHANGED
        bounded.append(AuditChange(key, type_, kept(before), kept(after)))
    return bounded
