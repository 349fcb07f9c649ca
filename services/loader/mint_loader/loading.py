"""The way of one adapter: object store → node disk → engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mint_core import clock, failpoints, log
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_loader.cache import DiskCache, Workspace
from mint_loader.engine_view import EngineView
from mint_loader.gate import FairGate, GateLimits
from mint_loader.model import AdapterRef, AdapterWriter, BlobSource, Engine, EngineLoad, Loaded, SignatureCheck, Tier
from mint_loader.scheduler import Flight, SharedFlights
from mint_loader.waits import Waits

__all__ = ["Limits", "Loading", "LoadingStatus"]

FETCHED = failpoints.declare("loader.fetched", "the blob's bytes are on the node's disk, not yet checked as an adapter")
LOADING = failpoints.declare("loader.loading", "an adapter is on the node's disk, the engine was not asked yet")
LOADED = failpoints.declare("loader.loaded", "the engine holds the adapter, nobody was told yet")

_COST_BYTES = 32 * 1024 * 1024
_MAX_RETRY_S = 30.0
_LATELY_S = 2.0
_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the work; times in seconds."""

    max_fetches: int = 4
    """Adapters read from the object store at one time."""
    max_loads: int = 2
    """Adapters brought into the engine at one time."""
    max_queued: int = 4096
    """Adapters that may wait for each of the two."""
    max_queued_per_tenant: int = 2048
    """And as many of one tenant."""
    max_waiting: int = 16_384
    """Callers that may wait at one time, those of one adapter counted singly."""
    fetch_timeout_s: float = 300.0
    """One fetch, with the wait for room on the disk."""
    slow_fetch_s: float = 5.0
    """A fetch that takes longer lends its place to the next one."""
    load_timeout_s: float = 60.0
    """One load into the engine."""
    engine_timeout_s: float = 5.0
    """One question to the engine."""
    burst: float = 4.0
    """Small adapters that a tenant which asked for little lately may have loaded ahead of the others'."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of a tenant; 1 where nothing is said."""


