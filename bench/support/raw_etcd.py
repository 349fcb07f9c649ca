"""etcd without MinT: what the catalog is measured against, by grpc.aio stubs like the catalog's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from collections.abc import AsyncIterator

import grpc
from etcd3aio import _protobuf as pb

__all__ = ["RawEtcd"]

_TIMEOUT_S = 30.0


class RawEtcd:
    """A client of one etcd; use it as an async context manager."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._channel = grpc.aio.insecure_channel(endpoint, options=[("grpc.max_receive_message_length", -1)])
        self._kv = pb.KVStub(self._channel)
        self._watch = pb.WatchStub(self._channel)
        self._maintenance = pb.MaintenanceStub(self._channel)

    async def __aenter__(self) -> RawEtcd:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def get(self, key: bytes) -> bytes | None:
        answer = await self._kv.Range(pb.RangeRequest(key=key), timeout=_TIMEOUT_S)
        return answer.kvs[0].value if answer.kvs else None

    async def put(self, key: bytes, value: bytes) -> None:
        await self._kv.Put(pb.PutRequest(key=key, value=value), timeout=_TIMEOUT_S)

    async def page(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """At most ``limit`` keys and values of a range, as a listing reads them."""
        request = pb.RangeRequest(key=start, range_end=end, limit=limit)
        answer = await self._kv.Range(request, timeout=_TIMEOUT_S)
        return [(kv.key, kv.value) for kv in answer.kvs]

    async def size_bytes(self, *, in_use: bool = True) -> int:
        """Size of the database, by default without its free pages."""
        status = await self._maintenance.Status(pb.StatusRequest(), timeout=_TIMEOUT_S)
        return int(status.dbSizeInUse if in_use else status.dbSize)

    async def num_ranges(self) -> int:
        """Range requests served so far, those inside transactions included."""
        text = await asyncio.to_thread(self._metrics)
        lines = [line for line in text.splitlines() if line.startswith("etcd_mvcc_range_total")]
        return int(float(lines[0].split()[-1]))

    def _metrics(self) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self._endpoint}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    async def put_to_watch_s(self, num_puts: int, key: bytes = b"/bench/watched") -> list[float]:
        """Seconds from the call of each put to the event at a watcher."""
        seen: asyncio.Queue[float] = asyncio.Queue()
        ready = asyncio.Event()
        taken: list[float] = []
        async with self._watching(key, ready, seen):
            await ready.wait()
            for number in range(num_puts):
                begun = time.perf_counter()
                await self.put(key, str(number).encode())
                taken.append(await seen.get() - begun)
        return taken

    @contextlib.asynccontextmanager
    async def _watching(self, key: bytes, ready: asyncio.Event, seen: asyncio.Queue[float]) -> AsyncIterator[None]:
        done = asyncio.Event()

        async def requests() -> AsyncIterator[pb.WatchRequest]:
            yield pb.WatchRequest(create_request=pb.WatchCreateRequest(key=key))
            await done.wait()

        async def watch() -> None:
            async for answer in self._watch.Watch(requests()):
                ready.set()
                for _ in answer.events:
                    seen.put_nowait(time.perf_counter())

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            done.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await task
