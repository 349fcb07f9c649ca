"""Pins: what an alias points at is kept on this node, from a time to a time, and follows the alias.

A pin keeps its adapters from being evicted from the disk, and above the disk tier has the engine hold them pinned.
What is missing is brought by tickets like any other. The engine's pins are this room's alone: one that no pin asks for
is taken back, so a loader that restarted between two steps ends up right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mint_core import calls, clock, log
from mint_core.errors import FailedPrecondition, InvalidArgument, MintError, NotFound, ResourceExhausted
from mint_core.names import AliasName, PolicyName
from mint_loader.cache import DiskCache
from mint_loader.model import AdapterRef, Engine, PinnedTargets, SignatureCheck, Tier
from mint_loader.pin_store import Pin, PinStore
from mint_loader.tickets import Ticket, Tickets

__all__ = ["Pins"]

_ENGINE_TIMEOUT_S = 2.0
_RETRY_S = 5.0
_log = log.get_logger(__name__)


class Pins:
    """The node's pins. Without a catalog there are those of the file and no new ones."""

    def __init__(
        self,
        store: PinStore,
        catalog: PinnedTargets | None,
        engine: Engine,
        cache: DiskCache,
        tickets: Tickets,
        *,
        max_pins: int = 1000,
        max_bytes: int,
        lead_s: float = 300.0,
        refresh_s: float = 60.0,
        poll_s: float = 2.0,
        priority: int = 3,
        check_signature: SignatureCheck | None = None,
    ) -> None:
        """``max_bytes`` is what pins may keep of the disk cache; ``lead_s`` is how long before its start a scheduled
        pin's adapters are brought to the disk; aliases are asked for again every ``refresh_s``.
        """
        self._store = store
        self._catalog = catalog
        self._engine = engine
        self._cache = cache
        self._tickets = tickets
        self._max_pins = max_pins
        self._max_bytes = max_bytes
        self._lead_s = lead_s
        self._refresh_s = refresh_s
        self._poll_s = poll_s
        self._priority = priority
        self._check_signature = check_signature
        self._pins: dict[AliasName, Pin] = {}
        self._asked_at_s: dict[AliasName, float] = {}
        self._tried: dict[tuple[str, Tier], tuple[Ticket, float]] = {}
        self._held: dict[str, Tier] = {}
        """How near each wanted adapter is, as last seen."""
        self._may_pin_engine = True
        """Whether the engine may have pins of ours."""
        self._writing = asyncio.Lock()
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Read the file, and keep what it names from being evicted."""
        for pin in await asyncio.to_thread(self._store.read):
            self._pins[pin.alias] = pin
        self._keep(self._active(clock.wall_s()))

    def __len__(self) -> int:
        return len(self._pins)

    def all(self) -> list[Pin]:
        """By alias."""
        return [self._pins[alias] for alias in sorted(self._pins)]

    def is_scheduled(self, pin: Pin) -> bool:
        """Whether its time is not near yet."""
        return pin.start_s is not None and clock.wall_s() < pin.start_s - self._lead_s

    def is_held(self, pin: Pin) -> bool:
        """Whether everything was at its tier when last looked."""
        return bool(pin.refs) and all(self._held.get(ref.digest, Tier.STORE) >= pin.tier for ref in pin.refs)

    def concerns(self, policy: PolicyName) -> bool:
        """Whether an alias of the policy is pinned, or will be."""
        return any(alias.parent == policy for alias in self._pins)

    def moved(self, alias: AliasName) -> None:
        """The alias points elsewhere now."""
        if alias in self._pins:
            self._asked_at_s.pop(alias, None)
            self._changed.set()

    async def pin(self, alias: AliasName, tier: Tier, *, start_s: float | None, end_s: float | None) -> Pin:
        """Keep what ``alias`` points at; replaces its pin. Raises what the contract says of ``PinPolicy``."""
        if tier < Tier.DISK:
            raise InvalidArgument("pin.tier is STORE; pin to DISK, HOST or SLOT", field="pin.tier")
        now_s = clock.wall_s()
        if end_s is not None and end_s <= max(now_s, start_s or 0.0):
            raise InvalidArgument(
                f"pin.end_time lies {max(now_s, start_s or 0.0) - end_s:.0f} s before the pin would begin; send a "
                "later one, or none",
                field="pin.end_time",
            )
        if self._catalog is None:
            raise FailedPrecondition("this loader knows no catalog to ask for the alias; set loader.catalog_address")
        refs = await self._catalog.targets(alias)
        if self._check_signature is not None:
            for ref in refs:
                self._check_signature(ref.tenant, ref.digest, ref.base_digest, ref.signature)
        pin = Pin(alias, tier, start_s, end_s, now_s, calls.principal(), refs)
        async with self._writing:
            others = [each for each in self._pins.values() if each.alias != alias]
            if len(others) >= self._max_pins:
                raise ResourceExhausted(
                    f"{len(others)} pins exist, which is the limit; unpin some or raise loader.max_pins"
                )
            num_bytes = _num_bytes([*others, pin])
            if num_bytes > self._max_bytes:
                raise ResourceExhausted(
                    f"with {alias} the pins would keep {num_bytes} bytes on this node's disk, {self._max_bytes} are "
                    "allowed; unpin some, or raise loader.max_pinned_share or max_cache_bytes",
                    metadata={"alias": str(alias), "max_pinned_bytes": str(self._max_bytes)},
                )
            await asyncio.to_thread(self._store.write, [*others, pin])
            self._pins[alias] = pin
        self._asked_at_s[alias] = clock.monotonic_s()
        self._changed.set()
        return pin

    async def unpin(self, alias: AliasName) -> None:
        """Forget a pin; :class:`NotFound` if there is none."""
        async with self._writing:
            if alias not in self._pins:
                raise NotFound(f"there is no pin of {alias} on this node", metadata={"resource": str(alias)})
            await self._forget([alias])
        self._changed.set()

    async def run(self) -> None:
        """Make the pins true and keep them so, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._look()
            except MintError as error:
                _log.info("pins cannot be looked after, trying again", extra={"fields": {"error": error.message}})
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        now_s = clock.wall_s()
        ended = [pin.alias for pin in self._pins.values() if pin.end_s is not None and pin.end_s <= now_s]
        if ended:
            async with self._writing:
                await self._forget(ended)
        await self._ask_again()
        active = self._active(now_s)
        self._keep(active)
        wanted = self._wanted(active, now_s)
        if not wanted and not self._may_pin_engine:
            return
        to_pin = {digest for digest, (_, tier) in wanted.items() if tier > Tier.DISK}
        in_engine = frozenset[str]()
        if self._may_pin_engine or to_pin:
            try:
                resident = await self._engine.resident(timeout_s=_ENGINE_TIMEOUT_S)
            except MintError:  # meanwhile everything comes to the disk
                self._submit(active, {digest: (ref, Tier.DISK) for digest, (ref, _) in wanted.items()}, in_engine)
                raise
            in_engine = resident.pinned & resident.digests
        self._submit(active, wanted, in_engine)
        for digest in in_engine - to_pin:
            await self._engine.unpin(digest, timeout_s=_ENGINE_TIMEOUT_S)
        self._may_pin_engine = bool(to_pin)

    def _active(self, now_s: float) -> list[Pin]:
        """The pins whose time has come, or nearly, oldest first."""
        near = [pin for pin in self._pins.values() if pin.start_s is None or now_s >= pin.start_s - self._lead_s]
        return sorted(near, key=lambda pin: pin.created_s)

    def _keep(self, active: Iterable[Pin]) -> None:
        """Tell the disk cache what to keep: as much as pins may, those first that were made first."""
        kept: dict[str, int] = {}
        for pin in active:
            more = {ref.digest: ref.size_bytes for ref in pin.refs}
            if sum((kept | more).values()) > self._max_bytes:
                pin.error = (
                    f"LIMIT_EXCEEDED: its adapters grew, and pins may keep {self._max_bytes} bytes on this node's disk"
                )
                continue
            kept |= more
        self._cache.keep(frozenset(kept))

    def _wanted(self, active: Iterable[Pin], now_s: float) -> dict[str, tuple[AdapterRef, Tier]]:
        """The nearest tier wanted of each adapter that is kept."""
        wanted: dict[str, tuple[AdapterRef, Tier]] = {}
        for pin in active:
            tier = pin.tier if pin.start_s is None or now_s >= pin.start_s else Tier.DISK
            for ref in pin.refs:
                if ref.digest in self._cache.kept and tier > wanted.get(ref.digest, (ref, Tier.STORE))[1]:
                    wanted[ref.digest] = ref, tier
        return wanted

    def _submit(
        self, active: Iterable[Pin], wanted: dict[str, tuple[AdapterRef, Tier]], in_engine: frozenset[str]
    ) -> None:
        now_s = clock.monotonic_s()
        held: dict[str, Tier] = {}
        tried: dict[tuple[str, Tier], tuple[Ticket, float]] = {}
        for digest, (ref, tier) in wanted.items():
            ticket, at_s = self._tried.get((digest, tier), (None, 0.0))
            # The engine does not tell who has a slot: what it loaded for one has been there, and comes back by itself.
            was_loaded = ticket is not None and not ticket.error and ticket.state.is_final
            on_disk = Tier.DISK if digest in self._cache else Tier.STORE
            held[digest] = on_disk if digest not in in_engine else (tier if was_loaded else Tier.HOST)
            if held[digest] >= tier:
                if ticket is not None:
                    tried[digest, tier] = ticket, at_s
                continue
            if ticket is None or (ticket.state.is_final and now_s - at_s >= _RETRY_S):
                try:
                    ticket = self._tickets.submit([ref], tier, priority=self._priority, pinned=tier > Tier.DISK)[0]
                except ResourceExhausted as error:
                    _log.info("a pin waits for a load ticket", extra={"fields": {"error": error.message}})
                    continue
                at_s = now_s
            tried[digest, tier] = ticket, at_s
        self._held, self._tried = held, tried
        for pin in active:
            errors = [ticket.error for (digest, _), (ticket, _) in tried.items() if digest in _digests(pin)]
            if all(digest in self._cache.kept for digest in _digests(pin)):
                pin.error = next((error for error in errors if error), "")

    async def _ask_again(self) -> None:
        """Ask the catalog for aliases that moved, or that nobody asked for lately."""
        if self._catalog is None:
            return
        is_changed = False
        for alias, pin in list(self._pins.items()):
            asked_at_s = self._asked_at_s.get(alias)
            if asked_at_s is not None and clock.monotonic_s() - asked_at_s < self._refresh_s:
                continue
            self._asked_at_s[alias] = clock.monotonic_s()
            try:
                refs = await self._catalog.targets(alias)
            except NotFound as error:
                refs, pin.error = (), f"{error.reason}: {error.message}"
            except MintError as error:  # what was heard before holds until the catalog is back
                self._asked_at_s.pop(alias, None)
                _log.info("a pinned alias cannot be asked for", extra={"fields": {"error": error.message}})
                break
            if refs != pin.refs and self._pins.get(alias) is pin:
                pin.refs = refs
                is_changed = True
        if is_changed:
            async with self._writing:
                await asyncio.to_thread(self._store.write, list(self._pins.values()))

    async def _forget(self, aliases: Iterable[AliasName]) -> None:
        gone = set(aliases)
        await asyncio.to_thread(self._store.write, [pin for pin in self._pins.values() if pin.alias not in gone])
        for alias in gone:
            self._pins.pop(alias, None)
            self._asked_at_s.pop(alias, None)


def _digests(pin: Pin) -> frozenset[str]:
    return frozenset(ref.digest for ref in pin.refs)


def _num_bytes(pins: Iterable[Pin]) -> int:
    """Of the distinct adapters."""
    return sum({ref.digest: ref.size_bytes for pin in pins for ref in pin.refs}.values())
