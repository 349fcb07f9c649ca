"""The way of one adapter: object store → node disk → engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from mint_core import clock, failpoints, log
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    InvalidArgument,
    MintError,
    NotFound,
    Unavailable,
)
from mint_loader.cache import DiskCache
from mint_loader.model import AdapterRef, AdapterWriter, BlobSource, Engine, EngineLoad, Loaded, Tier
from mint_loader.scheduler import Flight, PriorityGate, SharedFlights

__all__ = ["Limits", "Loading", "LoadingStatus"]

FETCHED = failpoints.declare("loader.fetched", "the blob's bytes are on the node's disk, not yet checked as an adapter")
LOADING = failpoints.declare("loader.loading", "an adapter is on the node's disk, the engine was not asked yet")
LOADED = failpoints.declare("loader.loaded", "the engine holds the adapter, nobody was told yet")

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
    fetch_timeout_s: float = 300.0
    """One fetch, with the wait for room on the disk."""
    load_timeout_s: float = 60.0
    """One load into the engine."""
    engine_timeout_s: float = 5.0
    """One question to the engine."""


@dataclass(frozen=True, slots=True)
class LoadingStatus:
    """Queue and counters; counts are since the start."""

    num_queued: int
    num_loading: int
    num_hits: int
    num_misses: int
    bytes_fetched: int


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
    ) -> None:
        self._cache = cache
        self._store = store
        self._engine = engine
        self._write_adapter = write_adapter
        self._limits = limits
        self._fetches: SharedFlights[_Fetch] = SharedFlights()
        self._loads: SharedFlights[Loaded] = SharedFlights()
        self._fetch_gate = PriorityGate(limits.max_fetches, max_queued=limits.max_queued, what="fetches")
        self._load_gate = PriorityGate(limits.max_loads, max_queued=limits.max_queued, what="loads into the engine")
        self._num_hits = 0
        self._num_misses = 0
        self._bytes_fetched = 0

    async def close(self) -> None:
        """Give up what is under way."""
        await self._loads.close()
        await self._fetches.close()

    @property
    def status(self) -> LoadingStatus:
        return LoadingStatus(
            num_queued=self._fetch_gate.num_queued + self._load_gate.num_queued,
            num_loading=self._fetches.num_moving + self._loads.num_moving,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            bytes_fetched=self._bytes_fetched,
        )

    async def ensure(
        self,
        ref: AdapterRef,
        tier: Tier,
        *,
        priority: int = 0,
        timeout_s: float,
        when_moving: Callable[[], None] | None = None,
    ) -> Loaded:
        """Return when the adapter is at ``tier`` or nearer, or raise why it cannot be.

        ``when_moving`` is called once it left the queues. Raises, beyond what store and engine raise:
        :class:`DeadlineExceeded` after ``timeout_s``, :class:`ResourceExhausted` for a full queue or an adapter that
        no disk cache or engine of this size can hold, :class:`BlobCorrupt` if the stored bytes lost their digest.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ensure(ref, tier, priority, when_moving)
        except TimeoutError:
            raise DeadlineExceeded(
                f"adapter {ref.digest} did not reach tier {tier.name} within {timeout_s:.1f} s; retry",
                metadata={"digest": ref.digest},
            ) from None

    async def _ensure(
        self, ref: AdapterRef, tier: Tier, priority: int, when_moving: Callable[[], None] | None
    ) -> Loaded:
        if tier <= Tier.DISK:
            fetch = await self._fetched(ref, priority=priority, when_moving=when_moving)
            return Loaded(fetch.found_at, fetch.fetch_ms, 0.0, fetch.bytes_fetched)

        async def work(flight: Flight[Loaded]) -> Loaded:
            # Pinned before it is there: the next fetch may not evict it before this load had its turn.
            with self._cache.pinned(ref.digest):
                return await self._load(flight, ref, into_slot=tier is Tier.SLOT)

        return await self._loads.run((ref, tier), work, priority=priority, when_moving=when_moving)

    async def _load(self, flight: Flight[Loaded], ref: AdapterRef, *, into_slot: bool) -> Loaded:
        if ref.digest not in self._cache:
            # Before bytes move: does the engine want them?
            resident = await self._engine.resident(timeout_s=self._limits.engine_timeout_s)
            if resident.base_digest != ref.base_digest:
                raise BaseModelMismatch(
                    f"adapter {ref.digest} fits base {ref.base_digest}; the engine here holds {resident.base_digest}",
                    metadata={"expected": ref.base_digest, "actual": resident.base_digest},
                )
            if ref.digest in resident.digests and not into_slot:
                return Loaded(Tier.HOST)
        fetch = await self._fetched(ref, priority=flight.priority, parent=flight)
        load = await self._into_engine(flight, ref, into_slot=into_slot)
        if load is None:
            # The folder did not survive its checks: once more, with fresh bytes.
            fetch = await self._fetched(ref, priority=flight.priority, parent=flight)
            load = await self._into_engine(flight, ref, into_slot=into_slot, is_last=True)
        assert load is not None
        await LOADED.reached()
        found_at = Tier.HOST if load.already_resident else fetch.found_at
        return Loaded(found_at, fetch.fetch_ms, load.load_ms, fetch.bytes_fetched)

    async def _into_engine(
        self, flight: Flight[Loaded], ref: AdapterRef, *, into_slot: bool, is_last: bool = False
    ) -> EngineLoad | None:
        """Have the engine load from the disk cache; None if the cached bytes turned out to be bad and are gone."""
        async with self._load_gate.turn(flight), self._cache.using(ref.digest) as folder:
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
                    ref.digest, folder.name, into_slot=into_slot, timeout_s=self._limits.load_timeout_s
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
                ref.digest, work, label=label, priority=priority, parent=parent, when_moving=when_moving
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
        async with self._fetch_gate.turn(flight):
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
        async with self._cache.filling(ref.digest, ref.size_bytes) as workspace:
            await self._store.get_file(ref.object_key, workspace.blob, digest=ref.digest, size_bytes=ref.size_bytes)
            await FETCHED.reached()
            write = functools.partial(self._write_adapter, base_digest=ref.base_digest)
            await asyncio.to_thread(write, workspace.blob, workspace.entry)
