"""The key-value contract that the domain is written against.

It is etcd's own model, cut down to what the catalog uses: one global revision that every transaction moves on by
one, keys that remember the revision of their creation and of their last change, transactions of compares and
operations, leases that delete their keys, and a watch over history. :class:`mint_catalog.storage.etcd.EtcdStore` is the
product's implementation.

What a caller may rely on, and what the cloud may do:

* ``txn`` is atomic and linearizable. When it raises :class:`~mint_core.errors.Unavailable` the outcome is unknown:
  the transaction may have been applied, or may be applied a little later.
* ``get`` and ``scan`` without a ``revision`` are linearizable; with one they read that snapshot, until it is
  compacted (:class:`~mint_core.errors.RevisionCompacted`). ``get_nearby`` is not linearizable: it reads what one
  member of the store knows, whole as of the revision that it names, which may lie any time back.
* A key put under a lease disappears some time after the lease's time to live has passed without a renewal, never
  before. A lease is no mutual exclusion; the create-revision of its key is.
* ``watch`` delivers every revision after its start exactly once, in order and whole, over any number of restarts of
  the store, or raises :class:`~mint_core.errors.RevisionCompacted`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

__all__ = [
    "Change",
    "Compare",
    "Delete",
    "DeleteRange",
    "Field",
    "KeyValue",
    "LeaseGone",
    "Operation",
    "Put",
    "ReadResult",
    "Revision",
    "ScanResult",
    "Store",
    "TxnResult",
    "prefix_end",
]


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it was at some revision."""

    key: bytes
    value: bytes
    create_revision: int
    """Revision of the transaction that created the key."""

    mod_revision: int
    """Revision of the transaction that last wrote it."""

    lease: int = 0
    """Id of the lease it is bound to; 0 for none."""


class Field(Enum):
    """What a compare looks at."""

    CREATE = "create_revision"
    MOD = "mod_revision"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds when the field of the key equals ``revision``; 0 means that the key is absent.

    With ``Field.VALUE`` it holds when the key is there and has this ``value``, however often it was written: what
    many writers touch without changing it does not make them conflict.
    """

    key: bytes
    field: Field
    revision: int = 0
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key, bound to ``lease`` if that is not 0."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key if it is there."""

    key: bytes


@dataclass(frozen=True, slots=True)
class DeleteRange:
    """Remove every key of ``[start, end)``."""

    start: bytes
    end: bytes


Operation: TypeAlias = Put | Delete | DeleteRange


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Values of some keys, in the order asked, all at one revision."""

    values: tuple[KeyValue | None, ...]
    revision: int
    """Revision of the store they were read at."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """A stretch of keys in order."""

    values: tuple[KeyValue, ...]
    more: bool
    """Whether the range holds keys beyond the limit."""

    revision: int
    """Revision of the store they were read at."""


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Outcome of a transaction."""

    succeeded: bool
    """Whether all compares held and the operations were applied."""

    revision: int
    """Revision of the store after it; when it succeeded and wrote, the revision of its writes."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change; ``value`` is empty and ``deleted`` set when the key went away."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Revision:
    """All changes of one revision of the store that lie in the watched range."""

    revision: int
    changes: tuple[Change, ...]


class LeaseGone(Exception):
    """The lease a key should be bound to has ended; never leaves this room."""


class Store(Protocol):
    """A linearizable key-value store with history."""

    @property
    def seen_revision(self) -> int:
        """The highest revision that an answer of the store to this process was of."""
        ...

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        """Read keys at one revision: the head (0) or an older one. Raises ``RevisionCompacted``, ``Unavailable``."""
        ...

    async def get_nearby(self, keys: Sequence[bytes]) -> ReadResult:
        """Read keys as one member knows them, however far behind it is. Raises ``Unavailable``."""
        ...

    async def scan(
        self, start: bytes, end: bytes, *, limit: int, revision: int = 0, keys_only: bool = False
    ) -> ScanResult:
        """Read at most ``limit`` keys of ``[start, end)`` in order; with ``keys_only`` the values are empty.

        Raises ``RevisionCompacted``, ``Unavailable``.
        """
        ...

    async def scan_each(
        self, ranges: Sequence[tuple[bytes, bytes]], *, limit: int, revision: int = 0
    ) -> list[ScanResult]:
        """Read at most ``limit`` keys of each of up to 128 ranges, all at one revision.

        Raises ``RevisionCompacted``, ``Unavailable``.
        """
        ...

    async def count(self, start: bytes, end: bytes, *, revision: int = 0) -> int:
        """Number of keys in ``[start, end)``, without reading them. Raises ``RevisionCompacted``, ``Unavailable``."""
        ...

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        """Apply all operations if all compares hold. At most 128 of each; a key is written once.

        Raises ``LeaseGone``, ``ResourceExhausted`` (quota), ``Unavailable`` (outcome unknown).
        """
        ...

    async def grant(self, ttl_s: int) -> int:
        """Open a lease and return its id. Raises ``Unavailable``."""
        ...

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease for its time to live; False when it has ended. Raises ``Unavailable``."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that has ended is a no-op. Raises ``Unavailable``."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget history below ``revision``. Raises ``Unavailable``."""
        ...

    def watch(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
        """Every change of ``[start, end)`` after a revision, for ever. Raises ``RevisionCompacted``."""
        ...


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that start with ``prefix``, which must be ASCII."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
