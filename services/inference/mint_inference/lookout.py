"""Asks replicas how they are, before requests find out: what they hold, how much they run, and whether they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mint_core import clock, log
from mint_core.errors import MintError
from mint_inference.model import Engines, Replica
from mint_inference.router import Router

__all__ = ["Lookout"]

_MAX_QUESTIONS = 16

_log = log.get_logger(__name__)


class Lookout:
    """Tells the router what replicas say: of each one ``every_s``, of one that is new or under suspicion at once."""

    def __init__(
        self,
        router: Router,
        engines: Engines,
        *,
        every_s: float = 2.0,
        timeout_s: float = 2.0,
        poll_s: float = 0.5,
        now_s: Callable[[], float] = clock.monotonic_s,
    ) -> None:
        self._router = router
        self._engines = engines
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._now_s = now_s
        self._asked: dict[str, tuple[float, float]] = {}
        """Name → registration, and when it was asked."""
        self._questions: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        try:
            while True:
                self._look()
                await asyncio.sleep(self._poll_s)
        finally:
            for question in self._questions.values():
                question.cancel()
            await asyncio.gather(*self._questions.values(), return_exceptions=True)

    def _look(self) -> None:
        now_s = self._now_s()
        replicas = {each.name: each for each in self._router.replicas}
        for name in self._asked.keys() - replicas.keys():
            del self._asked[name]
        for name, replica in replicas.items():
            registered_at_s, asked_at_s = self._asked.get(name, (None, 0.0))
            is_due = registered_at_s != replica.registered_at_s or now_s - asked_at_s >= self._every_s
            if name in self._questions or len(self._questions) >= _MAX_QUESTIONS:
                continue
            if is_due or self._router.is_suspect(replica):
                self._asked[name] = (replica.registered_at_s, now_s)
                self._questions[name] = asyncio.create_task(self._ask(replica, now_s))

    async def _ask(self, replica: Replica, now_s: float) -> None:
        try:
            residency = await self._engines.residency(replica, timeout_s=self._timeout_s)
        except MintError as error:
            self._router.note_failed(replica)
            _log.info(
                "an engine replica does not answer",
                extra={"fields": {"engine_replica": replica.name, "error": error.message}},
            )
        else:
            self._router.note_residency(replica, residency, now_s)
        finally:
            del self._questions[replica.name]
