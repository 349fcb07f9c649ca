"""The pins of one node in a file, so that a restarted loader holds what it held, also while the catalog is away."""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mint_core.errors import FailedPrecondition, MintError, ResourceExhausted, Unavailable
from mint_core.files import atomic_file
from mint_core.names import AliasName
from mint_core.signing import Signature
from mint_loader.model import AdapterRef, Tier

__all__ = ["Pin", "PinStore"]

_VERSION = 1


@dataclass(slots=True)
class Pin:
    """The wish that an alias's adapters stay here. Times are seconds since the epoch."""

    alias: AliasName
    tier: Tier
    start_s: float | None
    """None means at once."""
    end_s: float | None
    """None means until it is unpinned."""
    created_s: float
    principal: str
    refs: tuple[AdapterRef, ...] = ()
    """What the alias points at, as last heard."""
    error: str = field(default="", compare=False)
    """``REASON: sentence`` of what went wrong last; not kept."""


class PinStore:
    """One JSON file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Pin]:
        """The pins, none if there is no file. Raises :class:`FailedPrecondition` for a file that makes no sense."""
        try:
            return _decode_document(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FailedPrecondition(f"{self.path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, MintError) as error:
            raise FailedPrecondition(
                f"{self.path} does not hold this node's pins ({error}); remove it and pin again"
            ) from None

    def write(self, pins: Iterable[Pin]) -> None:
        """Keep these. Raises :class:`ResourceExhausted` for a full disk, :class:`Unavailable` for one that fails."""
        document = {"version": _VERSION, "pins": [_encode(pin) for pin in pins]}
        try:
            with atomic_file(self.path) as file:
                file.write(json.dumps(document, indent=1).encode())
        except OSError as error:
            sentence = f"the pins cannot be written to {self.path}: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(f"{sentence}; make room on that disk", retry_after_s=5.0) from None
            raise Unavailable(f"{sentence}; the node's disk fails") from None


def _encode(pin: Pin) -> dict[str, Any]:
    return {
        "alias": str(pin.alias),
        "tier": pin.tier.name,
        "start_s": pin.start_s,
        "end_s": pin.end_s,
        "created_s": pin.created_s,
        "principal": pin.principal,
        "refs": [
            {
                "digest": ref.digest,
                "size_bytes": ref.size_bytes,
                "object_key": ref.object_key,
                "base_digest": ref.base_digest,
                "signature": ref.signature and [ref.signature.key_id, base64.b64encode(ref.signature.value).decode()],
            }
            for ref in pin.refs
        ],
    }


def _decode_document(document: dict[str, Any]) -> list[Pin]:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']!r}, expected {_VERSION}")
    return [_decode(each) for each in document["pins"]]


def _decode(pin: dict[str, Any]) -> Pin:
    alias = AliasName.parse(pin["alias"], field="alias")
    refs = tuple(
        AdapterRef.checked(
            tenant=f"tenants/{alias.tenant}",
            digest=ref["digest"],
            size_bytes=ref["size_bytes"],
            object_key=ref["object_key"],
            base_digest=ref["base_digest"],
            signature=ref["signature"]
            and Signature(ref["signature"][0], base64.b64decode(ref["signature"][1], validate=True)),
        )
        for ref in pin["refs"]
    )
    return Pin(alias, Tier[pin["tier"]], pin["start_s"], pin["end_s"], pin["created_s"], pin["principal"], refs)
