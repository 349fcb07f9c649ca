"""What all groups share: channels opened when first needed, and iteration over pages."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from mint_core.channel import connect
from mint_core.errors import FailedPrecondition

__all__ = ["Connection", "new_request_id", "pages"]

T = TypeVar("T")


def new_request_id() -> str:
    """A UUID4 for one changing call: the transport may repeat the call, the server applies it once."""
    return str(uuid.uuid4())


class Connection:
    """One service's address and its channel, opened at the first call."""

    def __init__(self, service: str, address: str) -> None:
        self._service = service
        self._address = address
        self._channel: Any = None
        self._stubs: dict[Callable[[Any], Any], Any] = {}

    def stub(self, make: Callable[[Any], T]) -> T:
        """A stub on the channel. Raises :class:`FailedPrecondition` if the client was given no address."""
        if self._channel is None:
            if not self._address:
                raise FailedPrecondition(
                    f"this client has no address of the {self._service} service: give it one, "
                    f"e.g. Endpoints({self._service}='127.0.0.1:7000')"
                )
            self._channel = connect(self._address)
        if make not in self._stubs:  # making one makes all of its methods: a good part of what a small call costs
            self._stubs[make] = make(self._channel)
        stub: T = self._stubs[make]
        return stub

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
            self._stubs.clear()


async def pages(read: Callable[[str], Awaitable[Any]], field: str) -> AsyncIterator[Any]:
    """Every item of a paged list; ``read`` takes a page token and answers a response with ``next_page_token``."""
    token = ""
    while True:
        response = await read(token)
        for item in getattr(response, field):
            yield item
        token = response.next_page_token
        if not token:
            return
