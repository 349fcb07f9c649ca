"""Space in etcd: giving freed pages back to the disk, and the way back from a full database.

Compaction frees pages inside a member's file; only defragmentation makes the file smaller, and while it runs, that
member answers nobody. A member whose file reaches its quota raises the NOSPACE alarm, and the whole cluster refuses
writes until the alarm is disarmed; compaction, defragmentation and deletions go on working.
"""

from __future__ import annotations

import asyncio
from typing import Final

from mint_catalog.storage.duty import Duty
from mint_catalog.storage.members import Member, Members
from mint_core.clock import monotonic_s
from mint_core.errors import MintError, Unavailable
from mint_core.log import get_logger

__all__ = ["defragment_roomy", "watch_space"]

_logger = get_logger(__name__)
_INTERVAL_S: Final = 10.0
_RETRY_S: Final = 30.0
_LAST_RETRY_S: Final = 600.0
_CALM_S: Final = 60.0
_WORTH: Final = 0.9
_ROOMY: Final = 0.5


async def defragment_roomy(members: Members, duty: Duty, min_free_bytes: int) -> None:
    """Defragment one member whose file is less than half in use, if that frees enough; the leader only as the last.

    One a turn: the others answer meanwhile, and the next turn finds the next.
    """
    for member in await members.statuses():
        free_bytes = member.size_bytes - member.in_use_bytes
        if free_bytes >= min_free_bytes and member.in_use_bytes < _ROOMY * member.size_bytes:
            await _defragment(members, member, duty.name)
            return


async def _defragment(members: Members, member: Member, why: str) -> None:
    started_s = monotonic_s()
    await members.defragment(member.endpoint)
    fields = {
        "endpoint": member.endpoint,
        "size_bytes": member.size_bytes,
        "in_use_bytes": member.in_use_bytes,
        "took_s": round(monotonic_s() - started_s, 3),
        "why": why,
    }
    _logger.info("an etcd member was defragmented", extra={"fields": fields})


async def watch_space(members: Members, *, interval_s: float = _INTERVAL_S, retry_s: float = _RETRY_S) -> None:
    """Bring a full etcd back to writing as soon as there is room in it, for ever.

    While the alarm is on, members are defragmented: at once, when one says that it has pages to free, and with growing
    pauses from ``retry_s`` to ten minutes, because pages that a compaction freed count as used until the next write,
    which a full etcd does not take. Each time, and when a file has become smaller by hand, the alarm is disarmed; a
    member that still is full turns it on again before a write that does not fit. No duty guards this, since a full
    etcd grants no lease; that two catalogs do it only takes longer.
    """
    trouble: _Trouble | None = None
    while True:
        await asyncio.sleep(interval_s)
        try:
            if not await members.is_full():
                if trouble is not None and monotonic_s() > trouble.disarmed_at_s + _CALM_S:
                    trouble = None
                continue
            if trouble is None:
                trouble = _Trouble(monotonic_s(), retry_s)
                _logger.error(
                    "etcd's database has reached its quota: no writes until history is compacted, something is "
                    "deleted, or the quota is raised"
                )
            if await trouble.made_room(members):
                await members.disarm()
                trouble.disarmed_at_s = monotonic_s()
        except Unavailable:
            continue
        except MintError as error:
            fields = {"reason": error.reason, "error": error.message}
            _logger.warning("a full etcd could not be looked after", extra={"fields": fields})


class _Trouble:
    """One time of being full."""

    def __init__(self, next_at_s: float, pause_s: float) -> None:
        self.disarmed_at_s = next_at_s
        self._next_at_s = next_at_s
        self._pause_s = pause_s
        self._sizes: dict[str, int] = {}

    async def made_room(self, members: Members) -> bool:
        """Do what can be done now; whether it is worth trying to write again."""
        found = await members.statuses()
        roomy = any(member.in_use_bytes < _WORTH * member.size_bytes for member in found)
        if not roomy and monotonic_s() < self._next_at_s:
            return self._became_smaller(found)
        for member in found:
            await _defragment(members, member, "full")
        self._next_at_s = monotonic_s() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LAST_RETRY_S)
        return True

    def _became_smaller(self, found: list[Member]) -> bool:
        """Whether a file is smaller than it was; each time is told once."""
        smaller = any(member.size_bytes < _WORTH * self._sizes.get(member.endpoint, 0) for member in found)
        self._sizes = {member.endpoint: member.size_bytes for member in found}
        return smaller
