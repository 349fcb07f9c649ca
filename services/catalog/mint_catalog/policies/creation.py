"""What a new policy consists of: its head, and the revisions and aliases that are made with it.

:func:`prepare` checks what a caller wants by itself, :func:`assemble` against what the store holds. Both are free of
reads and writes, so that one policy in a transaction of its own and many in a shared one are made by the same rules.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final

from mint_catalog.model.checks import check_labels, check_lineage, check_lora, check_range, check_text, not_found
from mint_catalog.model.records import (
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    BaseModel,
    BlobRecord,
    LoraConfig,
    Policy,
    PolicyQuota,
    PolicyState,
    Revision,
    RevisionState,
)
from mint_catalog.policies.blobs import verified_blob
from mint_catalog.serving.split import resolution_of
from mint_catalog.storage.requests import Request
from mint_core.calls import principal
from mint_core.errors import AlreadyExists, BaseModelMismatch, InvalidArgument, ResourceExhausted
from mint_core.names import AliasName, BaseModelName, BlobName, PolicyName, RevisionName, check_digest, check_id

__all__ = [
    "MAX_NEW_ALIASES",
    "MAX_NEW_REVISIONS",
    "Made",
    "NewPolicy",
    "Prepared",
    "assemble",
    "check_fields",
    "prepare",
]

MAX_NEW_REVISIONS: Final = 16
MAX_NEW_ALIASES: Final = 16

_DEFAULT_LORA: Final = check_lora(None, field="policy.lora")
_base_model_name: Final = lru_cache(256)(BaseModelName.parse)


@dataclass(frozen=True, slots=True)
class NewPolicy:
    """A policy as a caller wants it. Output-only fields are ignored."""

    name: PolicyName
    policy: Policy
    revisions: Sequence[Revision] = ()
    """Adapters that exist already."""
    aliases: Mapping[str, int] = field(default_factory=dict)
    """Alias id to position in ``revisions``, from 1."""
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A new policy that is right by itself."""

    name: PolicyName
    policy: Policy
    base_model: BaseModelName
    lora: LoraConfig
    revisions: tuple[tuple[Revision, LoraConfig], ...]
    """With the LoRA hyper-parameters in effect."""
    digests: tuple[str, ...]
    """Of the blob of each revision."""
    aliases: tuple[tuple[AliasName, int], ...]
    request: Request | None

    @property
    def blobs(self) -> list[BlobName]:
        """The distinct blobs that it needs."""
        return [BlobName(self.name.tenant, digest) for digest in dict.fromkeys(self.digests)]


@dataclass(frozen=True, slots=True)
class Made:
    """The records of a new policy."""

    head: Policy
    revisions: tuple[Revision, ...]
    aliases: tuple[Alias, ...]


def check_fields(policy: Policy) -> None:
    """Labels, owner, description and quota. Raises ``InvalidArgument``."""
    if policy.labels:
        check_labels(policy.labels, field="policy.labels")
    check_text(policy.owner, field="policy.owner", max_chars=256)
    check_text(policy.description, field="policy.description", max_chars=1024)
    quota = policy.quota
    if quota is not None:
        check_range(quota.max_revisions, field="policy.quota.max_revisions", least=0, hint="0 means no bound")
        check_range(quota.max_open_runs, field="policy.quota.max_open_runs", least=0, hint="0 means no bound")


def prepare(wanted: NewPolicy) -> Prepared:
    """Check what is wanted. Raises ``InvalidArgument``, ``ResourceExhausted`` (more revisions than its own quota)."""
    name, policy = wanted.name, wanted.policy
    base_model = _base_model_name(policy.base_model, field="policy.base_model")
    lora = _DEFAULT_LORA if policy.lora is None else check_lora(policy.lora, field="policy.lora")
    check_fields(policy)
    if len(wanted.revisions) > MAX_NEW_REVISIONS:
        raise InvalidArgument(
            f"revisions has {len(wanted.revisions)} entries: at most {MAX_NEW_REVISIONS} are made with a policy; "
            "publish the others afterwards",
            field="revisions",
        )
    _check_quota(policy.quota or PolicyQuota(), name, len(wanted.revisions))
    revisions = tuple(
        (revision, _check_revision(name, lora, revision, f"revisions[{index}]"))
        for index, revision in enumerate(wanted.revisions)
    )
    digests = tuple(revision.blob.digest for revision in wanted.revisions if revision.blob is not None)
    aliases = _check_aliases(name, wanted.aliases, len(revisions))
    return Prepared(name, policy, base_model, lora, revisions, digests, aliases, wanted.request)


def _check_quota(quota: PolicyQuota, name: PolicyName, num_revisions: int) -> None:
    if 0 < quota.max_revisions < num_revisions:
        raise ResourceExhausted(
            f"{name} would have {num_revisions} revisions, its quota is {quota.max_revisions}; raise "
            "policy.quota.max_revisions or leave revisions out",
            metadata={"resource": str(name)},
        )


