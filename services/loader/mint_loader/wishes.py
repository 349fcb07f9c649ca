"""Loading what somebody waits for: a promotion that wants an adapter held by some engines before the alias moves.

The catalog chooses the replicas and tells each with the renewals of its registration; the engine passes that on with
its residency, which is looked at here. So a node whose loader knows no catalog takes part as well.
"""

from __future__ import annotations

import asyncio

from mint_core import clock, log
from mint_core.errors import MintError
from mint_loader.engine_view import EngineView
from mint_loader.model import Tier
from mint_loader.tickets import Ticket, Tickets

__all__ = ["Wishes"]

_log = log.get_logger(__name__)
_RETRY_S = 5.0


class Wishes:
    """Submits tickets to the engine's host pool for what it is asked to hold and does not."""

    def __init__(self, engine: EngineView, tickets: Tickets, *, poll_s: float = 1.0, priority: int = 5) -> None:
        self._engine = engine
        self._tickets = tickets
        self._poll_s = poll_s
        self._priority = priority
        self._tried: dict[str, tuple[Ticket, float]] = {}
        """By digest: the latest ticket and when it was submitted."""
        self.num_submitted = 0

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self._look()
            except MintError as error:
                _log.debug("the engine's wishes are not known", extra={"fields": {"error": error.message}})
            await asyncio.sleep(self._poll_s)

    async def _look(self) -> None:
        resident = await self._engine.resident()
        wanted = {ref.digest: ref for ref in resident.to_load if ref.digest not in resident.digests}
        now_s = clock.monotonic_s()
        self._tried = {
            digest: (ticket, at_s)
            for digest, (ticket, at_s) in self._tried.items()
            if digest in wanted and (not ticket.state.is_final or now_s - at_s < _RETRY_S)
        }
        for digest, ref in wanted.items():
            if digest not in self._tried:
                ticket = self._tickets.submit([ref], Tier.HOST, priority=self._priority)[0]
                self._tried[digest] = (ticket, now_s)
                self.num_submitted += 1
