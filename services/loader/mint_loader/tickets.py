"""Load tickets: loads nobody waits for. Each goes through the same queue as the loads that are waited for."""

from __future__ import annotations

import asyncio
import enum
import itertools
import secrets
from collections import Counter, OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from mint_core import calls, clock, log
from mint_core.errors import InvalidArgument, MintError, NotFound, ResourceExhausted
from mint_core.names import LoadTicketName
from mint_loader.loading import Loading
from mint_loader.model import AdapterRef, Tier

__all__ = ["Ticket", "TicketState", "Tickets"]

_log = log.get_logger(__name__)


class TicketState(enum.Enum):
    """Life of a ticket."""

    QUEUED = "queued"
    LOADING = "loading"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED)


@dataclass(slots=True)
class Ticket:
    """A request to bring an adapter to a tier."""

    name: LoadTicketName
    ref: AdapterRef
    tier: Tier
    priority: int
    deadline_s: float
    """Seconds since the epoch."""
    state: TicketState = TicketState.QUEUED
    error: str = ""
    """``REASON: sentence`` once it failed."""
    pinned: bool = False
    """Whether the engine is to keep it."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Tickets:
    """The node's tickets. At most ``max_open`` are unfinished, ``max_open_per_tenant`` of one tenant; of the finished
    ones the latest ``max_kept`` can be read.
    """

    def __init__(
        self,
        loading: Loading,
        *,
        max_open: int = 4096,
        max_open_per_tenant: int = 1024,
        max_kept: int = 4096,
        timeout_s: float = 600.0,
    ) -> None:
        self._loading = loading
        self._max_open = max_open
        self._max_open_per_tenant = max_open_per_tenant
        self._max_kept = max_kept
        self._timeout_s = timeout_s
        self._open: dict[str, Ticket] = {}
        self._num_open: Counter[str] = Counter()
        """By tenant."""
        self._finished: OrderedDict[str, Ticket] = OrderedDict()

    @property
    def num_queued(self) -> int:
        return sum(ticket.state is TicketState.QUEUED for ticket in self._open.values())

    def num_open(self, tenant: str) -> int:
        """Unfinished tickets of a tenant (its id)."""
        return self._num_open[tenant]

    def tenants(self) -> AbstractSet[str]:
        """Those with unfinished tickets."""
        return self._num_open.keys()

    def submit(
        self,
        refs: Sequence[AdapterRef],
        tier: Tier,
        *,
        priority: int,
        timeout_s: float | None = None,
        pinned: bool = False,
    ) -> list[Ticket]:
        """One ticket per reference, all or none; :class:`ResourceExhausted` if too many are open.

        Each is given up after ``timeout_s``, at most this room's own ``timeout_s``, which is also what None means.
        """
        if timeout_s is not None and timeout_s <= 0:
            raise InvalidArgument(
                f"deadline lies {-timeout_s:.1f} s in the past; send a later one, or none", field="deadline"
            )
        if len(self._open) + len(refs) > self._max_open:
            raise ResourceExhausted(
                f"{len(self._open)} load tickets are open and {len(refs)} came; {self._max_open} may be open: "
                "retry later",
                retry_after_s=1.0,
            )
        for tenant, count in Counter(ref.tenant for ref in refs).items():
            if self._num_open[tenant] + count > self._max_open_per_tenant:
                raise ResourceExhausted(
                    f"{self._num_open[tenant]} load tickets of tenant {tenant!r} are open and {count} came; "
                    f"{self._max_open_per_tenant} of one tenant may be open: retry later",
                    metadata={"tenant": tenant},
                    retry_after_s=1.0,
                )
        within_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        return [self._submit(ref, tier, priority, within_s, pinned) for ref in refs]

    def listed(self, *, tenant: str = "", open_only: bool = False, limit: int = 1000) -> list[Ticket]:
        """Unfinished ones, oldest first, then finished ones, latest first; of all tenants unless one is named."""
        found: list[Ticket] = []
        for ticket in itertools.chain(self._open.values(), () if open_only else reversed(self._finished.values())):
            if len(found) >= limit:
                break
            if not tenant or ticket.ref.tenant == tenant:
                found.append(ticket)
        return found

    def get(self, name: LoadTicketName) -> Ticket:
        """A ticket, also for a while after its end."""
        ticket = self._open.get(name.load_ticket) or self._finished.get(name.load_ticket)
        if ticket is None:
            raise NotFound(
                f"there is no load ticket {name}; it ended long ago or the loader restarted",
                metadata={"resource": str(name)},
            )
        return ticket

    async def cancel(self, name: LoadTicketName) -> Ticket:
        """Give a ticket up; a finished one stays as it is. A load that others wait for goes on."""
        ticket = self.get(name)
        if ticket.task is not None and not ticket.state.is_final:
            ticket.task.cancel()
            await asyncio.wait([ticket.task])
        return ticket

    async def close(self) -> None:
        """Give all tickets up."""
        tasks = [ticket.task for ticket in self._open.values() if ticket.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _submit(self, ref: AdapterRef, tier: Tier, priority: int, timeout_s: float, pinned: bool) -> Ticket:
        name = LoadTicketName(secrets.token_hex(12))
        ticket = Ticket(name, ref, tier, priority, clock.wall_s() + timeout_s, pinned=pinned)
        self._open[name.load_ticket] = ticket
        self._num_open[ref.tenant] += 1
        ticket.task = asyncio.get_running_loop().create_task(self._work(ticket, timeout_s), name=str(name))
        ticket.task.add_done_callback(lambda _: self._finish(ticket))
        return ticket

    async def _work(self, ticket: Ticket, timeout_s: float) -> None:
        def moving() -> None:
            if not ticket.state.is_final:
                ticket.state = TicketState.LOADING

        try:
            # The ticket outlives the call that made it, and so its deadline.
            with calls.inbound_call(calls.principal(), None):
                await self._loading.ensure(
                    ticket.ref,
                    ticket.tier,
                    priority=ticket.priority,
                    timeout_s=timeout_s,
                    pinned=ticket.pinned,
                    when_moving=moving,
                )
        except MintError as error:
            ticket.error = f"{error.reason}: {error.message}"
            ticket.state = TicketState.CANCELLED if error.reason == "DEADLINE_EXCEEDED" else TicketState.FAILED
            _log.warning("load ticket failed", extra={"fields": {"digest": ticket.ref.digest, "error": ticket.error}})
        else:
            ticket.state = TicketState.DONE

    def _finish(self, ticket: Ticket) -> None:
        task = ticket.task
        assert task is not None
        if not ticket.state.is_final:
            if not task.cancelled() and (bug := task.exception()) is not None:
                _log.error("a load ticket failed by a bug", exc_info=bug)
                ticket.state, ticket.error = TicketState.FAILED, "INTERNAL: see the loader's log"
            else:
                ticket.state = TicketState.CANCELLED
        if self._open.pop(ticket.name.load_ticket, None) is not None:
            self._num_open[ticket.ref.tenant] -= 1
            if not self._num_open[ticket.ref.tenant]:
                del self._num_open[ticket.ref.tenant]
        self._finished[ticket.name.load_ticket] = ticket
        while len(self._finished) > self._max_kept:
            self._finished.popitem(last=False)
