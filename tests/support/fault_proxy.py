"""A TCP proxy before an HTTP server that can be slow, silent, cut off, busy or away, as the test says, at any moment.

In the loop of a test::

    async with FaultProxy(weed.endpoint_url) as proxy:
        proxy.faults = Faults(stall_after_bytes=0)
        ...
        proxy.heal()

or as a process of its own, for measurements: ``python -m support.fault_proxy URL --mb-per-s 25`` prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import struct
import sys
import urllib.parse
from dataclasses import dataclass
from typing import Self

__all__ = ["FaultProxy", "Faults"]

_CHUNK_BYTES = 64 * 1024
_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_BUSY_BODY = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BUSY_BODY), _BUSY_BODY)
)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong between server and client; nothing by itself."""

    latency_s: float = 0.0
    """Before each answer."""
    bytes_per_s: float = 0.0
    """Of one connection towards the client; 0 means as fast as it goes."""
    stall_after_bytes: int | None = None
    """An answer stands still after so many bytes; with 0 the server seems to say nothing at all."""
    reset_after_bytes: int | None = None
    """An answer is cut off by a reset of its connection after so many bytes."""
    flip_at: int | None = None
    """One bit of this byte of an answer, its HTTP header included, arrives as its opposite."""
    num_flips: int = 1
    """In so many answers."""
    busy: bool = False
    """Every request is answered 503 SlowDown, as S3 does."""
    only: str = ""
    """Only requests whose path holds this are concerned."""


class FaultProxy:
    """Listens on a loopback port of its own, which it keeps while it is down."""

    def __init__(self, url: str, faults: Faults | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server_address = (parts.hostname, parts.port)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._faults = faults or Faults()
        self._flips_left = self._faults.num_flips
        self._changed = asyncio.Event()
        self._clients: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self.num_requests = 0
        self.num_afflicted = 0
        """Requests that a fault was in force for when they came."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def faults(self) -> Faults:
        """In force now, for open connections too."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self._flips_left = faults.num_flips
        self._changed.set()

    def heal(self) -> None:
        self.faults = Faults()

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.down()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def up(self) -> None:
        """Listen again after :meth:`down`."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self._port, limit=1 << 20)
        self._port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections and reset the open ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    def reset(self) -> None:
        """Reset every open connection."""
        for writer in list(self._clients):
            _reset(writer)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self._clients.add(writer)
        try:
            # A connection that breaks on either side is the end of both and no error of a proxy.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            self._handlers.discard(task)
            self._clients.discard(writer)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self._server_address, limit=1 << 20)
        connection = _Connection(self, writer)
        up = asyncio.create_task(connection.requests(reader, to_server))
        down = asyncio.create_task(connection.answers(from_server))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_server.close()  # first: this may be cancelled itself while it waits below
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)


class _Connection:
    def __init__(self, proxy: FaultProxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._path = ""
        self._is_answer_new = True
        self._num_bytes = 0
        """Of the present answer."""

    @property
    def _faults(self) -> Faults:
        faults = self._proxy.faults
        return faults if faults.only in self._path else Faults()

    async def requests(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while data := await client.read(_CHUNK_BYTES):
            if match := _REQUEST.match(data):
                self._path = match[2].decode(errors="replace")
                self._is_answer_new, self._num_bytes = True, 0
                self._proxy.num_requests += 1
                self._proxy.num_afflicted += self._faults != Faults()
                if self._faults.busy:
                    self._client.write(_BUSY)
                    await self._client.drain()
                    return
            to_server.write(data)
            await to_server.drain()

    async def answers(self, from_server: asyncio.StreamReader) -> None:
        while data := await from_server.read(_CHUNK_BYTES):
            if self._is_answer_new:
                self._is_answer_new = False
                await asyncio.sleep(self._faults.latency_s)
            while data:
                piece, data = self._next_piece(data)
                if not piece and self._faults.reset_after_bytes is not None:
                    _reset(self._client)
                    return
                if not piece:
                    self._proxy._changed.clear()
                    await self._proxy._changed.wait()
                self._client.write(self._flipped(piece))
                self._num_bytes += len(piece)
                await self._client.drain()
                if rate := self._faults.bytes_per_s:
                    await asyncio.sleep(len(piece) / rate)

    def _flipped(self, piece: bytes) -> bytes:
        at = self._faults.flip_at
        if at is None or not self._num_bytes <= at < self._num_bytes + len(piece) or not self._proxy._flips_left:
            return piece
        self._proxy._flips_left -= 1
        damaged = bytearray(piece)
        damaged[at - self._num_bytes] ^= 1
        return bytes(damaged)

    def _next_piece(self, data: bytes) -> tuple[bytes, bytes]:
        """What may go on now, and the rest; nothing if the answer ends or stands still here."""
        faults, end = self._faults, len(data)
        for limit in (faults.reset_after_bytes, faults.stall_after_bytes):
            if limit is not None:
                end = min(end, max(0, limit - self._num_bytes))
        if faults.bytes_per_s:
            end = min(end, max(1, int(faults.bytes_per_s / 20)))
        return data[:end], data[end:]


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        # Closing without lingering sends RST instead of FIN.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _serve(url: str, faults: Faults) -> None:
    async with FaultProxy(url, faults) as proxy:
        sys.stdout.write(f"{proxy.url}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A proxy with a limit of bandwidth for each connection.")
    parser.add_argument("url")
    parser.add_argument("--mb-per-s", type=float, default=0.0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    faults = Faults(latency_s=options.latency_ms / 1000, bytes_per_s=options.mb_per_s * 1e6)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.url, faults))


if __name__ == "__main__":
    main()
