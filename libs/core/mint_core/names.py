"""Resource names: the only parser and the only formatter.

A name is checked once, where it enters a service, and travels as a value of one of these types after that.
Ids are ``[a-z0-9][a-z0-9._-]{0,62}`` without ``..``, so that no name can climb out of a key prefix or a folder.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Self

from mint_core.errors import InvalidArgument

__all__ = [
    "AliasName",
    "AuditEntryName",
    "BaseModelName",
    "BlobName",
    "EngineReplicaName",
    "EvaluationName",
    "FleetOperationName",
    "LoadTicketName",
    "PolicyName",
    "ResourceName",
    "RevisionName",
    "RolloutName",
    "RunName",
    "SessionName",
    "StepName",
    "TenantErasureName",
    "TenantName",
    "check_digest",
    "check_id",
    "parse_policy_ref",
]

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_MAX_SHOWN = 120


def _shown(value: str) -> str:
    return repr(value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "…")


def check_id(value: str, *, field: str) -> str:
    """Return ``value`` if it is a legal id, else raise :class:`InvalidArgument` naming ``field``."""
    if not _ID.fullmatch(value) or ".." in value:
        raise InvalidArgument(
            f"{field} is {_shown(value)}: an id has 1 to 63 characters of a-z, 0-9, '.', '_', '-', "
            "starts with a letter or digit and has no '..'",
            field=field,
        )
    return value


def check_digest(value: str, *, field: str) -> str:
    """Return ``value`` if it is ``sha256:`` and 64 lower-case hex digits, else raise."""
    if not _DIGEST.fullmatch(value):
        raise InvalidArgument(
            f"{field} is {_shown(value)}: a digest is 'sha256:' followed by 64 lower-case hex digits",
            field=field,
        )
    return value


@functools.cache
def _matcher(pattern: str) -> re.Pattern[str]:
    """Matches names of a pattern; a group for each attribute. That ids have no ``..`` is left to the caller."""
    kinds = {"{number}": _NUMBER, "{seq}": _NUMBER, "{digest}": _DIGEST}
    parts = [f"({kinds.get(part, _ID).pattern})" if part[0] == "{" else re.escape(part) for part in pattern.split("/")]
    return re.compile("/".join(parts))


@dataclass(frozen=True, slots=True, order=True)
class ResourceName:
    """Base of all names; a subclass states its ``pattern`` with one ``{attribute}`` per id."""

    pattern: ClassVar[str]

    @classmethod
    def parse(cls, name: str, *, field: str = "name") -> Self:
        """Parse ``name``; :class:`InvalidArgument` names ``field`` and the expected pattern."""
        match = _matcher(cls.pattern).fullmatch(name)
        if match is None or ".." in name:
            cls._refuse(name, field)
        ids: list[str | int] = [*match.groups()]
        if cls.pattern.endswith(("{number}", "{seq}")):
            ids[-1] = int(ids[-1])
        return cls(*ids)

    @classmethod
    def _refuse(cls, name: str, field: str) -> NoReturn:
        """Raise :class:`InvalidArgument` for a name that does not match, saying what is wrong with it."""
        expected = cls.pattern.split("/")
        parts = name.split("/")
        if len(parts) != len(expected) or any(
            not want.startswith("{") and want != got for want, got in zip(expected, parts, strict=True)
        ):
            raise InvalidArgument(f"{field} is {_shown(name)}: expected {cls.pattern}", field=field)
        for want, got in zip(expected, parts, strict=True):
            if want in ("{number}", "{seq}"):
                if not _NUMBER.fullmatch(got):
                    raise InvalidArgument(
                        f"{field} is {_shown(name)}: {want[1:-1]} must be a positive whole number", field=field
                    )
            elif want == "{digest}":
                check_digest(got, field=field)
            elif want.startswith("{"):
                check_id(got, field=field)
        raise InvalidArgument(f"{field} is {_shown(name)}: expected {cls.pattern}", field=field)

    def __str__(self) -> str:
        return self.pattern.format(**{key: getattr(self, key) for key in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True, order=True)
class TenantName(ResourceName):
    """``tenants/{tenant}``"""

    pattern: ClassVar[str] = "tenants/{tenant}"
    tenant: str


@dataclass(frozen=True, slots=True, order=True)
class BaseModelName(ResourceName):
    """``baseModels/{base_model}``"""

    pattern: ClassVar[str] = "baseModels/{base_model}"
    base_model: str


@dataclass(frozen=True, slots=True, order=True)
class EngineReplicaName(ResourceName):
    """``engineReplicas/{engine_replica}``"""

    pattern: ClassVar[str] = "engineReplicas/{engine_replica}"
    engine_replica: str


@dataclass(frozen=True, slots=True, order=True)
class LoadTicketName(ResourceName):
    """``loadTickets/{load_ticket}``"""

    pattern: ClassVar[str] = "loadTickets/{load_ticket}"
    load_ticket: str


@dataclass(frozen=True, slots=True, order=True)
class PolicyName(ResourceName):
    """``tenants/{tenant}/policies/{policy}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/policies/{policy}"
    tenant: str
    policy: str


