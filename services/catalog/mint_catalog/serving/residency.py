"""Promotions that wait until engines hold the adapter: wishes, and what engine replicas say they hold.

Whoever waits writes a wish, under a lease that lives as long as the wait:

    wishes/{base}/{digest hex}/{nonce}                 what is wanted: all that a loader needs, and by how many
    holdings/{base}/{digest hex}/{nonce}/{engine}      a replica that holds it; the value is its registration's token

A replica learns with each renewal of its registration what is wanted of its base, and tells with the next one what
of it it holds. Holdings lie under the wish's lease: when the wait is over, or the catalog that waited died, nothing of
it is left. A holding counts while the registration that told of it lives and is READY.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.checks import check_range
from mint_catalog.model.records import AdapterSignature, BlobRef, EngineReplica, EngineReplicaState, Policy, Revision
from mint_catalog.model.tables import Tables
from mint_catalog.storage.paging import list_all
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, LeaseGone, Operation, Put, Store, prefix_end
from mint_core import calls
from mint_core.clock import boottime_s, monotonic_s
from mint_core.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from mint_core.names import BaseModelName, EngineReplicaName
from mint_core.placement import placement_order

__all__ = ["DEFAULT_TIMEOUT_S", "Residency", "Wanted", "Wants", "Wishes"]

DEFAULT_TIMEOUT_S: Final = 60.0
_MAX_TIMEOUT_S: Final = 3600.0
_MAX_REPLICAS: Final = 1000
_MAX_WAITS: Final = 256
_MAX_WISHES: Final = 1000
_MAX_KEYS: Final = 100
_WISH_TTL_S: Final = 10
_LOOK_S: Final = 1.0
_ANSWER_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter whose residency somebody waits for."""

    tenant: str
    """tenants/{tenant}"""
    blob: BlobRef
    object_key: str
    base_digest: str
    num_replicas: int
    signature: AdapterSignature | None = None

    def encode(self) -> bytes:
        """What a wish's key holds."""
        signature = [self.signature.key_id, self.signature.value.hex()] if self.signature else []
        return json.dumps(
            [
                self.tenant,
                self.blob.digest,
                self.blob.size_bytes,
                self.object_key,
                self.base_digest,
                self.num_replicas,
                *signature,
            ]
        ).encode()

    @classmethod
    def decode(cls, value: bytes) -> Wanted:
        tenant, digest, size_bytes, object_key, base_digest, num_replicas, *signed = json.loads(value)
        signature = AdapterSignature(signed[0], bytes.fromhex(signed[1])) if signed else None
        return cls(tenant, BlobRef(digest, size_bytes), object_key, base_digest, num_replicas, signature)


@dataclass(frozen=True, slots=True)
class Wants:
    """What is wanted of a replica."""

    digests: list[str]
    """All that somebody waits for; it tells which of these it holds."""
    to_load: list[Wanted]
    """Those that its node should load."""


