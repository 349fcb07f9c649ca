"""Ed25519 signatures over adapters (RFC 8032): the exporter signs, nodes refuse what their keys do not cover.

A signature binds a blob's digest to a tenant and a base model, so neither the object store nor the catalog can slip
another adapter in. Which keys a tenant's adapters must be signed with stands in a TOML file on each node::

    [tenants]
    acme = ["MCowBQYDK2VwAyEA2bCcXRbzVtTPyzOnPpBkBuRnVYwUiLIEX5dBwxHPl6Q="]   # any of them; base64 or PEM
    "*" = []                                                                   # every tenant not named: refused

A tenant that stands there demands signatures; one that does not (without ``"*"``) is served unsigned.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from mint_core.errors import FailedPrecondition, InvalidArgument, SignatureInvalid, SignatureRequired
from mint_core.names import check_id

__all__ = ["Signature", "Signer", "TrustedKeys", "signed_bytes"]

EVERY_OTHER_TENANT: Final = "*"
_VALUE_BYTES: Final = 64
_KEY_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Signature:
    """Who vouches for an adapter."""

    key_id: str
    """``sha256:`` and the hex digits of the SHA-256 of the raw public key."""
    value: bytes
    """64 bytes."""


def signed_bytes(tenant: str, digest: str, base_digest: str) -> bytes:
    """What is signed; ``tenant`` is the bare id. No part can hold a line end, so the parts cannot be shifted."""
    return f"mint-adapter-v1\n{tenant}\n{digest}\n{base_digest}\n".encode()


class Signer:
    """Signs with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = _key_id(key.public_key())

    @classmethod
    def from_file(cls, path: Path) -> Signer:
        """The key of an unencrypted PEM file, as ``openssl genpkey -algorithm ed25519`` writes it.

        Raises :class:`FailedPrecondition` naming the file, never its content.
        """
        try:
            key = load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # `from None`: the parser's words may quote the file.
            raise FailedPrecondition(
                f"{path} is no unencrypted private key in PEM: make one with `openssl genpkey -algorithm ed25519`"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise FailedPrecondition(f"{path} holds a {type(key).__name__}: adapters are signed with ed25519 keys only")
        return cls(key)

    @property
    def public_key(self) -> str:
        """What a node trusts, as one line of base64 (DER)."""
        return base64.b64encode(
            self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ).decode()

    def sign(self, tenant: str, digest: str, base_digest: str) -> Signature:
        """Vouch for a blob of ``tenant`` (the bare id) on a base. The same input gives the same signature."""
        return Signature(self.key_id, self._key.sign(signed_bytes(tenant, digest, base_digest)))


class TrustedKeys:
    """The keys that each tenant's adapters must be signed with, by any one of them."""

    def __init__(self, keys: Mapping[str, Sequence[Ed25519PublicKey]] | None = None) -> None:
        """``keys`` is by tenant id; ``"*"`` stands for every tenant that is not named. None demands nothing."""
        self._keys = {tenant: {_key_id(key): key for key in mine} for tenant, mine in (keys or {}).items()}

    @classmethod
    def from_file(cls, path: Path) -> TrustedKeys:
        """Read the TOML file described above. Raises :class:`FailedPrecondition` naming file and entry."""
        try:
            document = tomllib.loads(_read(path).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FailedPrecondition(f"{path} is no TOML: {error}") from None
        tenants = document.get("tenants")
        if not isinstance(tenants, dict) or set(document) != {"tenants"}:
            raise FailedPrecondition(
                f"{path} has the top-level keys {sorted(document)}: expected one table [tenants] with a list of public "
                "keys for each tenant"
            )
        return cls({_tenant(tenant, path): _public_keys(mine, f"{path}: {tenant}") for tenant, mine in tenants.items()})

    def demands(self, tenant: str) -> bool:
        """Whether the tenant's adapters must be signed."""
        return self._mine(tenant) is not None

    def check(self, tenant: str, digest: str, base_digest: str, signature: Signature | None) -> None:
        """Accept an adapter of ``tenant`` (the bare id), or refuse it.

        Raises :class:`SignatureRequired` (unsigned, and the tenant demands it), :class:`SignatureInvalid` (a key that
        is not trusted for the tenant, or not its signature of this digest, base and tenant).
        """
        trusted = self._mine(tenant)
        if trusted is None:
            return
        metadata = {"digest": digest, "tenant": tenant}
        if signature is None:
            raise SignatureRequired(
                f"adapter {digest} is not signed, tenant {tenant!r} demands signatures on this node: publish it by an "
                "exporter with a signing key",
                metadata=metadata,
            )
        key = trusted.get(signature.key_id)
        if key is None:
            raise SignatureInvalid(
                f"adapter {digest} is signed with key {signature.key_id[:80]!r}, this node trusts "
                f"{', '.join(trusted) or 'none'} for tenant {tenant!r}: sign with one of them or add the key",
                metadata=metadata,
            )
        try:
            key.verify(signature.value, signed_bytes(tenant, digest, base_digest))
        except InvalidSignature:
            raise SignatureInvalid(
                f"the signature of adapter {digest} does not hold for tenant {tenant!r} and base {base_digest}: the "
                "adapter, its owner or its base is not what was signed",
                metadata=metadata,
            ) from None

    def _mine(self, tenant: str) -> Mapping[str, Ed25519PublicKey] | None:
        return self._keys.get(tenant, self._keys.get(EVERY_OTHER_TENANT))


def _key_id(key: Ed25519PublicKey) -> str:
    return f"sha256:{hashlib.sha256(key.public_bytes_raw()).hexdigest()}"


def _tenant(tenant: str, path: Path) -> str:
    if tenant == EVERY_OTHER_TENANT:
        return tenant
    try:
        return check_id(tenant, field=f"{path}: tenants")
    except InvalidArgument as error:
        raise FailedPrecondition(error.message) from None


def _public_keys(entries: Any, where: str) -> list[Ed25519PublicKey]:
    if not isinstance(entries, list) or not all(isinstance(each, str) for each in entries):
        raise FailedPrecondition(f"{where} is no list of public keys: expected strings of PEM or base64")
    return [_public_key(text, f"{where}[{place}]") for place, text in enumerate(entries)]


def _public_key(text: str, where: str) -> Ed25519PublicKey:
    try:
        if "-----BEGIN" in text:
            key = load_pem_public_key(text.strip().encode())
        elif len(raw := base64.b64decode(text.strip(), validate=True)) == _KEY_BYTES:
            return Ed25519PublicKey.from_public_bytes(raw)
        else:
            key = load_der_public_key(raw)
    except (ValueError, binascii.Error, UnsupportedAlgorithm):
        raise FailedPrecondition(
            f"{where} is {text[:80]!r}: expected an ed25519 public key, as PEM, or as base64 of its DER or of its 32 "
            "bytes"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise FailedPrecondition(f"{where} is a {type(key).__name__}: only ed25519 keys are taken")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}; name a readable file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise FailedPrecondition(f"{path} has more than {_MAX_FILE_BYTES} bytes: name a file of keys")
    return data
