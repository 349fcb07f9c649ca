"""Which engine replica answers: one that holds the adapter, while it has room; else one of two, the less busy one.

An adapter that nobody holds goes to the less busy of the first two replicas in its own order, which everybody computes
alike. One whose holder is overloaded goes to a replica that is at most half as busy, and is held by both from then on.
(Two choices instead of the least busy of all: M. Mitzenmacher, "The power of two choices in randomized load
balancing", 2001. What is known of others' load is a little old, and everybody would run to the same replica.)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from mint_core import calls, clock, log
from mint_core.errors import BaseModelMismatch, MintError, Unavailable
from mint_core.names import BaseModelName
from mint_core.placement import placement_order
from mint_inference.hints import Hints
from mint_inference.loads import Loads
from mint_inference.model import Replica, ReplicaState, Residency

__all__ = ["Registry", "Router"]

_OVERLOADED = 1.0
"""Pressure from which requests wait inside the engine."""
_HOT = 0.5
"""Pressure from which an adapter that makes most of it is copied to another replica."""
_SPARE = 0.5
"""What another replica's pressure may be of a busy one's to take over from it: less, and they would swap for ever."""

_log = log.get_logger(__name__)


class Registry(Protocol):
    """The part of the catalog that routing needs."""

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Watcher:
    on_gone: Callable[[], None]
    on_suspect: Callable[[], None]


class Router:
    """Knows the living replicas by asking the catalog every ``poll_s``; the last answer serves while the catalog is
    away.

    A replica that did not answer is under suspicion and asked last, until it answers a question or begins anew: its
    registration outlives it by up to a lease.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        poll_s: float = 1.0,
        timeout_s: float = 3.0,
        max_hints: int = 100_000,
        now_s: Callable[[], float] = clock.monotonic_s,
    ) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._replicas: dict[str, Replica] = {}
        self._known_bases: set[str] = set()
        self._read_at_s: float | None = None
        self._reading: asyncio.Task[None] | None = None
        self._hints = Hints(max_hints)
        self._loads = Loads(now_s)
        self._suspects: set[str] = set()
        self._watchers: dict[str, set[_Watcher]] = {}

    async def follow(self) -> None:
        """Keep the list of replicas fresh, until cancelled."""
        while True:
            try:
                await self._read()
            except MintError as error:
                _log.warning("cannot list engine replicas", extra={"fields": {"error": error.message}})
            await asyncio.sleep(self._poll_s)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    @property
    def replicas(self) -> list[Replica]:
        """Those registered when the catalog was last asked."""
        return list(self._replicas.values())

    async def choose(self, base_digest: str, digest: str, excluded: Set[str] = frozenset()) -> Replica:
        """A ready replica of the base, not among the ``excluded`` names.

        Raises :class:`BaseModelMismatch` if there are replicas, but of other bases only, and :class:`Unavailable` if
        there is none at all or none that is ready. Asks the catalog once more before it says so: a replica may be
        new, or ready again.
        """
        candidates = self._candidates(base_digest, excluded)
        if not candidates:
            with contextlib.suppress(MintError):
                await self._read()
            candidates = self._candidates(base_digest, excluded)
        if not candidates:
            raise self._nobody(base_digest)
        return self._pick(candidates, digest)

    def place_for_copy(self, holder: Replica, digest: str) -> Replica | None:
        """Where a hot adapter should lie as well: set if it keeps its holder busy and another replica has room."""
        if self._loads.pressure(holder, digest) < _HOT or self._loads.share(holder, digest) < 0.5:
            return None
        able = [each for each in self._candidates(holder.base_digest, {holder.name}) if each.loader_address]
        return self._spare(able, holder, digest)

    def has_other(self, replica: Replica) -> bool:
        """Whether somebody else could answer instead of the replica."""
        return bool(self._candidates(replica.base_digest, {replica.name}))

    def base_digest_of(self, base_model: BaseModelName) -> str | None:
        """Digest of a base model that a replica holds."""
        name = str(base_model)
        return next((each.base_digest for each in self._replicas.values() if each.base_model == name), None)

    def using(self, replica: Replica, digest: str) -> contextlib.AbstractContextManager[None]:
        """Count a stream at the replica."""
        return self._loads.using(replica, digest)

    def loading(self, replica: Replica, digest: str) -> contextlib.AbstractContextManager[None]:
        """The adapter is being loaded there: who comes meanwhile joins."""
        return self._hints.loading(replica.name, digest, self._now_s())

    @contextlib.contextmanager
    def watching(
        self, replica: Replica, *, on_gone: Callable[[], None], on_suspect: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Call ``on_gone`` if the replica's registration ends inside the block, ``on_suspect`` if it does not answer
        others."""
        watchers = self._watchers.setdefault(replica.name, set())
        watcher = _Watcher(on_gone, on_suspect)
        watchers.add(watcher)
        try:
            yield
        finally:
            watchers.discard(watcher)
            if not watchers and self._watchers.get(replica.name) is watchers:
                del self._watchers[replica.name]

    def lacks(self, replica: Replica, digest: str) -> bool:
        """Whether the replica, which answers, lacks the adapter as far as is known; it may have come a moment ago."""
        return bool(digest) and not self.is_suspect(replica) and self._hints.lacks(replica.name, digest)

    def note_resident(self, replica: Replica, digest: str) -> None:
        """The replica holds the adapter."""
        self._hints.note(replica.name, digest, self._now_s())

    def note_absent(self, replica: Replica, digest: str) -> None:
        """The replica said that it lacks the adapter."""
        self._hints.discard(replica.name, digest)

    def note_answered(self, replica: Replica, num_running: int | None = None) -> None:
        """The replica answers, and perhaps said how many streams it runs."""
        self._suspects.discard(replica.name)
        if num_running is not None:
            self._loads.told(replica, num_running)

    def note_failed(self, replica: Replica) -> None:
        """The replica did not answer, or broke off."""
        known = self._replicas.get(replica.name)
        if known is None or known.registered_at_s != replica.registered_at_s:
            return  # another life of it
        self._suspects.add(replica.name)
        for watcher in list(self._watchers.get(replica.name, ())):
            watcher.on_suspect()

    def note_residency(self, replica: Replica, residency: Residency, asked_at_s: float) -> None:
        """What the replica said it holds and runs."""
        known = self._replicas.get(replica.name)
        if known is None or known.registered_at_s != replica.registered_at_s:
            return  # another life of it
        self.note_answered(replica, residency.num_running)
        self._hints.replace(replica.name, residency.digests, asked_at_s)

    def is_suspect(self, replica: Replica) -> bool:
        """Whether it did not answer the last time."""
        return replica.name in self._suspects

    def _pick(self, candidates: Sequence[Replica], digest: str) -> Replica:
        if not digest:
            return self._lighter(random.sample(candidates, min(2, len(candidates))), digest)
        names = self._hints.holders(digest)
        holders = [each for each in candidates if each.name in names]
        if not holders:
            return self._lighter(_in_order(digest, candidates)[:2], digest)
        holder = self._lighter(random.sample(holders, min(2, len(holders))), digest)
        if self._loads.pressure(holder, digest) < _OVERLOADED:
            return holder
        others = [each for each in candidates if each.name not in names]
        return self._spare(others, holder, digest) or holder

    def _spare(self, others: Sequence[Replica], holder: Replica, digest: str) -> Replica | None:
        """One of ``others`` that has far more room than a busy holder."""
        names = self._hints.holders(digest)
        others = [each for each in others if each.name not in names and not self.is_suspect(each)]
        if not others:
            return None
        other = self._lighter(_in_order(digest, others)[:2], digest)
        limit = _SPARE * self._loads.pressure(holder, digest)
        return other if self._loads.pressure(other, digest) <= limit else None

    def _lighter(self, replicas: Sequence[Replica], digest: str) -> Replica:
        """The least busy; among equals the first."""
        return min(replicas, key=lambda each: self._loads.pressure(each, digest))

    def _candidates(self, base_digest: str, excluded: Set[str]) -> list[Replica]:
        """Those that may be asked; of those under suspicion only if there is nobody else."""
        ready = [
            replica
            for replica in self._replicas.values()
            if replica.base_digest == base_digest
            and replica.state is ReplicaState.READY
            and replica.name not in excluded
        ]
        return [each for each in ready if not self.is_suspect(each)] or ready

    def _nobody(self, base_digest: str) -> MintError:
        same = [each for each in self._replicas.values() if each.base_digest == base_digest]
        if same:
            states = ", ".join(f"{each.name} is {each.state.value}" for each in same)
            return Unavailable(f"no engine replica of base {base_digest} takes requests now ({states}); retry")
        if self._read_at_s is None:
            return Unavailable("the engine replicas are not known yet: the catalog did not answer; retry")
        if not self._replicas or base_digest in self._known_bases:
            return Unavailable(f"no engine replica of base {base_digest} is registered now; start one or retry")
        held = sorted({each.base_digest for each in self._replicas.values()})
        return BaseModelMismatch(
            f"no engine replica holds base {base_digest}; those registered hold {', '.join(held)}",
            metadata={"expected": base_digest, "actual": ",".join(held)},
        )

    async def _read(self) -> None:
        """Read the list; callers at one time share one question."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_once())
            self._reading.add_done_callback(self._read_ended)
        await asyncio.shield(self._reading)

    def _read_ended(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled():
            task.exception()  # seen, so that it is not reported as forgotten when every caller left

    async def _read_once(self) -> None:
        # Shared by callers with deadlines of their own.
        with calls.inbound_call(calls.principal(), None):
            listed = await self._registry.list_replicas(timeout_s=self._timeout_s)
        replicas = {each.name: each for each in listed}
        for name, before in self._replicas.items():
            now = replicas.get(name)
            if now is None or now.registered_at_s != before.registered_at_s or now.address != before.address:
                self._hints.forget(name)
                self._loads.forget(name)
                self._suspects.discard(name)
                for watcher in list(self._watchers.get(name, ())):
                    watcher.on_gone()
        self._replicas = replicas
        self._known_bases.update(each.base_digest for each in replicas.values())
        self._read_at_s = self._now_s()


def _in_order(digest: str, replicas: Sequence[Replica]) -> list[Replica]:
    by_name = {each.name: each for each in replicas}
    return [by_name[name] for name in placement_order(digest, by_name)]
