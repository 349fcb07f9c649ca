from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from mint_core.errors import FailedPrecondition, SignatureInvalid, SignatureRequired
from mint_core.signing import Signer, TrustedKeys, signed_bytes

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DIGEST, BASE = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
SIGNER = Signer(KEY)
SIGNATURE = SIGNER.sign("acme", DIGEST, BASE)
TRUSTED = TrustedKeys({"acme": [OTHER.public_key(), KEY.public_key()], "umbrella": [OTHER.public_key()], "shut": []})


def private_file(folder: Path, key: Ed25519PrivateKey = KEY) -> Path:
    path = folder / "key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def test_what_is_signed_names_tenant_adapter_and_base() -> None:
    assert signed_bytes("acme", DIGEST, BASE) == f"mint-adapter-v1\nacme\n{DIGEST}\n{BASE}\n".encode()


def test_a_trusted_signature_is_accepted_and_always_the_same() -> None:
    TRUSTED.check("acme", DIGEST, BASE, SIGNATURE)
    assert Signer(KEY).sign("acme", DIGEST, BASE) == SIGNATURE
    assert len(SIGNATURE.value) == 64


def test_a_tenant_that_is_not_listed_needs_no_signature() -> None:
    TRUSTED.check("modest", DIGEST, BASE, None)
    TRUSTED.check("modest", DIGEST, BASE, replace(SIGNATURE, value=b"no signature at all"))
    assert [TRUSTED.demands(tenant) for tenant in ("acme", "shut", "modest")] == [True, True, False]


def test_an_unsigned_adapter_of_a_listed_tenant_is_refused() -> None:
    with pytest.raises(SignatureRequired, match="acme") as caught:
        TRUSTED.check("acme", DIGEST, BASE, None)
    assert caught.value.metadata == {"digest": DIGEST, "tenant": "acme"}


@pytest.mark.parametrize(
    ("tenant", "digest", "base"),
    [
        ("acme", "sha256:" + "ac" * 32, BASE),
        ("acme", DIGEST, "sha256:" + "ce" * 32),
        ("umbrella", DIGEST, BASE),
        ("shut", DIGEST, BASE),
    ],
)
def test_a_signature_holds_for_nothing_else(tenant: str, digest: str, base: str) -> None:
    with pytest.raises(SignatureInvalid):
        TRUSTED.check(tenant, digest, base, SIGNATURE)


@pytest.mark.parametrize("value", [b"", b"\0" * 64, SIGNATURE.value[:-1], SIGNATURE.value + b"\0"])
def test_bytes_that_are_no_signature_are_refused(value: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        TRUSTED.check("acme", DIGEST, BASE, replace(SIGNATURE, value=value))


def test_each_flipped_bit_of_a_signature_is_seen() -> None:
    for bit in range(0, 512, 7):
        value = bytearray(SIGNATURE.value)
        value[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureInvalid):
            TRUSTED.check("acme", DIGEST, BASE, replace(SIGNATURE, value=bytes(value)))


def test_a_key_that_claims_to_be_a_trusted_one_does_not_become_it() -> None:
    forged = replace(Signer(OTHER).sign("acme", DIGEST, BASE), key_id=SIGNER.key_id)
    with pytest.raises(SignatureInvalid):
        TrustedKeys({"acme": [KEY.public_key()]}).check("acme", DIGEST, BASE, forged)


def test_keys_are_read_in_every_form_that_operators_have(tmp_path: Path) -> None:
    public = KEY.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    raw = base64.b64encode(public.public_bytes_raw()).decode()
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[tenants]\nacme = ["""{pem}"""]\n"a.b" = ["{raw}"]\numbrella = ["{SIGNER.public_key}"]\n"*" = []\n'
    )
    trusted = TrustedKeys.from_file(path)
    for tenant in ("acme", "a.b", "umbrella"):
        trusted.check(tenant, DIGEST, BASE, SIGNER.sign(tenant, DIGEST, BASE))
    with pytest.raises(SignatureInvalid, match="trusts none"):
        trusted.check("modest", DIGEST, BASE, SIGNER.sign("modest", DIGEST, BASE))


def test_a_signer_is_read_from_a_file(tmp_path: Path) -> None:
    signer = Signer.from_file(private_file(tmp_path))
    assert (signer.key_id, signer.sign("acme", DIGEST, BASE)) == (SIGNER.key_id, SIGNATURE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "tenants = 3\n",
        'acme = ["x"]\n',
        '[tenants]\nacme = "x"\n',
        "[tenants]\nacme = [3]\n",
        '[tenants]\nacme = ["x"]\n',
        '[tenants]\nacme = ["AAAA"]\n',
        '[tenants]\n"A B" = []\n',
        "[tenants]\n[more]\n",
    ],
)
def test_a_file_of_keys_that_makes_no_sense_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(FailedPrecondition, match=r"keys\.toml"):
        TrustedKeys.from_file(path)


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    foreign = generate_private_key(SECP256R1())
    path = tmp_path / "keys.toml"
    pem = foreign.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    path.write_text(f'[tenants]\nacme = ["""{pem}"""]\n')
    with pytest.raises(FailedPrecondition, match="ed25519"):
        TrustedKeys.from_file(path)
    path.write_bytes(foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(FailedPrecondition, match="ed25519"):
        Signer.from_file(path)


@pytest.mark.parametrize("form", ["absent", "text", "encrypted"])
def test_a_private_key_that_cannot_be_used_is_refused_without_its_content(tmp_path: Path, form: str) -> None:
    path = tmp_path / "key.pem"
    if form == "text":
        path.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    elif form == "encrypted":
        path.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(FailedPrecondition, match=r"key\.pem") as caught:
        Signer.from_file(path)
    assert "c2VjcmV0" not in str(caught.value)
