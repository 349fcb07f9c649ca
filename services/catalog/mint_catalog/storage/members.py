"""etcd's members one by one: how full each is, defragmentation, and the alarm of a full database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio
from etcd3aio import _protobuf as pb

from mint_catalog.settings import EtcdSettings
from mint_catalog.storage.etcd import METADATA, channel_to, translate
from mint_catalog.storage.store import LeaseGone
from mint_core.errors import Unavailable

__all__ = ["Member", "Members"]

_DEFRAGMENT_TIMEOUT_S: Final = 600.0
_NOSPACE: Final = 1
"""etcd's ``AlarmType.NOSPACE``."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the cluster."""

    endpoint: str
    size_bytes: int
    """Size of its database file."""
    in_use_bytes: int
    """Of it, what a defragmented file would take."""
    is_leader: bool


class Members:
    """Asks each endpoint of the settings by itself."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings

    @contextlib.asynccontextmanager
    async def _maintenance(self, endpoint: str, what: str) -> AsyncIterator[Any]:
        settings = self._settings.model_copy(update={"endpoints": [endpoint]})
        async with channel_to(settings) as channel:
            try:
                yield pb.MaintenanceStub(channel)
            except grpc.aio.AioRpcError as error:
                translated = translate(error, f"{what} of the member at {endpoint}")
                if isinstance(translated, LeaseGone):
                    raise Unavailable(str(translated)) from error
                raise translated from error

    async def statuses(self) -> list[Member]:
        """Every member that answers, the leader last."""
        found = await asyncio.gather(*map(self._status, self._settings.endpoints), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, Unavailable):
                raise error
        return sorted((each for each in found if isinstance(each, Member)), key=lambda member: member.is_leader)

    async def _status(self, endpoint: str) -> Member:
        async with self._maintenance(endpoint, "the status") as stub:
            status = await stub.Status(pb.StatusRequest(), timeout=self._settings.call_timeout_s)
        is_leader = status.leader == status.header.member_id
        return Member(endpoint, status.dbSize, status.dbSizeInUse, is_leader)

    async def defragment(self, endpoint: str) -> None:
        """Let a member write its file anew; it answers nothing else meanwhile. Raises ``Unavailable``."""
        async with self._maintenance(endpoint, "a defragmentation") as stub:
            await stub.Defragment(pb.DefragmentRequest(), timeout=_DEFRAGMENT_TIMEOUT_S)

    async def is_full(self) -> bool:
        """Whether the NOSPACE alarm is on. Raises ``Unavailable`` when no member answers."""
        return any(alarm.alarm == _NOSPACE for alarm in (await self._alarm(pb.AlarmRequest.GET)).alarms)

    async def disarm(self) -> None:
        """Turn the NOSPACE alarm off; a member that still is full turns it on again at its next write."""
        for alarm in (await self._alarm(pb.AlarmRequest.GET)).alarms:
            if alarm.alarm == _NOSPACE:
                await self._alarm(pb.AlarmRequest.DEACTIVATE, alarm.memberID)

    async def _alarm(self, action: int, member: int = 0) -> Any:
        request = pb.AlarmRequest(action=action, memberID=member, alarm=_NOSPACE)
        for number, endpoint in enumerate(self._settings.endpoints, 1):
            try:
                async with self._maintenance(endpoint, "an alarm request") as stub:
                    return await stub.Alarm(request, timeout=self._settings.call_timeout_s, metadata=METADATA)
            except Unavailable:
                if number == len(self._settings.endpoints):
                    raise
        raise Unavailable("etcd has no endpoint")
