"""Checks of what a caller sends; each error names the field, the value and what is expected."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from mint_blobs.keys import check_key
from mint_catalog.model.records import AdapterSignature, Lineage, LoraConfig, Policy, PolicyState
from mint_core.errors import InvalidArgument, NotFound, WrongState
from mint_core.names import PolicyName, RevisionName, RunName, check_digest, check_id

__all__ = [
    "check_active",
    "check_finite",
    "check_holder",
    "check_labels",
    "check_lineage",
    "check_lora",
    "check_metrics",
    "check_object_key",
    "check_own_revision",
    "check_range",
    "check_signature",
    "check_text",
    "check_ttl",
    "live_policy",
    "not_found",
]

_MAX_LABELS = 64
_MAX_LABEL_VALUE = 256
_DEFAULT_RANK = 16
_MAX_RANK = 512
_MAX_MODULES = 256
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOLDER = re.compile(r"[!-~]{8,64}")
_MIN_TTL_S = 2
_MAX_TTL_S = 3600
_SIGNATURE_BYTES = 64


def not_found(resource: object, hint: str = "") -> NotFound:
    """The error for a name that stands for nothing."""
    return NotFound(f"{resource} does not exist{hint and '; ' + hint}", metadata={"resource": str(resource)})


def live_policy(head: Policy | None, name: PolicyName) -> Policy:
    """The head, unless the policy was never made or is deleted."""
    if head is None or head.state is PolicyState.DELETED:
        raise not_found(name)
    return head


def check_active(head: Policy) -> None:
    """Raise :class:`WrongState` unless the policy takes new runs and promotions."""
    if head.state is not PolicyState.ACTIVE:
        raise WrongState(
            f"{head.name} is {head.state.name}: it takes no new runs or promotions until it is ACTIVE",
            metadata={"resource": str(head.name), "state": head.state.name},
        )


def check_text(value: str, *, field: str, max_chars: int) -> str:
    """One line of at most ``max_chars`` printable characters."""
    if len(value) > max_chars or not (value.isprintable() or not value):
        raise InvalidArgument(
            f"{field} has {len(value)} characters, or some that do not print: at most {max_chars} on one line",
            field=field,
        )
    return value


def check_labels(labels: Mapping[str, str], *, field: str) -> None:
    """At most 64 labels, keys as ids, values up to 256 characters."""
    if len(labels) > _MAX_LABELS:
        raise InvalidArgument(f"{field} has {len(labels)} entries: at most {_MAX_LABELS}", field=field)
    for key, value in labels.items():
        check_id(key, field=f"{field}[{key[:64]!r}]")
        check_text(value, field=f"{field}[{key!r}]", max_chars=_MAX_LABEL_VALUE)


def check_range(value: float, *, field: str, least: float, most: float = math.inf, hint: str = "") -> None:
    """``least <= value <= most``, and finite."""
    if not math.isfinite(value) or not least <= value <= most:
        bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InvalidArgument(f"{field} is {value}: it must be {bound}{hint and '; ' + hint}", field=field)


def check_finite(value: float, *, field: str) -> None:
    """A figure that is not NaN and not infinite."""
    if not math.isfinite(value):
        raise InvalidArgument(f"{field} is {value}: figures must be finite; leave it out", field=field)


def check_metrics(metrics: Mapping[str, float], *, field: str, most: int) -> None:
    """At most ``most`` figures with ids as names, all finite."""
    if len(metrics) > most:
        raise InvalidArgument(f"{field} has {len(metrics)} figures: at most {most}", field=field)
    for key, value in metrics.items():
        check_id(key, field=field)
        check_finite(value, field=f"{field}[{key!r}]")


def check_object_key(key: str, tenant: str, *, field: str) -> str:
    """An object key that belongs to the tenant."""
    if not key.startswith(f"tenants/{tenant}/"):
        raise InvalidArgument(f"{field} is {key[:120]!r}: expected an object key below tenants/{tenant}/", field=field)
    return check_key(key, field=field)


def check_own_revision(name: str, policy: PolicyName, *, field: str) -> RevisionName:
    """The name of a revision of this very policy."""
    revision = RevisionName.parse(name, field=field)
    if revision.parent != policy:
        raise InvalidArgument(f"{field} is {revision}: it must belong to {policy}", field=field)
    return revision


def check_lora(lora: LoraConfig | None, *, field: str) -> LoraConfig:
    """The configuration with its defaults filled in; none at all means rank 16."""
    if lora is None:
        lora = LoraConfig(rank=_DEFAULT_RANK)
    check_range(lora.rank, field=f"{field}.rank", least=1, most=_MAX_RANK)
    check_range(lora.alpha, field=f"{field}.alpha", least=0, hint="0 means twice the rank")
    if not 0 <= lora.dropout < 1:
        raise InvalidArgument(f"{field}.dropout is {lora.dropout:g}: it must be in [0, 1)", field=f"{field}.dropout")
    modules = lora.target_modules
    if len(modules) > _MAX_MODULES or len(set(modules)) != len(modules) or not all(map(_MODULE.fullmatch, modules)):
        raise InvalidArgument(
            f"{field}.target_modules is not a list of at most {_MAX_MODULES} distinct module names like 'q_proj'",
            field=f"{field}.target_modules",
        )
    return replace(lora, alpha=lora.alpha or 2.0 * lora.rank)


def check_lineage(policy: PolicyName, lineage: Lineage, *, field: str) -> RunName | None:
    """Where a revision of ``policy`` is said to come from; returns the run, if one is named."""
    check_range(lineage.step, field=f"{field}.step", least=0)
    if lineage.parent_revision:
        RevisionName.parse(lineage.parent_revision, field=f"{field}.parent_revision")
    if lineage.data_digest:
        check_digest(lineage.data_digest, field=f"{field}.data_digest")
    check_text(lineage.code_version, field=f"{field}.code_version", max_chars=128)
    check_text(lineage.recipe, field=f"{field}.recipe", max_chars=64)
    if not lineage.run:
        return None
    run = RunName.parse(lineage.run, field=f"{field}.run")
    if run.tenant != policy.tenant:
        raise InvalidArgument(f"{field}.run is {run}: it must belong to tenants/{policy.tenant}", field=f"{field}.run")
    return run


def check_signature(signature: AdapterSignature, *, field: str) -> AdapterSignature:
    """The form of a signature; whether it holds is for the nodes that load the adapter."""
    check_digest(signature.key_id, field=f"{field}.key_id")
    if len(signature.value) != _SIGNATURE_BYTES:
        raise InvalidArgument(
            f"{field}.value has {len(signature.value)} bytes: an ed25519 signature has {_SIGNATURE_BYTES}",
            field=f"{field}.value",
        )
    return signature


def check_holder(holder: str, *, field: str = "holder") -> str:
    """A nonce of 8 to 64 printable ASCII characters."""
    if not _HOLDER.fullmatch(holder):
        raise InvalidArgument(
            f"{field} has {len(holder)} characters: a holder's nonce is 8 to 64 printable ASCII characters, no blanks",
            field=field,
        )
    return holder


def check_ttl(ttl_s: float, *, default_s: int, field: str = "ttl") -> int:
    """Whole seconds, rounded up; 0 means the default."""
    if ttl_s == 0:
        return default_s
    check_range(ttl_s, field=field, least=_MIN_TTL_S, most=_MAX_TTL_S, hint="seconds; 0 means the default")
    return math.ceil(ttl_s)
