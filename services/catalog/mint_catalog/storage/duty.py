"""Duties: jobs that one catalog at a time does, however many there are over one etcd.

A duty is a key ``duties/{name}`` under a lease that is kept alive while the job runs. Its create-revision is a fence:
a job compares it in its transactions (:attr:`Duty.compare`), so one that was stopped past its lease's end and woke up
again changes nothing. Whoever loses the lease is cancelled.

::

    async with Duties(store, keys).hold("gc") as duty:
        await store.txn([duty.compare, ...], [...])
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import Compare, Field, LeaseGone, Put, Store
from mint_core import calls
from mint_core.clock import boottime_s, wall_s
from mint_core.errors import LeaseHeld, LeaseLost, MintError, Unavailable
from mint_core.log import get_logger

__all__ = ["CATALOG_PRINCIPAL", "DEFAULT_TTL_S", "Duties", "Duty", "keep_doing"]

CATALOG_PRINCIPAL: Final = "catalog"
"""Who the catalog's own jobs act as."""

DEFAULT_TTL_S: Final = 15
_logger = get_logger(__name__)
_NUM_RENEWALS: Final = 3
_MIN_SLEEP_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Duty:
    """The right to do a job now."""

    name: str
    key: bytes
    token: int
    """Create-revision of ``key``: the fence."""

    @property
    def compare(self) -> Compare:
        """Holds in a transaction as long as the duty is this one."""
        return Compare(self.key, Field.CREATE, self.token)

    def lost(self) -> LeaseLost:
        """The error for a job whose fence was refused."""
        return LeaseLost(
            f"the duty {self.name} with fence {self.token} was taken over by another catalog; what is left is done "
            "there, or ask again",
            metadata={"resource": f"duties/{self.name}", "fence": str(self.token)},
        )


class Duties:
    """Takes duties over one etcd."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    @contextlib.asynccontextmanager
    async def hold(self, name: str, ttl_s: int = DEFAULT_TTL_S) -> AsyncIterator[Duty]:
        """Hold a duty while the body runs, which is cancelled when its lease is lost.

        Enter and leave it in one task: a generator that yields inside would be cancelled in its caller's hands.
        Raises ``LeaseHeld`` when another job has it, ``LeaseLost`` when the lease ended under the body,
        ``Unavailable``.
        """
        lease = await self._store.grant(ttl_s)
        try:
            duty = await self._take(name, lease)
            async with self._kept_alive(duty, lease, ttl_s):
                yield duty
        finally:
            with contextlib.suppress(MintError):
                await self._store.revoke(lease)

    async def _take(self, name: str, lease: int) -> Duty:
        key = self._keys.duty(name)
        holder = f"{socket.gethostname()}/{os.getpid()}".encode()
        try:
            result = await self._store.txn([Compare(key, Field.CREATE, 0)], [Put(key, holder, lease)])
        except LeaseGone as error:
            raise Unavailable(f"the lease for the duty {name} ended before it was taken; retry") from error
        if not result.succeeded:
            known = (await self._store.get([key])).values[0]
            who = known.value.decode() if known else "another catalog"
            raise LeaseHeld(
                f"the duty {name} is being done by {who}; wait until it is through",
                metadata={"resource": f"duties/{name}"},
            )
        return Duty(name, key, result.revision)

    @contextlib.asynccontextmanager
    async def _kept_alive(self, duty: Duty, lease: int, ttl_s: int) -> AsyncIterator[None]:
        body = asyncio.current_task()
        assert body is not None
        num_cancelled = body.cancelling()
        lost = False

        async def renew() -> None:
            nonlocal lost
            await self._renewing(lease, ttl_s)
            lost = True
            body.cancel()

        with calls.inbound_call(calls.principal(), None):  # the lease outlives a caller's deadline, the body does not
            renewing = asyncio.create_task(renew(), name=f"duty {duty.name}")
        cancelled = False
        try:
            yield
        except asyncio.CancelledError:
            cancelled = True
            if not lost:
                raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            mine_alone = lost and body.uncancel() <= num_cancelled
        if mine_alone:
            raise duty.lost()
        if cancelled:
            raise asyncio.CancelledError

    async def _renewing(self, lease: int, ttl_s: int) -> None:
        """Returns when the lease is lost, or may be: nobody renewed it for its time to live less a margin."""
        renewed_at = boottime_s()
        interval_s = ttl_s / _NUM_RENEWALS
        while True:
            await asyncio.sleep(interval_s)
            asked_at = boottime_s()
            left_s = renewed_at + ttl_s - interval_s / 2 - asked_at
            if left_s <= 0:
                return
            try:
                async with asyncio.timeout(left_s):
                    if not await self._store.keep_alive(lease):
                        return
                renewed_at, interval_s = asked_at, ttl_s / _NUM_RENEWALS
            except (Unavailable, TimeoutError):
                interval_s = max(_MIN_SLEEP_S, min(interval_s, ttl_s / 10))

    async def last_done_s(self, name: str) -> float:
        """When a remembered job was last done, in seconds since the epoch; 0 if never."""
        known = (await self._store.get([self._keys.duty_done(name)])).values[0]
        return float(known.value) if known else 0.0

    async def remember(self, duty: Duty) -> None:
        """Note that the job was done now, for all catalogs. Raises ``LeaseLost``."""
        put = Put(self._keys.duty_done(duty.name), str(int(wall_s())).encode())
        if not (await self._store.txn([duty.compare], [put])).succeeded:
            raise duty.lost()


async def keep_doing(
    duties: Duties,
    name: str,
    job: Callable[[Duty], Awaitable[object]],
    interval_s: float,
    *,
    pending: Callable[[], Awaitable[bool]] | None = None,
    remembered: bool = False,
    ttl_s: int = DEFAULT_TTL_S,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Do a job every ``interval_s``, for ever; an interval in which another catalog has the duty is skipped.

    ``pending`` is a cheap look whether there is anything to do, before the duty is taken. ``remembered`` jobs are done
    once an interval over all catalogs and over restarts, for which the clock is looked at more often; the first time is
    one interval after the first look.
    """
    while True:
        await sleep(max(1.0, min(interval_s / 20, 600.0)) if remembered else interval_s)
        try:
            with calls.inbound_call(CATALOG_PRINCIPAL, None):
                if pending is not None and not await pending():
                    continue
                last_s = await duties.last_done_s(name) if remembered else 0.0
                if 0 <= wall_s() - last_s < interval_s:
                    continue
                async with duties.hold(name, ttl_s) as duty:
                    if last_s or not remembered:
                        await job(duty)
                    if remembered:
                        await duties.remember(duty)
        except (LeaseHeld, Unavailable):
            continue
        except MintError as error:
            fields = {"duty": name, "reason": error.reason, "error": error.message}
            _logger.warning("a duty was not done", extra={"fields": fields})