class Wishes:
    """The replicas' side: what is wanted of them, and what of it they hold."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._keys = tables.keys
        self._replicas: list[EngineReplica] = []
        self._looked_at_s = float("-inf")

    async def answer(self, registration: KeyValue, replica: EngineReplica, held_digests: Sequence[str]) -> Wants:
        """Note what a replica holds of what is wanted of its base; returns what is wanted."""
        start = self._keys.wishes(BaseModelName.parse(replica.base_model))
        wishes = (await self._store.scan(start, prefix_end(start), limit=_MAX_WISHES)).values
        told = {kv.key: kv.value for kv in await _get(self._store, [self._holding(wish, replica) for wish in wishes])}
        token = str(registration.create_revision).encode()
        all_wanted: dict[str, Wanted] = {}
        for wish in wishes:
            wanted = Wanted.decode(wish.value)
            known = all_wanted.setdefault(wanted.blob.digest, wanted)
            if known.num_replicas < wanted.num_replicas:
                all_wanted[wanted.blob.digest] = wanted
            key = self._holding(wish, replica)
            operation: Operation | None = None
            if wanted.blob.digest in held_digests:
                operation = Put(key, token, wish.lease) if told.get(key) != token else None
            elif key in told:
                operation = Delete(key)
            if operation is not None:
                alive = [
                    Compare(wish.key, Field.CREATE, wish.create_revision),
                    Compare(registration.key, Field.CREATE, registration.create_revision),
                ]
                with contextlib.suppress(LeaseGone):  # nobody waits any more
                    await self._store.txn(alive, [operation])
        to_load = [
            wanted
            for digest, wanted in all_wanted.items()
            if digest not in held_digests and await self._should_load(replica, wanted)
        ]
        return Wants([*all_wanted], to_load)

    async def _should_load(self, replica: EngineReplica, wanted: Wanted) -> bool:
        """Whether this replica is one of the ``num_replicas`` chosen, alike by every catalog: by a hash of both."""
        if monotonic_s() - self._looked_at_s > _LOOK_S:
            engines = self._keys.family("engines")
            self._replicas, _ = await list_all(self._store, engines, self._tables.codecs.engine)
            self._looked_at_s = monotonic_s()
        able = placement_order(
            wanted.blob.digest,
            (
                str(each.name)
                for each in self._replicas
                if each.loader_address and _serves(each, replica.base_model, wanted.base_digest)
            ),
        )
        return str(replica.name) in able[: wanted.num_replicas]

    def _holding(self, wish: KeyValue, replica: EngineReplica) -> bytes:
        return self._keys.holding(wish.key, replica.name)


async def _get(store: Store, keys: list[bytes]) -> list[KeyValue]:
    """Those of any number of keys that are there."""
    found: list[KeyValue] = []
    for start in range(0, len(keys), _MAX_KEYS):
        found += [kv for kv in (await store.get(keys[start : start + _MAX_KEYS])).values if kv is not None]
    return found


class Residency:
    """The promotions' side: waits until enough replicas hold an adapter."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._changed = Signal()
        self._num_waits = 0
        self._closed = False

    def look(self) -> None:
        """Somebody said what it holds: look at once. Everything is looked at each second in any case."""
        self._changed.notify()

    def close(self) -> None:
        """The process is about to stop: whoever waits is told to ask again."""
        self._closed = True
        self._changed.notify()

    def check(self, num_replicas: int, timeout_s: float) -> None:
        """Raise ``InvalidArgument`` unless these bounds of a wait make sense."""
        check_range(num_replicas, field="min_resident_replicas", least=0, most=_MAX_REPLICAS)
        check_range(
            timeout_s, field="residency_timeout", least=0, most=_MAX_TIMEOUT_S, hint="seconds; 0 means 60 seconds"
        )

    async def wait(self, head: Policy, revision: Revision, num_replicas: int, timeout_s: float) -> None:
        """Return when ``num_replicas`` READY replicas of the policy's base hold the revision's adapter.

        Raises ``DeadlineExceeded`` after ``timeout_s`` or shortly before the call's own deadline,
        ``ResourceExhausted`` when too many wait, ``Unavailable``.
        """
        allowed_s = timeout_s or DEFAULT_TIMEOUT_S
        remaining_s = calls.remaining_s()
        if remaining_s is not None:
            allowed_s = max(0.0, min(allowed_s, remaining_s - min(_ANSWER_S, remaining_s / 4)))
        until_s = monotonic_s() + allowed_s
        blob = revision.blob or BlobRef()
        wanted = Wanted(
            f"tenants/{head.name.tenant}",
            blob,
            revision.object_key,
            revision.base_digest,
            num_replicas,
            revision.signature,
        )
        async with self._wish(head, wanted) as wish:
            num_holding = 0
            while True:
                seen = self._changed.count
                num_holding = await self._num_holding(wish, head, revision)
                left_s = until_s - monotonic_s()
                if num_holding >= num_replicas:
                    return
                if self._closed:
                    raise Unavailable("the catalog is stopping; nothing was changed, promote again", retry_after_s=0.5)
                if left_s <= 0:
                    raise DeadlineExceeded(
                        f"{num_holding} READY engine replicas of {head.base_model} hold {revision.name} after "
                        f"{allowed_s:.3g} s, wanted are {num_replicas}; nothing was changed. Have it loaded there, "
                        "give it more time (residency_timeout), or wait for fewer",
                        metadata={"resource": str(revision.name), "num_holding": str(num_holding)},
                    )
                await self._changed.wait(seen, timeout_s=min(left_s, _LOOK_S))
                await wish.renew()

    @contextlib.asynccontextmanager
    async def _wish(self, head: Policy, wanted: Wanted) -> AsyncIterator[_Wish]:
        if self._num_waits >= _MAX_WAITS:
            raise ResourceExhausted(
                f"{_MAX_WAITS} promotions wait for residency in this catalog, the most it lets; retry later",
                metadata={"resource": str(head.name)},
                retry_after_s=1.0,
            )
        self._num_waits += 1
        base = BaseModelName.parse(head.base_model)
        key = self._tables.keys.wish(base, wanted.blob.digest, secrets.token_hex(8))
        wish = _Wish(self._store, key, wanted)
        try:
            await wish.renew()
            yield wish
        finally:
            self._num_waits -= 1
            with contextlib.suppress(Unavailable):  # else its lease ends by itself
                await asyncio.shield(wish.withdraw())

    async def _num_holding(self, wish: _Wish, head: Policy, revision: Revision) -> int:
        holdings = self._tables.keys.holdings(wish.key)
        told = (await self._store.scan(holdings, prefix_end(holdings), limit=_MAX_REPLICAS)).values
        tokens = {
            self._tables.keys.engine(EngineReplicaName(self._tables.keys.parts(kv.key)[-1])): int(kv.value)
            for kv in told
        }
        num_holding = 0
        for kv in await _get(self._store, [*tokens]):
            replica = self._tables.codecs.engine.decode(kv)
            num_holding += kv.create_revision == tokens[kv.key] and _serves(
                replica, head.base_model, revision.base_digest
            )
        return num_holding


def _serves(replica: EngineReplica, base_model: str, base_digest: str) -> bool:
    """Whether a replica takes requests for adapters of a base."""
    return (
        replica.state is EngineReplicaState.READY
        and replica.base_model == base_model
        and replica.numerics is not None
        and replica.numerics.base_digest == base_digest
    )


class _Wish:
    """One wish's key and the lease below it."""

    def __init__(self, store: Store, key: bytes, wanted: Wanted) -> None:
        self._store = store
        self.key = key
        self._value = wanted.encode()
        self._lease = 0
        self._renewed_at_s = 0.0

    async def renew(self) -> None:
        """Write the wish, or keep it alive; one whose lease has ended is written again."""
        if self._lease and boottime_s() - self._renewed_at_s < _WISH_TTL_S / 4:
            return
        if not self._lease or not await self._store.keep_alive(self._lease):
            self._lease = await self._store.grant(_WISH_TTL_S)
            with contextlib.suppress(LeaseGone):
                await self._store.txn([], [Put(self.key, self._value, self._lease)])
        self._renewed_at_s = boottime_s()

    async def withdraw(self) -> None:
        if self._lease:
            await self._store.revoke(self._lease)
