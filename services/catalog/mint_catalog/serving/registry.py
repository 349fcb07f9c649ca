"""Engine replicas: each registers itself and exists as long as its lease lives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from mint_catalog.model.checks import check_holder, check_range, check_text, not_found
from mint_catalog.model.records import EngineReplica, EngineReplicaState, Holder, now
from mint_catalog.model.tables import Tables
from mint_catalog.serving.residency import Wants, Wishes
from mint_catalog.storage.paging import list_all
from mint_catalog.storage.store import Compare, Delete, Field, KeyValue, LeaseGone, Put, Store
from mint_catalog.work.leases import lease_held, lease_lost
from mint_core.errors import Aborted, BaseModelMismatch, InvalidArgument
from mint_core.names import BaseModelName, EngineReplicaName

__all__ = ["DEFAULT_TTL_S", "Registry"]

DEFAULT_TTL_S = 10
_MAX_ATTEMPTS = 10


class Registry:
    """Register, renew, deregister, read and list engine replicas."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._wishes = Wishes(store, tables)

    async def register(self, wanted: EngineReplica, holder: str, ttl_s: int) -> int:
        """Register a replica; returns the token for renewals. The same holder again renews and updates its record.

        Raises ``InvalidArgument``, ``NotFound`` (base model), ``BaseModelMismatch``, ``LeaseHeld``.
        """
        check_holder(holder)
        _check(wanted)
        base_ref = self._tables.base_model(BaseModelName.parse(wanted.base_model, field="engine_replica.base_model"))
        ref, holder_ref = self._tables.engine(wanted.name), self._tables.engine_holder(wanted.name)
        for _ in range(_MAX_ATTEMPTS):
            base_kv, kv, holder_kv = (await self._store.get([base_ref.key, ref.key, holder_ref.key])).values
            if base_kv is None:
                raise not_found(wanted.base_model, "register the base model first")
            digest, actual = base_ref.codec.decode(base_kv).digest, wanted.numerics and wanted.numerics.base_digest
            if digest != actual:
                raise BaseModelMismatch(
                    f"{wanted.name} holds base digest {actual!r}, {wanted.base_model} is registered with {digest}: "
                    "load the registered bytes, or register these under another name",
                    metadata={"expected": digest, "actual": actual or ""},
                )
            compare_base = Compare(base_ref.key, Field.MOD, base_kv.mod_revision)
            if kv is None or holder_kv is None:
                token = await self._put_new(wanted, holder, ttl_s, compare_base)
                if token:
                    return token
                continue
            if holder_ref.codec.decode(holder_kv).holder != holder:
                raise lease_held(wanted.name)
            if await self._renew(kv, wanted):
                return kv.create_revision
        raise Aborted(f"{wanted.name} changed {_MAX_ATTEMPTS} times while it was registered; retry")

    async def _put_new(self, wanted: EngineReplica, holder: str, ttl_s: int, base: Compare) -> int:
        ref, holder_ref = self._tables.engine(wanted.name), self._tables.engine_holder(wanted.name)
        lease = await self._store.grant(ttl_s)
        applied = False
        try:
            result = await self._store.txn(
                [base, Compare(ref.key, Field.CREATE, 0), Compare(holder_ref.key, Field.CREATE, 0)],
                [
                    Put(ref.key, ref.codec.encode(replace(wanted, register_time=now())), lease),
                    Put(holder_ref.key, holder_ref.codec.encode(Holder(holder, ttl_s)), lease),
                ],
            )
            applied = result.succeeded
        except LeaseGone:
            return 0
        finally:
            if not applied:
                await self._store.revoke(lease)
        return result.revision if applied else 0

    async def _renew(self, kv: KeyValue, wanted: EngineReplica) -> bool:
        """Keep the lease alive and write the record if it changed; False when the registration is gone."""
        if not await self._store.keep_alive(kv.lease):
            return False
        codec = self._tables.codecs.engine
        known = codec.decode(kv)
        value = codec.encode(replace(wanted, register_time=known.register_time))
        if value == kv.value:
            return True
        with contextlib.suppress(LeaseGone):
            result = await self._store.txn(
                [Compare(kv.key, Field.CREATE, kv.create_revision)], [Put(kv.key, value, kv.lease)]
            )
            return result.succeeded
        return False

    async def renew(
        self, name: EngineReplicaName, token: int, state: EngineReplicaState, held_digests: Sequence[str] = ()
    ) -> Wants:
        """Renew a registration and set its state; UNSPECIFIED leaves it. Raises ``LeaseLost``.

        Returns what is wanted of the replica; ``held_digests`` are what of the last answer the engine holds.
        """
        kv = (await self._store.get([self._tables.engine(name).key])).values[0]
        if kv is None or kv.create_revision != token:
            raise lease_lost(name, token)
        known = self._tables.codecs.engine.decode(kv)
        wanted = known if state is EngineReplicaState.UNSPECIFIED else replace(known, state=state)
        if not await self._renew(kv, wanted):
            raise lease_lost(name, token)
        return await self._wishes.answer(kv, wanted, held_digests)

    async def deregister(self, name: EngineReplicaName, token: int) -> None:
        """End a registration; one that has ended is a no-op."""
        ref, holder_ref = self._tables.engine(name), self._tables.engine_holder(name)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None or kv.create_revision != token:
            return
        operations = [Delete(ref.key), Delete(holder_ref.key)]
        if (await self._store.txn([Compare(ref.key, Field.CREATE, token)], operations)).succeeded:
            await self._store.revoke(kv.lease)

    async def get(self, name: EngineReplicaName) -> EngineReplica:
        """Read one replica. Raises ``NotFound``."""
        kv = (await self._store.get([self._tables.engine(name).key])).values[0]
        if kv is None:
            raise not_found(name, "it never registered, or its lease ended")
        return self._tables.codecs.engine.decode(kv)

    async def list(self, base_model: BaseModelName | None) -> tuple[list[EngineReplica], int]:
        """The living replicas, of one base model if it is named, and the catalog revision they were read at."""
        prefix = self._tables.keys.family("engines")
        replicas, revision = await list_all(self._store, prefix, self._tables.codecs.engine)
        wanted = str(base_model) if base_model else None
        return [replica for replica in replicas if wanted in (None, replica.base_model)], revision


def _check(wanted: EngineReplica) -> None:
    for field in ("address", "loader_address"):
        check_text(getattr(wanted, field), field=f"engine_replica.{field}", max_chars=256)
    if not wanted.address:
        raise InvalidArgument(
            "engine_replica.address is missing: give host:port or unix:PATH", field="engine_replica.address"
        )
    for field in ("max_loaded_adapters", "num_slots", "max_lora_rank", "context_length", "max_running_requests"):
        check_range(getattr(wanted, field), field=f"engine_replica.{field}", least=0)
