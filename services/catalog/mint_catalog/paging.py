"""Pages of a listing, all at one catalog revision.

A page token holds that revision and the last key seen below the listing's prefix, and is bound to what the listing is
over. It is no secret and grants nothing: the start key is built under the caller's own prefix again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from mint_catalog.keys import NUM_SHARDS
from mint_catalog.store import KeyValue, Store, prefix_end
from mint_catalog.tables import RecordCodec
from mint_core.errors import InvalidArgument, OutOfRange, Unavailable

__all__ = ["Page", "check_revision", "list_all", "list_page"]

R = TypeVar("R")

_DEFAULT_PAGE: Final = 50
_MAX_PAGE: Final = 1000
_MAX_EXAMINED: Final = 5000
_HEADER: Final = struct.Struct(">Q8s")


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """Some records of a listing."""

    records: list[R]
    next_page_token: str
    """Empty on the last page; a filtered page may be short and still have one."""

    catalog_revision: int
    """What all pages of this listing are read at."""


def check_revision(revision: int, minimum: int) -> None:
    """Raise ``Unavailable`` if a head just read is older than an answer may be."""
    if revision < minimum:
        raise Unavailable(
            f"the catalog is at revision {revision}, older than {minimum} that was asked for; retry, or drop "
            "min_catalog_revision if it comes from another installation"
        )


def _seal(bound: str, revision: int, position: str) -> bytes:
    """Ties a token to its listing; against mistakes, not against malice."""
    return hashlib.blake2b(f"{bound}\0{revision}\0{position}".encode(), digest_size=8).digest()


def _encode_token(bound: str, revision: int, position: str) -> str:
    raw = _HEADER.pack(revision, _seal(bound, revision, position)) + position.encode()
    return base64.urlsafe_b64encode(raw).decode()


def _decode_token(token: str, bound: str) -> tuple[int, str]:
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        revision, seal = _HEADER.unpack_from(raw)
        position = raw[_HEADER.size :].decode("ascii")
    except (binascii.Error, struct.error, UnicodeError):
        revision, seal, position = 0, b"", ""
    if not position or revision >= 2**63 or seal != _seal(bound, revision, position):
        raise InvalidArgument(
            "page_token does not belong to this listing: pass the last answer's next_page_token and leave parent, "
            "filter and order as they were",
            field="page_token",
        )
    return revision, position


def _page_size(page_size: int) -> int:
    if page_size < 0:
        raise InvalidArgument(f"page_size is {page_size}: it must not be negative; 0 means 50", field="page_size")
    return min(page_size or _DEFAULT_PAGE, _MAX_PAGE)


@dataclass(frozen=True, slots=True)
class _Stretch:
    values: tuple[KeyValue, ...]
    revision: int
    last: bool


async def _stretches(
    store: Store, prefix: bytes, position: str, *, revision: int, limit: int, sharded: bool
) -> AsyncIterator[_Stretch]:
    """Keys below ``prefix`` after ``position``, in order, in stretches of at most ``limit``.

    etcd counts the whole range asked for, however small the limit. So a sharded prefix is read one shard at first,
    then twice as many each time: a million policies cost one shard a page, three cost nine reads.
    """
    start = prefix + position.encode() + b"\0" if position else prefix
    end = prefix_end(prefix)
    if not sharded:
        more = True
        while more:
            result = await store.scan(start, end, limit=limit, revision=revision)
            revision, more = revision or result.revision, result.more
            yield _Stretch(result.values, revision, not more)
            start = result.values[-1].key + b"\0" if result.values else end
        return
    shard, span = int(position[:2], 16) if position else 0, 1
    while shard < NUM_SHARDS:
        until = min(shard + span, NUM_SHARDS)
        stop = end if until == NUM_SHARDS else prefix + f"{until:02x}".encode()
        result = await store.scan(start, stop, limit=limit, revision=revision)
        revision = revision or result.revision
        if result.more:
            start, span = result.values[-1].key + b"\0", 1
            shard = int(result.values[-1].key[len(prefix) :][:2], 16)
        else:
            start, shard, span = stop, until, 2 * span
        yield _Stretch(result.values, revision, shard >= NUM_SHARDS)


async def list_page(
    store: Store,
    prefix: bytes,
    codec: RecordCodec[R],
    *,
    bound: str,
    page_size: int,
    page_token: str,
    sharded: bool = False,
    keep: Callable[[R], bool] | None = None,
    min_revision: int = 0,
) -> Page[R]:
    """One page of the records below ``prefix`` that ``keep`` wants.

    Raises ``InvalidArgument`` for a bad size or token, ``RevisionCompacted`` for a token that is too old.
    """
    size = _page_size(page_size)
    revision, position = _decode_token(page_token, bound) if page_token else (0, "")
    records: list[R] = []
    num_examined = 0
    try:
        async for stretch in _stretches(store, prefix, position, revision=revision, limit=size, sharded=sharded):
            revision = stretch.revision
            check_revision(revision, min_revision)
            for index, kv in enumerate(stretch.values):
                position = kv.key[len(prefix) :].decode()
                record = codec.decode(kv)
                if keep is None or keep(record):
                    records.append(record)
                if len(records) == size and not (stretch.last and index == len(stretch.values) - 1):
                    return Page(records, _encode_token(bound, revision, position), revision)
            num_examined += len(stretch.values)
            if num_examined >= _MAX_EXAMINED and not stretch.last and position:
                return Page(records, _encode_token(bound, revision, position), revision)
    except OutOfRange as error:
        if error.reason != OutOfRange.reason:
            raise
        raise InvalidArgument("page_token names a revision that does not exist yet", field="page_token") from error
    return Page(records, "", revision)


async def list_all(
    store: Store, prefix: bytes, codec: RecordCodec[R], *, revision: int = 0, chunk: int = 1000
) -> tuple[list[R], int]:
    """Every record below an unsharded prefix at one revision, and that revision."""
    records: list[R] = []
    async for stretch in _stretches(store, prefix, "", revision=revision, limit=chunk, sharded=False):
        revision = stretch.revision
        records.extend(map(codec.decode, stretch.values))
    return records, revision