@dataclass(frozen=True, slots=True, order=True)
class RevisionName(ResourceName):
    """``tenants/{tenant}/policies/{policy}/revisions/{number}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/policies/{policy}/revisions/{number}"
    tenant: str
    policy: str
    number: int

    @property
    def parent(self) -> PolicyName:
        return PolicyName(self.tenant, self.policy)


@dataclass(frozen=True, slots=True, order=True)
class AliasName(ResourceName):
    """``tenants/{tenant}/policies/{policy}/aliases/{alias}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/policies/{policy}/aliases/{alias}"
    tenant: str
    policy: str
    alias: str

    @property
    def parent(self) -> PolicyName:
        return PolicyName(self.tenant, self.policy)


@dataclass(frozen=True, slots=True, order=True)
class EvaluationName(ResourceName):
    """``tenants/{tenant}/policies/{policy}/evaluations/{evaluation}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/policies/{policy}/evaluations/{evaluation}"
    tenant: str
    policy: str
    evaluation: str

    @property
    def parent(self) -> PolicyName:
        return PolicyName(self.tenant, self.policy)


@dataclass(frozen=True, slots=True, order=True)
class RolloutName(ResourceName):
    """``tenants/{tenant}/policies/{policy}/rollouts/{rollout}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/policies/{policy}/rollouts/{rollout}"
    tenant: str
    policy: str
    rollout: str

    @property
    def parent(self) -> PolicyName:
        return PolicyName(self.tenant, self.policy)


@dataclass(frozen=True, slots=True, order=True)
class RunName(ResourceName):
    """``tenants/{tenant}/runs/{run}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/runs/{run}"
    tenant: str
    run: str


@dataclass(frozen=True, slots=True, order=True)
class FleetOperationName(ResourceName):
    """``tenants/{tenant}/fleetOperations/{fleet_operation}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/fleetOperations/{fleet_operation}"
    tenant: str
    fleet_operation: str


@dataclass(frozen=True, slots=True, order=True)
class TenantErasureName(ResourceName):
    """``tenants/{tenant}/erasure``"""

    pattern: ClassVar[str] = "tenants/{tenant}/erasure"
    tenant: str


@dataclass(frozen=True, slots=True, order=True)
class AuditEntryName(ResourceName):
    """``tenants/{tenant}/auditEntries/{audit_entry}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/auditEntries/{audit_entry}"
    tenant: str
    audit_entry: str


@dataclass(frozen=True, slots=True, order=True)
class SessionName(ResourceName):
    """``tenants/{tenant}/sessions/{session}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/sessions/{session}"
    tenant: str
    session: str


@dataclass(frozen=True, slots=True, order=True)
class StepName(ResourceName):
    """``tenants/{tenant}/sessions/{session}/steps/{seq}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/sessions/{session}/steps/{seq}"
    tenant: str
    session: str
    seq: int

    @property
    def parent(self) -> SessionName:
        return SessionName(self.tenant, self.session)


@dataclass(frozen=True, slots=True, order=True)
class BlobName(ResourceName):
    """``tenants/{tenant}/blobs/{digest}``"""

    pattern: ClassVar[str] = "tenants/{tenant}/blobs/{digest}"
    tenant: str
    digest: str


def parse_policy_ref(ref: str, *, field: str = "policy") -> tuple[PolicyName, str | int]:
    """Parse the short form people type: ``tenant/policy@alias`` or ``tenant/policy@3``.

    Returns the policy's name and the alias id (``str``) or revision number (``int``); without ``@`` the
    alias is ``live``.
    """
    head, at, target = ref.partition("@")
    tenant, slash, policy = head.partition("/")
    if not slash or "/" in policy:
        raise InvalidArgument(
            f"{field} is {_shown(ref)}: expected tenant/policy, tenant/policy@alias or tenant/policy@number",
            field=field,
        )
    name = PolicyName(check_id(tenant, field=field), check_id(policy, field=field))
    if not at:
        return name, "live"
    if _NUMBER.fullmatch(target):
        return name, int(target)
    return name, check_id(target, field=field)
