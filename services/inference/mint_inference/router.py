"""Which engine replica answers: one that holds the adapter, and among equals the one with the fewest streams."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Set
from typing import Protocol

from mint_core import calls, clock, log
from mint_core.errors import BaseModelMismatch, MintError, Unavailable
from mint_core.names import BaseModelName
from mint_inference.model import Replica, ReplicaState

__all__ = ["Registry", "Router"]

_log = log.get_logger(__name__)


class Registry(Protocol):
    """The part of the catalog that routing needs."""

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]: ...


class Router:
    """Knows the living replicas by asking the catalog every ``poll_s``; the last answer serves while the catalog is
    away.

    What it believes to be resident where are hints, learned from answers; an engine that lacks an adapter says so.
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
        self._max_hints = max_hints
        self._now_s = now_s
        self._replicas: dict[str, Replica] = {}
        self._known_bases: set[str] = set()
        self._read_at_s: float | None = None
        self._reading: asyncio.Task[None] | None = None
        self._hints: OrderedDict[str, set[str]] = OrderedDict()
        """Digest → names of replicas believed to hold it."""
        self._num_streams: Counter[str] = Counter()

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

    async def choose(self, base_digest: str, digest: str, excluded: Set[str] = frozenset()) -> Replica:
        """A ready replica of the base, not among the ``excluded`` names.

        Raises :class:`BaseModelMismatch` if there are replicas, but of other bases only, and :class:`Unavailable` if
        there is none at all or none that is ready. Asks the catalog once more before it says so: a replica may be
        new.
        """
        candidates = self._candidates(base_digest, excluded)
        if not candidates and not excluded:
            with contextlib.suppress(MintError):
                await self._read()
            candidates = self._candidates(base_digest, excluded)
        if not candidates:
            raise self._nobody(base_digest)
        holders = self._hints.get(digest, set())
        return min(
            candidates, key=lambda each: (each.name not in holders, self._num_streams[each.name], random.random())
        )

    def base_digest_of(self, base_model: BaseModelName) -> str | None:
        """Digest of a base model that a replica holds."""
        name = str(base_model)
        return next((each.base_digest for each in self._replicas.values() if each.base_model == name), None)

    @contextlib.contextmanager
    def using(self, replica: Replica) -> Iterator[None]:
        """Count a stream at the replica."""
        self._num_streams[replica.name] += 1
        try:
            yield
        finally:
            self._num_streams[replica.name] -= 1
            if not self._num_streams[replica.name]:
                del self._num_streams[replica.name]

    def note_resident(self, replica: Replica, digest: str) -> None:
        """The replica holds the adapter, or is about to."""
        self._hints.setdefault(digest, set()).add(replica.name)
        self._hints.move_to_end(digest)
        while len(self._hints) > self._max_hints:
            self._hints.popitem(last=False)

    def note_absent(self, replica: Replica, digest: str) -> None:
        """The replica said that it lacks the adapter."""
        holders = self._hints.get(digest)
        if holders is not None:
            holders.discard(replica.name)
            if not holders:
                del self._hints[digest]

    def _candidates(self, base_digest: str, excluded: Set[str]) -> list[Replica]:
        return [
            replica
            for replica in self._replicas.values()
            if replica.base_digest == base_digest
            and replica.state is ReplicaState.READY
            and replica.name not in excluded
        ]

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
                self._forget_hints(name)
        self._replicas = replicas
        self._known_bases.update(each.base_digest for each in replicas.values())
        self._read_at_s = self._now_s()

    def _forget_hints(self, name: str) -> None:
        for digest in [digest for digest, holders in self._hints.items() if name in holders]:
            self._hints[digest].discard(name)
            if not self._hints[digest]:
                del self._hints[digest]
