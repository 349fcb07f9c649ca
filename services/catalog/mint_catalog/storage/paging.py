"""Pages of a listing, all at one catalog revision.

A page token holds that revision and the last key seen below the listing's prefix, and is bound to what the listing is
over. It is no secret and grants nothing: the start key is built under the caller's own prefix again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from mint_catalog.model.keys import NUM_SHARDS, SHARDED_FAMILIES, Keys
from mint_catalog.model.tables import RecordCodec
from mint_catalog.storage.store import KeyValue, Store, prefix_end
from mint_core.errors import InvalidArgument, OutOfRange, Unavailable

__all__ = [
    "Page",
    "Stretch",
    "check_revision",
    "list_all",
    "list_page",
    "page_of",
    "scan_family",
    "stretches_below",
    "tenant_stretches",
    "tenants_of",
]

R = TypeVar("R")

_DEFAULT_PAGE: Final = 50
_MAX_PAGE: Final = 1000
_MAX_EXAMINED: Final = 5000
_MAX_PAGE_BYTES: Final = 2 * 1024 * 1024
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
class Stretch:
    """Some keys of a scan, in order."""

    values: tuple[KeyValue, ...]
    revision: int
    """What the whole scan is read at."""
    last: bool
    """Whether nothing follows below this prefix."""


async def stretches_below(
    store: Store,
    prefix: bytes,
    position: str,
    *,
    revision: int,
    limit: int,
    sharded: bool,
    keys_only: bool = False,
) -> AsyncIterator[Stretch]:
    """Keys below ``prefix`` after ``position``, in order, in stretches of at most ``limit``.

    etcd counts the whole range asked for, however small the limit. So a sharded prefix is read one shard at first,
    then twice as many each time: a million policies cost one shard a page, three cost nine reads.
    """
    start = prefix + position.encode() + b"\0" if position else prefix
    end = prefix_end(prefix)
    if not sharded:
        more = True
        while more:
            result = await store.scan(start, end, limit=limit, revision=revision, keys_only=keys_only)
            revision, more = revision or result.revision, result.more
            yield Stretch(result.values, revision, not more)
            start = result.values[-1].key + b"\0" if result.values else end
        return
    shard, span = int(position[:2], 16) if position else 0, 1
    while shard < NUM_SHARDS:
        until = min(shard + span, NUM_SHARDS)
        stop = end if until == NUM_SHARDS else prefix + f"{until:02x}".encode()
        result = await store.scan(start, stop, limit=limit, revision=revision, keys_only=keys_only)
        revision = revision or result.revision
        if result.more:
            start, span = result.values[-1].key + b"\0", 1
            shard = int(result.values[-1].key[len(prefix) :][:2], 16)
        else:
            start, shard, span = stop, until, 2 * span
        yield Stretch(result.values, revision, shard >= NUM_SHARDS)


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
    """One page of the records below ``prefix`` that ``keep`` wants, in the store's order.

    Raises ``InvalidArgument`` for a bad size or token, ``RevisionCompacted`` for a token that is too old.
    """
    return await page_of(
        lambda position, revision, limit: stretches_below(
            store, prefix, position, revision=revision, limit=limit, sharded=sharded
        ),
        lambda key: key[len(prefix) :].decode(),
        codec,
        bound=bound,
        page_size=page_size,
        page_token=page_token,
        keep=keep,
        min_revision=min_revision,
    )


async def page_of(
    read: Callable[[str, int, int], AsyncIterator[Stretch]],
    position_of: Callable[[bytes], str],
    codec: RecordCodec[R],
    *,
    bound: str,
    page_size: int,
    page_token: str,
    keep: Callable[[R], bool] | None = None,
    narrow: Callable[[Sequence[R], int], Awaitable[Sequence[R]]] | None = None,
    size_of: Callable[[R], int] | None = None,
    least_read: int = 0,
    min_revision: int = 0,
) -> Page[R]:
    """One page of whatever ``read`` finds after a position at a revision (0: now), in stretches of about a limit.

    ``keep`` drops records by what they are, ``narrow`` by what else the store holds at the revision. With ``size_of``,
    a record's bytes in the answer, a page ends after some two megabytes of them. Where most are dropped, a small page
    is filled sooner with ``least_read`` records read at once.
    Raises ``InvalidArgument`` for a bad size or token, ``RevisionCompacted`` for a token that is too old.
    """
    size = _page_size(page_size)
    revision, position = _decode_token(page_token, bound) if page_token else (0, "")
    records: list[R] = []
    num_examined = num_bytes = 0
    try:
        async for stretch in read(position, revision, max(size, least_read)):
            revision = stretch.revision
            check_revision(revision, min_revision)
            found = [(kv.key, codec.decode(kv)) for kv in stretch.values]
            if keep is not None:
                found = [(key, record) for key, record in found if keep(record)]
            if narrow is not None and found:
                wanted = set(map(id, await narrow([record for _, record in found], revision)))
                found = [(key, record) for key, record in found if id(record) in wanted]
            room = size - len(records)
            if size_of is not None:
                for index, (_, record) in enumerate(found[:room]):
                    num_bytes += size_of(record)
                    if num_bytes >= _MAX_PAGE_BYTES:
                        room = index + 1
                        break
            records += [record for _, record in found[:room]]
            if len(found) > room or (len(found) == room and not stretch.last):
                # A stretch of which nothing more is wanted need not be read again.
                last_key = found[room - 1][0] if len(found) > room else stretch.values[-1].key
                return Page(records, _encode_token(bound, revision, position_of(last_key)), revision)
            if stretch.values:
                position = position_of(stretch.values[-1].key)
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
    async for stretch in stretches_below(store, prefix, "", revision=revision, limit=chunk, sharded=False):
        revision = stretch.revision
        records.extend(map(codec.decode, stretch.values))
    return records, revision


async def tenants_of(
    store: Store, keys: Keys, family: str, *, after: str = "", revision: int = 0
) -> AsyncGenerator[str, None]:
    """Every tenant that has a key in a family whose keys begin with the tenant, in the order of the keys.

    Jumps from tenant to tenant. Because etcd counts the whole range that it is asked for, the next tenant is looked
    for among those that share the longest prefix with the present one first, then further away.
    """
    prefix, known = keys.family(family), after
    start = prefix_end(keys.family(family, after)) if after else prefix
    while True:
        kv = None
        for length in range(len(known), -1, -1):
            end = prefix_end(prefix + known[:length].encode())
            found = (await store.scan(start, end, limit=1, revision=revision, keys_only=True)).values
            if found:
                kv = found[0]
                break
            start = end
        if kv is None:
            return
        known = keys.parts(kv.key)[1]
        yield known
        start = prefix_end(keys.family(family, known))


async def tenant_stretches(
    store: Store,
    keys: Keys,
    family: str,
    position: str,
    *,
    revision: int,
    limit: int,
    keys_only: bool = False,
) -> AsyncIterator[Stretch]:
    """All tenants' keys of a sharded family after ``position``, a key below the family's prefix."""
    revision = revision or (await store.get([keys.tick])).revision
    tenant, _, rest = position.partition("/")
    tenants = tenants_of(store, keys, family, after=tenant, revision=revision)
    upcoming: str | None = tenant or await anext(tenants, None)
    while upcoming is not None:
        below = stretches_below(
            store,
            keys.family(family, upcoming),
            rest,
            revision=revision,
            limit=limit,
            sharded=True,
            keys_only=keys_only,
        )
        async for stretch in below:
            if stretch.last:
                upcoming, rest = await anext(tenants, None), ""
                yield Stretch(stretch.values, revision, last=upcoming is None)
            else:
                yield stretch


async def scan_family(
    store: Store,
    keys: Keys,
    family: str,
    *,
    tenant: str | None = None,
    revision: int = 0,
    limit: int = 1000,
    keys_only: bool = False,
) -> AsyncIterator[Stretch]:
    """All keys of a family, or of one tenant in it, at one revision, at most ``limit`` of them at a time.

    A sharded family is read tenant by tenant and shard by shard. Raises ``RevisionCompacted``, ``Unavailable``.
    """
    revision = revision or (await store.get([keys.tick])).revision
    sharded = family in SHARDED_FAMILIES
    if tenant is None and sharded:
        stretches = tenant_stretches(store, keys, family, "", revision=revision, limit=limit, keys_only=keys_only)
    else:
        prefix = keys.family(family) if tenant is None else keys.family(family, tenant)
        stretches = stretches_below(
            store, prefix, "", revision=revision, limit=limit, sharded=sharded, keys_only=keys_only
        )
    async for stretch in stretches:
        yield stretch
