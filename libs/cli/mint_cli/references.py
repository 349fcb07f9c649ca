"""Names as people type them: ``tenant/policy``, ``tenant/policy@alias``, ``tenant/policy@3``, and ``tenant/run``."""

from __future__ import annotations

from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, BaseModelName, PolicyName, RevisionName, RunName, check_id, parse_policy_ref

__all__ = ["alias_name", "model_name", "policy_name", "run_name", "short", "tenant_id"]


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


def run_name(text: str) -> RunName:
    """Of ``tenant/run``, or of the run's whole name."""
    if text.startswith("tenants/"):
        return RunName.parse(text, field="run")
    tenant, slash, run = text.partition("/")
    if not slash:
        raise InvalidArgument(f"run is {text!r}: expected tenant/run, as `mint run list` shows it", field="run")
    return RunName(check_id(tenant, field="run"), check_id(run, field="run"))


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
