"""Hot adapters are copied to a second replica before the first one is full, so that nobody waits for the copy."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from mint_core import calls, clock, log
from mint_core.errors import MintError
from mint_inference.model import Loaders, Replica, Resolution
from mint_inference.router import Router

__all__ = ["Copies"]

_PAUSE_S = 10.0
_MAX_REMEMBERED = 1000

_log = log.get_logger(__name__)


class Copies:
    """Loads in the background; at most ``max_copies`` at one time, and of one adapter one. Nobody waits for them, and
    none that fails is tried again for ``pause_s``."""

    def __init__(
        self,
        router: Router,
        loaders: Loaders,
        *,
        max_copies: int = 2,
        pause_s: float = _PAUSE_S,
        now_s: Callable[[], float] = clock.monotonic_s,
    ) -> None:
        self._router = router
        self._loaders = loaders
        self._max_copies = max_copies
        self._pause_s = pause_s
        self._now_s = now_s
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed_at_s: OrderedDict[str, float] = OrderedDict()

    def consider(self, holder: Replica, tenant: str, resolution: Resolution) -> None:
        """A request is served by the holder of its adapter: copy the adapter if that is called for."""
        digest = resolution.digest
        if not digest or digest in self._running or len(self._running) >= self._max_copies:
            return
        if self._now_s() - self._failed_at_s.get(digest, float("-inf")) < self._pause_s:
            return
        place = self._router.place_for_copy(holder, digest)
        if place is not None:
            copy = self._running[digest] = asyncio.create_task(self._copy(place, tenant, resolution))
            copy.add_done_callback(lambda _: self._running.pop(digest, None))

    async def close(self) -> None:
        """End those under way."""
        copies = list(self._running.values())
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)

    async def _copy(self, place: Replica, tenant: str, resolution: Resolution) -> None:
        fields = {"engine_replica": place.name, "digest": resolution.digest}
        try:
            # Not bound to the deadline of the request that brought it up.
            with calls.inbound_call(calls.principal(), None):
                await self._loaders.ensure(place, tenant, resolution)
        except MintError as error:
            self._failed_at_s[resolution.digest] = self._now_s()
            self._failed_at_s.move_to_end(resolution.digest)
            while len(self._failed_at_s) > _MAX_REMEMBERED:
                self._failed_at_s.popitem(last=False)
            _log.info("a hot adapter was not copied", extra={"fields": fields | {"error": error.message}})
        else:
            self._router.note_resident(place, resolution.digest)
            _log.info("a hot adapter was copied", extra={"fields": fields})