def _check_revision(policy: PolicyName, lora: LoraConfig, revision: Revision, field: str) -> LoraConfig:
    """Its own hyper-parameters, or else the policy's."""
    check_digest(revision.blob.digest if revision.blob else "", field=f"{field}.blob.digest")
    if revision.base_digest:
        check_digest(revision.base_digest, field=f"{field}.base_digest")
    check_range(revision.num_tensors, field=f"{field}.num_tensors", least=0)
    check_text(revision.layout, field=f"{field}.layout", max_chars=64)
    if revision.lineage is not None:
        check_lineage(policy, revision.lineage, field=f"{field}.lineage")
    return lora if revision.lora is None else check_lora(revision.lora, field=f"{field}.lora")


def _check_aliases(
    policy: PolicyName, aliases: Mapping[str, int], num_revisions: int
) -> tuple[tuple[AliasName, int], ...]:
    if len(aliases) > MAX_NEW_ALIASES:
        raise InvalidArgument(
            f"aliases has {len(aliases)} entries: at most {MAX_NEW_ALIASES} are made with a policy; promote the others "
            "afterwards",
            field="aliases",
        )
    names = []
    for alias, position in sorted(aliases.items()):
        check_id(alias, field="aliases")
        if not 1 <= position <= num_revisions:
            raise InvalidArgument(
                f"aliases[{alias!r}] is {position}: it must be the position of one of the {num_revisions} revisions, "
                "from 1",
                field=f"aliases[{alias!r}]",
            )
        names.append((AliasName(policy.tenant, policy.policy, alias), position))
    return tuple(names)


def assemble(
    prepared: Prepared,
    old: Policy | None,
    base: BaseModel | None,
    blobs: Mapping[str, BlobRecord | None],
    time: datetime,
) -> Made:
    """The records to write, where ``old`` is what lies under the name; ``blobs`` are by digest.

    Raises ``AlreadyExists``, ``NotFound`` (base model), ``BlobMissing``, ``BaseModelMismatch``, ``InvalidArgument``
    (a size that its blob does not have).
    """
    name, wanted = prepared.name, prepared.policy
    if old is not None and old.state is not PolicyState.DELETED:
        raise AlreadyExists(
            f"{name} exists; choose another id or update it", metadata={"resource": str(name), "uid": old.uid}
        )
    if base is None:
        raise not_found(prepared.base_model, "register the base model first")
    first_number = old.next_revision_number if old else 1
    head = Policy(
        name=name,
        uid=str(uuid.uuid4()),
        base_model=str(prepared.base_model),
        base_digest=base.digest,
        lora=prepared.lora,
        labels=wanted.labels,
        owner=wanted.owner,
        description=wanted.description,
        state=PolicyState.ACTIVE,
        next_revision_number=first_number + len(prepared.revisions),
        create_time=time,
        update_time=time,
        quota=wanted.quota,
    )
    revisions = tuple(
        _revision(head, first_number + index, revision, lora, blobs[digest], f"revisions[{index}]")
        for index, ((revision, lora), digest) in enumerate(zip(prepared.revisions, prepared.digests, strict=True))
    )
    aliases = tuple(_alias(head, alias, revisions[position - 1]) for alias, position in prepared.aliases)
    return Made(head, revisions, aliases)


def _revision(
    head: Policy, number: int, wanted: Revision, lora: LoraConfig, blob: BlobRecord | None, field: str
) -> Revision:
    stored = verified_blob(blob, BlobName(head.name.tenant, wanted.blob.digest if wanted.blob else ""))
    if wanted.base_digest not in ("", head.base_digest):
        raise BaseModelMismatch(
            f"{field} fits base {wanted.base_digest!r}, {head.name} has base {head.base_digest}: export it for this "
            "base or publish it on another policy",
            metadata={"expected": head.base_digest, "actual": wanted.base_digest},
        )
    size = wanted.blob.size_bytes if wanted.blob else 0
    if stored.blob is not None and size not in (0, stored.blob.size_bytes):
        raise InvalidArgument(
            f"{field}.blob.size_bytes is {size}: the verified blob has {stored.blob.size_bytes}",
            field=f"{field}.blob.size_bytes",
        )
    return Revision(
        name=RevisionName(head.name.tenant, head.name.policy, number),
        number=number,
        policy_uid=head.uid,
        blob=stored.blob,
        base_digest=head.base_digest,
        lora=lora,
        num_tensors=wanted.num_tensors,
        layout=wanted.layout,
        lineage=wanted.lineage,
        state=RevisionState.READY,
        publish_time=head.create_time,
        object_key=stored.object_key,
    )


def _alias(head: Policy, name: AliasName, revision: Revision) -> Alias:
    target = AliasTarget(revision.number, revision.blob.digest if revision.blob else "")
    return Alias(
        name=name,
        active=target,
        history=(AliasHistoryEntry(target, Attribution(principal(), head.create_time)),),
        policy_uid=head.uid,
        update_time=head.create_time,
        resolution=resolution_of(head, revision),
    )
