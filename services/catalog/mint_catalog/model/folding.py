"""The stored form of policies, revisions, aliases and blobs: their public messages without what the rest tells.

A million of each lie in etcd, so a value leaves out what its key says (the number of a revision, the front of an object
key), what stands in it twice (the digest that an alias points at), and what nearly always has one value (a state, an
alpha of twice the rank); digests and uids shrink from hex to base64. No second schema is needed: a folded value is a
message of the same type.

Folding a message twice gives the message back, whatever it holds: each step swaps two values of a field and leaves all
others alone. So nothing must be marked in the message but that it is folded, and there is no record that cannot be.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from mint_catalog.model.records import BlobRef, Resolution
from mint_core.names import AliasName, BlobName, PolicyName, RevisionName

__all__ = ["fold_alias", "fold_blob", "fold_policy", "fold_revision", "unfolded_resolution"]

_ACTIVE: Final = 1
_READY: Final = 1
_VERIFIED: Final = 2
_DIGEST_LENGTH: Final = 71


@dataclass(frozen=True, slots=True)
class _Form:
    """How some bytes are written as text for people: hex digits with something around them."""

    num_bytes: int
    text_length: int
    write: Callable[[str], str]
    """Hex digits to the text."""
    strip: Callable[[str], str]
    """The text to its hex digits, or to anything else for a text of another form."""

    def swap(self, text: str) -> str:
        """The text to base64 without padding, and back; what is neither stays."""
        if len(text) == self.text_length:
            digits = self.strip(text)
            try:
                raw = bytes.fromhex(digits)
            except ValueError:
                return text
            return _base64(raw) if len(raw) == self.num_bytes and self.write(raw.hex()) == text else text
        if len(text) == (4 * self.num_bytes + 2) // 3:
            try:
                raw = a2b_base64(text.replace("_", "/") + "==")
            except ValueError:
                return text
            return self.write(raw.hex()) if len(raw) == self.num_bytes and _base64(raw) == text else text
        return text


def _base64(raw: bytes) -> str:
    return b2a_base64(raw, newline=False).decode().rstrip("=").replace("/", "_")


def _uuid(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


_swap_digest: Final = lru_cache(4096)(
    _Form(32, _DIGEST_LENGTH, lambda digits: "sha256:" + digits, lambda text: text[7:]).swap
)  # many share one base and one blob
_swap_uid: Final = _Form(16, 36, _uuid, lambda text: text.replace("-", "")).swap
_swap_stage: Final = _Form(16, 32, lambda digits: digits, lambda text: text).swap


def _swap(message: Any, field: str, derived: Any) -> None:
    """Leave out a value that equals ``derived``, put ``derived`` where none is."""
    value = getattr(message, field)
    if value == derived:
        message.ClearField(field)
    elif not value:
        setattr(message, field, derived)


def _swap_message(message: Any, field: str, derived: Any) -> None:
    """The same for a field that is a message."""
    if not message.HasField(field):
        getattr(message, field).CopyFrom(derived)
        getattr(message, field).SetInParent()
    elif getattr(message, field) == derived:
        message.ClearField(field)


def _swap_last(text: str, front: str) -> str:
    """Only the last segment of a path that goes on after ``front`` with one segment, and back."""
    if not text:
        return text
    if "/" not in text:
        return front + text
    last = text[len(front) :]
    return last if last and "/" not in last and text.startswith(front) else text


def _swap_object_key(key: str, tenant: str, digest: str) -> str:
    """Only the stage id of the key of a blob of this tenant and digest (in either form), and back."""
    plain = digest if len(digest) == _DIGEST_LENGTH else _swap_digest(digest)
    front = f"tenants/{tenant}/blobs/{plain[7:]}/"
    if "/" in key:
        return _swap_stage(last) if "/" not in (last := _swap_last(key, front)) else key
    return _swap_last(_swap_stage(key), front)


def _swap_lora(message: Any) -> None:
    if message.HasField("lora"):
        _swap(message.lora, "alpha", 2.0 * message.lora.rank)


def _swap_signature(message: Any) -> None:
    if message.HasField("signature"):
        message.signature.key_id = _swap_digest(message.signature.key_id)


def fold_policy(message: Any, _name: PolicyName) -> None:
    """Fold or unfold a ``mint.v1.Policy`` in place."""
    message.uid = _swap_uid(message.uid)
    message.base_digest = _swap_digest(message.base_digest)
    _swap(message, "state", _ACTIVE)
    _swap_lora(message)
    if message.HasField("create_time"):
        _swap_message(message, "update_time", message.create_time)


def fold_revision(message: Any, name: RevisionName) -> None:
    """Fold or unfold a ``mint.v1.Revision`` in place."""
    message.policy_uid = _swap_uid(message.policy_uid)
    message.base_digest = _swap_digest(message.base_digest)
    message.object_key = _swap_object_key(message.object_key, name.tenant, message.blob.digest)
    if message.HasField("blob"):
        message.blob.digest = _swap_digest(message.blob.digest)
    if message.HasField("lineage"):
        lineage, policy = message.lineage, f"tenants/{name.tenant}/policies/{name.policy}/revisions/"
        lineage.parent_revision = _swap_last(lineage.parent_revision, policy)
        lineage.run = _swap_last(lineage.run, f"tenants/{name.tenant}/runs/")
        lineage.data_digest = _swap_digest(lineage.data_digest)
    _swap_signature(message)
    _swap(message, "number", name.number)
    _swap(message, "state", _READY)
    _swap_lora(message)


def fold_blob(message: Any, name: BlobName) -> None:
    """Fold or unfold a ``mint.runtime.v1.BlobRecord`` in place."""
    message.object_key = _swap_object_key(message.object_key, name.tenant, name.digest)
    if message.HasField("blob"):
        _swap(message.blob, "digest", name.digest)
    _swap(message, "state", _VERIFIED)


def fold_alias(message: Any, name: AliasName) -> None:
    """Fold or unfold a ``mint.v1.Alias`` in place."""
    message.policy_uid = _swap_uid(message.policy_uid)
    for entry in message.history:
        if entry.HasField("target"):
            entry.target.digest = _swap_digest(entry.target.digest)
    if message.HasField("canary_resolution"):
        _swap_resolution(message.canary_resolution, message.canary.target, name)
    if message.HasField("resolution"):
        _swap_resolution(message.resolution, message.active, name)
    if message.canary.HasField("target"):
        message.canary.target.digest = _swap_digest(message.canary.target.digest)
    if message.HasField("active"):
        message.active.digest = _swap_digest(message.active.digest)
        if message.history:
            _swap_message(message.history[0], "target", message.active)
    if message.history and message.history[0].attribution.HasField("time"):
        _swap_message(message, "update_time", message.history[0].attribution.time)


def unfolded_resolution(resolution: Any, target: Any, name: AliasName) -> Resolution:
    """The record of a folded resolution, of an alias that is not unfolded; ``target`` is what it is the answer for."""
    digest = target.digest
    blob = resolution.blob if resolution.HasField("blob") else None
    revision = f"tenants/{name.tenant}/policies/{name.policy}/revisions/{target.revision_number}"
    return Resolution(
        _swapped(resolution.revision, revision),
        BlobRef(_swap_digest(_swapped(blob.digest, digest)), blob.size_bytes) if blob is not None else None,
        _swap_object_key(resolution.object_key, name.tenant, digest),
        resolution.base_model,
        _swap_digest(resolution.base_digest),
        resolution.canary,
        resolution.stale,
        resolution.catalog_revision,
    )


def _swapped(value: str, derived: str) -> str:
    return "" if value == derived else value or derived


def _swap_resolution(resolution: Any, target: Any, name: AliasName) -> None:
    """``target`` is not swapped yet: its digest has the form that the resolution's has."""
    policy = f"tenants/{name.tenant}/policies/{name.policy}"
    _swap(resolution, "revision", f"{policy}/revisions/{target.revision_number}")
    resolution.base_digest = _swap_digest(resolution.base_digest)
    _swap_signature(resolution)
    resolution.object_key = _swap_object_key(resolution.object_key, name.tenant, target.digest)
    if resolution.HasField("blob"):
        _swap(resolution.blob, "digest", target.digest)
        resolution.blob.digest = _swap_digest(resolution.blob.digest)
