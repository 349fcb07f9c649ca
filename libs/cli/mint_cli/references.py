"""Names as people type them: ``tenant/policy``, ``tenant/policy@alias``, ``tenant/policy@3``, and ``tenant/run``."""

from __future__ import annotations

from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, BaseModelName, PolicyName, RevisionName, RunName, check_id, parse_policy_ref

__all__ = [
    "alias_name",
    "model_name",
    "policy_name",
    "resource_name",
    "revision_name",
    "run_name",
    "short",
    "tenant_id",
]


def tenant_id(text: str) -> str:
    return check_id(text, field="tenant")


def policy_name(text: str) -> PolicyName:
    """Of ``tenant/policy``; nothing may follow."""
    if "@" in text:
        raise InvalidArgument(f"policy is {text!r}: expected tenant/policy without @", field="policy")
    return parse_policy_ref(text)[0]


def alias_name(text: str) -> AliasName:
    """Of ``tenant/policy@alias``; without ``@`` the alias is ``live``."""
    policy, target = parse_policy_ref(text, field="alias")
    if isinstance(target, int):
        raise InvalidArgument(f"alias is {text!r}: expected tenant/policy@alias, not a revision number", field="alias")
    return AliasName(policy.tenant, policy.policy, target)


def model_name(text: str, *, field: str = "model") -> str:
    """What Generate takes: an alias, a revision, or a base model asked on purpose (``baseModels/NAME``)."""
    if text.startswith("baseModels/"):
        return str(BaseModelName.parse(text, field=field))
    policy, target = parse_policy_ref(text, field=field)
    if isinstance(target, int):
        return str(RevisionName(policy.tenant, policy.policy, target))
    return str(AliasName(policy.tenant, policy.policy, target))


def revision_name(text: str) -> RevisionName:
    """Of ``tenant/policy@3``, or of the revision's whole name."""
    if text.startswith("tenants/"):
        return RevisionName.parse(text, field="revision")
    policy, target = parse_policy_ref(text, field="revision")
    if not isinstance(target, int):
        raise InvalidArgument(f"revision is {text!r}: expected tenant/policy@NUMBER", field="revision")
    return RevisionName(policy.tenant, policy.policy, target)


def run_name(text: str) -> RunName:
    """Of ``tenant/run``, or of the run's whole name."""
    if text.startswith("tenants/"):
        return RunName.parse(text, field="run")
    tenant, slash, run = text.partition("/")
    if not slash:
        raise InvalidArgument(f"run is {text!r}: expected tenant/run, as `mint run list` shows it", field="run")
    return RunName(check_id(tenant, field="run"), check_id(run, field="run"))


def resource_name(text: str) -> str:
    """Of ``tenant/policy``, ``tenant/policy@alias`` or ``tenant/policy@3``; a whole resource name stays as it is."""
    if text.startswith("tenants/"):
        return text
    return model_name(text, field="resource") if "@" in text else str(policy_name(text))


def short(name: str) -> str:
    """A resource name as it is typed, where there is such a form."""
    match name.split("/"):
        case ["tenants", tenant, "policies", policy]:
            return f"{tenant}/{policy}"
        case ["tenants", tenant, "policies", policy, "revisions" | "aliases", target]:
            return f"{tenant}/{policy}@{target}"
        case ["tenants", tenant, "runs", run]:
            return f"{tenant}/{run}"
    return name