@dataclass(frozen=True, slots=True)
class LoadingStatus:
    """Counters since the start."""

    num_loading: int
    num_hits: int
    num_misses: int
    bytes_fetched: int
    num_loads: int
    """Adapters that the engine loaded for us."""
    num_resident: int
    """Asked for, and the engine had them."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    found_at: Tier
    fetch_ms: float = 0.0
    bytes_fetched: int = 0


class Loading:
    """Brings adapters to a tier. Callers of one digest share one fetch and one load."""

    def __init__(
        self,
        cache: DiskCache,
        store: BlobSource,
        engine: Engine,
        write_adapter: AdapterWriter,
        limits: Limits,
        *,
        check_signature: SignatureCheck | None = None,
    ) -> None:
        self._cache = cache
        self._store = store
        self._engine = engine
        self._write_adapter = write_adapter
        self._limits = limits
        self._fetches: SharedFlights[_Fetch] = SharedFlights()
        self._loads: SharedFlights[Loaded] = SharedFlights()
        self._check_signature = check_signature
        shared = GateLimits(
            num_places=limits.max_fetches,
            max_queued=limits.max_queued,
            max_queued_per_tenant=limits.max_queued_per_tenant,
            slow_after_s=limits.slow_fetch_s,
            burst=limits.burst,
            weights=limits.weights,
        )
        self.fetch_gate = FairGate(shared, what="fetches")
        # As many fetched as loaded at one time, and a few on the disk between.
        way = dataclasses.replace(shared, num_places=limits.max_fetches + 2 * limits.max_loads)
        self.way_gate = FairGate(way, what="loads")
        # One engine loads one at a time: a second place lent would only move the queue into it, out of order.
        loads = dataclasses.replace(shared, num_places=limits.max_loads, slow_after_s=None)
        self.load_gate = FairGate(loads, what="loads into the engine")
        self.view = EngineView(engine, timeout_s=limits.engine_timeout_s)
        self.waits = Waits()
        self._num_waiting = 0
        self._num_loads = 0
        self._num_resident = 0
        self._num_hits = 0
        self._num_misses = 0
        self._bytes_fetched = 0

    async def close(self) -> None:
        """Give up what is under way."""
        await self._loads.close()
        await self._fetches.close()
        await self.view.close()

    @property
    def status(self) -> LoadingStatus:
        return LoadingStatus(
            num_loading=self._fetches.num_moving + self._loads.num_moving,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            bytes_fetched=self._bytes_fetched,
            num_loads=self._num_loads,
            num_resident=self._num_resident,
        )

    async def ensure(
        self,
        ref: AdapterRef,
        tier: Tier,
        *,
        priority: int = 0,
        timeout_s: float,
        pinned: bool = False,
        when_moving: Callable[[], None] | None = None,
    ) -> Loaded:
        """Return when the adapter is at ``tier`` or nearer, or raise why it cannot be.

        ``pinned`` has the engine keep it. ``when_moving`` is called once it left the queues. Raises, beyond what store
        and engine raise: :class:`SignatureRequired` or :class:`SignatureInvalid` for what the node's operator does not
        trust, :class:`DeadlineExceeded` after ``timeout_s``, :class:`Unavailable` at once if the queues are too long
        for that, :class:`ResourceExhausted` for a full queue or an adapter that no disk cache or engine of this size
        can hold, :class:`BlobCorrupt` if the stored bytes lost their digest.
        """
        if self._check_signature is not None:
            self._check_signature(ref.tenant, ref.digest, ref.base_digest, ref.signature)
        self._admit(ref, tier, priority, timeout_s, pinned)
        begun_s = clock.monotonic_s()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                loaded = await self._ensure(ref, tier, priority, pinned, when_moving)
        except TimeoutError:
            self.waits.failed(ref.tenant)
            raise DeadlineExceeded(
                f"adapter {ref.digest} did not reach tier {tier.name} within {timeout_s:.1f} s; retry",
                metadata={"digest": ref.digest},
            ) from None
        except ResourceExhausted:
            self.waits.refused(ref.tenant)
            raise
        except MintError:
            self.waits.failed(ref.tenant)
            raise
        finally:
            self._num_waiting -= 1
        if loaded.found_at < tier:
            self.waits.done(ref.tenant, clock.monotonic_s() - begun_s)
        return loaded

    def _admit(self, ref: AdapterRef, tier: Tier, priority: int, timeout_s: float, pinned: bool) -> None:
        """Refuse now what would only be given up later."""
        if self._num_waiting >= self._limits.max_waiting:
            self.waits.refused(ref.tenant)
            raise ResourceExhausted(
                f"{self._num_waiting} callers wait for this loader, which is the limit; retry later", retry_after_s=1.0
            )
        if (ref, tier, pinned) in self._loads:
            return
        if tier > Tier.DISK:
            wait_s = self.way_gate.expected_wait_s(ref.tenant, priority)
        elif ref.digest in self._cache or ref.digest in self._fetches:
            return
        else:
            wait_s = self.fetch_gate.expected_wait_s(ref.tenant, priority)
        if wait_s > timeout_s:
            self.waits.refused(ref.tenant)
            raise Unavailable(
                f"adapter {ref.digest} would wait about {wait_s:.1f} s for its turn, the caller gives it "
                f"{timeout_s:.1f} s; retry later or at another replica",
                metadata={"digest": ref.digest, "expected_wait_s": f"{wait_s:.1f}"},
                retry_after_s=min(max(1.0, wait_s - timeout_s), _MAX_RETRY_S),
            )

    async def _ensure(
        self, ref: AdapterRef, tier: Tier, priority: int, pinned: bool, when_moving: Callable[[], None] | None
    ) -> Loaded:
        if tier <= Tier.DISK:
            fetch = await self._fetched(ref, priority=priority, when_moving=when_moving)
            return Loaded(fetch.found_at, fetch.fetch_ms, 0.0, fetch.bytes_fetched)

        async def work(flight: Flight[Loaded]) -> Loaded:
            return await self._load(flight, ref, into_slot=tier is Tier.SLOT, pinned=pinned)

        return await self._loads.run(
            (ref, tier, pinned), work, tenant=ref.tenant, priority=priority, when_moving=when_moving
        )

    async def _load(self, flight: Flight[Loaded], ref: AdapterRef, *, into_slot: bool, pinned: bool) -> Loaded:
        if ref.digest not in self._cache:
            # Before bytes move: does the engine want them? That it does is told well enough by what it held a moment
            # ago, that it does not it must say now.
            resident = self.view.lately(_LATELY_S)
            if resident is None or resident.base_digest != ref.base_digest or ref.digest in resident.digests:
                resident = await self.view.resident()
            if resident.base_digest != ref.base_digest:
                raise BaseModelMismatch(
                    f"adapter {ref.digest} fits base {ref.base_digest}; the engine here holds {resident.base_digest}",
                    metadata={"expected": ref.base_digest, "actual": resident.base_digest},
                )
            if ref.digest in resident.digests and not into_slot and (not pinned or ref.digest in resident.pinned):
                self._num_resident += 1
                return Loaded(Tier.HOST)
        # Fetches do not run ahead of the loads they are for: what is fetched first would only wait on the disk, and
        # take the store and the disk from those whose turn comes. In the cache it is pinned before it is there, so the
        # next fetch cannot evict it before this load had its turn.
        async with flight.turn(self.way_gate, cost=_cost(ref)):
            with self._cache.pinned(ref.digest):
                return await self._bring(flight, ref, into_slot=into_slot, pinned=pinned)

    async def _bring(self, flight: Flight[Loaded], ref: AdapterRef, *, into_slot: bool, pinned: bool) -> Loaded:
        priority = max(flight.claims.values())
        fetch = await self._fetched(ref, priority=priority, parent=flight)
        load = await self._into_engine(flight, ref, into_slot=into_slot, pinned=pinned)
        if load is None:
            # The folder did not survive its checks: once more, with fresh bytes.
            fetch = await self._fetched(ref, priority=priority, parent=flight)
            load = await self._into_engine(flight, ref, into_slot=into_slot, pinned=pinned, is_last=True)
        assert load is not None
        await LOADED.reached()
        self._num_resident += load.already_resident
        self._num_loads += not load.already_resident
        found_at = Tier.HOST if load.already_resident else fetch.found_at
        return Loaded(found_at, fetch.fetch_ms, load.load_ms, fetch.bytes_fetched)

    async def _into_engine(
        self, flight: Flight[Loaded], ref: AdapterRef, *, into_slot: bool, pinned: bool, is_last: bool = False
    ) -> EngineLoad | None:
        """Have the engine load from the disk cache; None if the cached bytes turned out to be bad and are gone."""
        async with flight.turn(self.load_gate, cost=_cost(ref)), self._cache.using(ref.digest) as folder:
            if folder is None:
                if is_last:
                    raise BlobCorrupt(
                        f"adapter {ref.digest} went bad on this node's disk right after its fetch; replace the disk",
                        metadata={"digest": ref.digest},
                    )
                return None
            flight.mark_moving()
            flight.is_uninterruptible = True
            await LOADING.reached()
            try:
                return await self._engine.load(
                    ref.digest,
                    folder.name,
                    into_slot=into_slot,
                    pinned=pinned,
                    timeout_s=self._limits.load_timeout_s,
                )
            except DeadlineExceeded:
                raise Unavailable(
                    f"the engine did not load adapter {ref.digest} within {self._limits.load_timeout_s:.0f} s",
                    metadata={"digest": ref.digest},
                ) from None
            except (InvalidArgument, NotFound) as refused:
                # The engine reads the folder with its own eyes. Is it the adapter that is wrong, or our copy of it?
                self._cache.distrust(ref.digest)
                error: MintError = refused
        async with self._cache.using(ref.digest) as folder:
            if folder is None and not is_last:
                return None
        raise error

    async def _fetched(
        self,
        ref: AdapterRef,
        *,
        priority: int,
        parent: Flight[Loaded] | None = None,
        when_moving: Callable[[], None] | None = None,
    ) -> _Fetch:
        async def work(flight: Flight[_Fetch]) -> _Fetch:
            return await self._fetch(flight, ref)

        label = f"{ref.object_key} {ref.base_digest}"

        async def joined() -> _Fetch:
            return await self._fetches.run(
                ref.digest,
                work,
                tenant=ref.tenant,
                priority=priority,
                label=label,
                parent=parent,
                when_moving=when_moving,
            )

        shared = self._fetches.label_of(ref.digest) or label
        try:
            return await joined()
        except (BaseModelMismatch, BlobCorrupt, NotFound):
            if shared == label:
                raise
        # It was another tenant's copy of the same bytes that was damaged, or somebody else's belief that was wrong.
        return await joined()

    async def _fetch(self, flight: Flight[_Fetch], ref: AdapterRef) -> _Fetch:
        async with self._cache.using(ref.digest) as folder:
            if folder is not None:
                self._num_hits += 1
                return _Fetch(Tier.DISK)
        async with flight.turn(self.fetch_gate, cost=_cost(ref)):
            flight.mark_moving()
            flight.is_uninterruptible = True
            self._num_misses += 1
            begun_s = clock.monotonic_s()
            try:
                async with asyncio.timeout(self._limits.fetch_timeout_s):
                    await self._read_store(ref)
            except TimeoutError:
                raise Unavailable(
                    f"adapter {ref.digest} was not fetched within {self._limits.fetch_timeout_s:.0f} s: "
                    "the object store is slow, or everything in the disk cache is in use",
                    metadata={"digest": ref.digest},
                ) from None
        self._bytes_fetched += ref.size_bytes
        return _Fetch(Tier.STORE, (clock.monotonic_s() - begun_s) * 1000, ref.size_bytes)

    async def _read_store(self, ref: AdapterRef) -> None:
        def make(workspace: Workspace) -> None:
            self._write_adapter(workspace.blob, workspace.entry, base_digest=ref.base_digest)

        async with self._cache.filling(ref.digest, ref.size_bytes, make) as workspace:
            # The cache syncs the entry, which is the same file, before it counts.
            await self._store.get_file(
                ref.object_key, workspace.blob, digest=ref.digest, size_bytes=ref.size_bytes, durable=False
            )
            await FETCHED.reached()


def _cost(ref: AdapterRef) -> float:
    """What a turn costs a tenant: one for the errand and one for each 32 MiB."""
    return 1.0 + ref.size_bytes / _COST_BYTES
