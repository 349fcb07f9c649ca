"""Which adapters the engine holds, who uses them, and who must go.

One change at a time, as SGLang itself has it: a load with the eviction it needs, or an unload, runs as its own task,
so that a caller who gives up never leaves it half done. A load comes before the eviction that makes its place: who
waits for the adapter does not wait for the other to go, and a load that fails costs nobody their place. The engine so
holds one adapter more for a moment. References are taken and returned without waiting, on one event loop; between the
look at a reference count and the step that relies on it no other code runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mint_core import failpoints, log
from mint_core.clock import monotonic_s
from mint_core.errors import AdapterNotResident, AdapterPinned, MintError, ResourceExhausted, Unavailable
from mint_engine.adapter_engine import AdapterEngine
from mint_engine.adapter_folder import AdapterFolder

__all__ = ["LoadOutcome", "Residency", "Resident"]

LOADED = failpoints.declare("engine.loaded", "the engine holds the adapter, nobody was told yet")
UNLOADED = failpoints.declare("engine.unloaded", "the engine forgot the adapter, nobody was told yet")

_FULL_RETRY_AFTER_S = 1.0

_log = log.get_logger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True)
class Resident:
    """One adapter in the engine's host pool."""

    digest: str
    rank: int
    pinned: bool
    num_references: int = 0
    """Streams that use it now; above zero it is never unloaded."""
    last_used: int = 0
    """Larger is more recent."""


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What a load came to."""

    already_resident: bool
    load_ms: float
    """Time the engine took; 0 when it was resident."""


class Residency:
    """The table of residents of one engine. Starts empty, as a fresh engine is."""

    def __init__(
        self, engine: AdapterEngine, *, capacity: int, call_timeout_s: float, on_stuck: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._capacity = capacity
        self._call_timeout_s = call_timeout_s
        self._on_stuck = on_stuck
        self._residents: dict[str, Resident] = {}
        self._loads: dict[str, asyncio.Task[LoadOutcome]] = {}
        self._changes: set[asyncio.Task[Any]] = set()
        self._change_lock = asyncio.Lock()
        self._clock = 0

    def list(self) -> list[Resident]:
        """Residents, most recently used first."""
        return sorted(self._residents.values(), key=lambda resident: -resident.last_used)

    @property
    def num_references(self) -> int:
        """Running streams that use an adapter."""
        return sum(resident.num_references for resident in self._residents.values())

    @contextlib.contextmanager
    def reference(self, digest: str) -> Iterator[Resident]:
        """Keep ``digest`` resident inside the block; :class:`AdapterNotResident` if it is not."""
        resident = self._residents.get(digest)
        if resident is None:
            raise AdapterNotResident(
                f"adapter {digest} is not resident in this engine; load it, then retry", metadata={"digest": digest}
            )
        resident.num_references += 1
        self._touch(resident)
        try:
            yield resident
        finally:
            resident.num_references -= 1
            self._touch(resident)

    async def load(
        self, digest: str, check: Callable[[], Awaitable[AdapterFolder]], *, into_slot: bool, pinned: bool
    ) -> LoadOutcome:
        """Make ``digest`` resident; callers for one digest share one load.

        ``check`` finds and checks the folder; it runs only if there is something to load. Raises what ``check`` and the
        engine raise, :class:`ResourceExhausted` when every place is pinned or in use, :class:`Unavailable` when the
        engine did not answer in time.
        """
        if (resident := self._residents.get(digest)) is not None:
            with self.reference(digest):
                resident.pinned = resident.pinned or pinned
                if into_slot:
                    await self._guarded(self._engine.warm(digest), f"bringing {digest} into a slot")
            return LoadOutcome(already_resident=True, load_ms=0.0)
        load = self._loads.get(digest)
        if load is None:
            load = self._loads[digest] = self._start_change(self._load(digest, check, into_slot))
            load.add_done_callback(lambda _: self._loads.pop(digest, None))
        outcome = await asyncio.shield(load)
        if pinned and (resident := self._residents.get(digest)) is not None:
            resident.pinned = True
        return outcome

    async def unload(self, digest: str) -> bool:
        """Forget ``digest``; ``False`` if it was not resident. :class:`AdapterPinned` while it is in use or pinned."""
        return await asyncio.shield(self._start_change(self._unload(digest)))

    def unpin(self, digest: str) -> None:
        """Let ``digest`` be evicted again; a no-op if it is not pinned or not resident."""
        if (resident := self._residents.get(digest)) is not None:
            resident.pinned = False

    async def wait_for_changes(self) -> None:
        """Wait until no load or unload is under way."""
        while self._changes:
            await asyncio.wait(set(self._changes))

    async def _load(self, digest: str, check: Callable[[], Awaitable[AdapterFolder]], into_slot: bool) -> LoadOutcome:
        folder = await check()
        async with contextlib.AsyncExitStack() as change:
            await change.enter_async_context(self._change_lock)
            begin_s = monotonic_s()
            victim = self._take_victim(digest) if len(self._residents) >= self._capacity else None
            try:
                await self._guarded(
                    self._engine.load(digest, folder.path, into_slot=into_slot), f"loading adapter {digest}"
                )
            except BaseException:  # failed or cancelled: the engine still holds the victim
                if victim is not None:
                    self._residents[victim.digest] = victim
                raise
            resident = Resident(digest, folder.rank, pinned=False)
            self._touch(resident)
            self._residents[digest] = resident
            load_ms = (monotonic_s() - begin_s) * 1e3
            if victim is not None:
                # Nobody else may change anything before it is gone: it may be wanted again.
                self._start_change(self._finish_eviction(victim, change.pop_all()))
        await LOADED.reached()
        _log.info("adapter loaded", extra={"fields": {"digest": digest, "load_ms": round(load_ms, 2)}})
        return LoadOutcome(already_resident=False, load_ms=load_ms)

    async def _finish_eviction(self, victim: Resident, change: contextlib.AsyncExitStack) -> None:
        async with change:
            await self._forget(victim)

    async def _unload(self, digest: str) -> bool:
        async with self._change_lock:
            resident = self._residents.get(digest)
            if resident is None:
                return False
            if resident.num_references or resident.pinned:
                why = f"used by {resident.num_references} streams" if resident.num_references else "pinned"
                raise AdapterPinned(
                    f"adapter {digest} is {why} and cannot be unloaded; retry when it is free",
                    metadata={"digest": digest},
                    retry_after_s=_FULL_RETRY_AFTER_S,
                )
            del self._residents[digest]
            await self._forget(resident)
        await UNLOADED.reached()
        return True

    def _take_victim(self, wanted: str) -> Resident:
        """Take out of the table whoever was used longest ago: from here on no stream can take a reference."""
        free = [resident for resident in self._residents.values() if not (resident.num_references or resident.pinned)]
        if not free:
            raise ResourceExhausted(
                f"adapter {wanted} finds no place: all {self._capacity} are pinned or in use; retry, or give the "
                "engine a larger max_loaded_adapters",
                metadata={"max_loaded_adapters": str(self._capacity)},
                retry_after_s=_FULL_RETRY_AFTER_S,
            )
        return self._residents.pop(min(free, key=lambda resident: resident.last_used).digest)

    async def _forget(self, resident: Resident) -> None:
        """Unload one that the table no longer has, so that no stream holds or takes a reference."""
        await self._guarded(self._engine.unload(resident.digest), f"unloading adapter {resident.digest}")
        _log.info("adapter unloaded", extra={"fields": {"digest": resident.digest}})

    async def _guarded(self, call: Awaitable[None], what: str) -> None:
        """Await one engine call; if it does not come back, nobody knows what the engine holds, and it is sick."""
        try:
            async with asyncio.timeout(self._call_timeout_s):
                await call
        except TimeoutError:
            message = f"{what} did not finish within {self._call_timeout_s} s"
            self._on_stuck(message)
            raise Unavailable(f"{message}; the engine must be restarted", retry_after_s=5.0) from None
        except MintError:
            raise
        except Exception as error:
            # An engine that fails in a way its port does not name has an unknown table of adapters.
            self._on_stuck(f"{what} failed: {error}")
            raise

    def _start_change(self, change: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._finish_change)
        return task

    def _finish_change(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever waits gets the error too; asked for here, so that an abandoned one is not reported as forgotten.
            _log.debug("a change of residency failed", extra={"fields": {"error": str(error)}})

    def _touch(self, resident: Resident) -> None:
        self._clock += 1
        resident.last_used = self._clock
