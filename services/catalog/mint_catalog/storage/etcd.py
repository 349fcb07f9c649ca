"""The key-value contract over a real etcd: every call with a deadline, every error one of ours.

``etcd3aio`` supplies the generated stubs and messages of etcd's API. Its own retries are not used: it repeats a
transaction whose first try may have been applied, which turns a success into a failed compare; and its watch resumes
from the store's head after a reconnect, which loses events. Here reads are retried, writes never, and
:mod:`mint_catalog.storage.watch` owns the watch.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb

from mint_catalog.settings import EtcdSettings
from mint_catalog.storage.store import (
    Compare,
    Delete,
    DeleteRange,
    Field,
    KeyValue,
    LeaseGone,
    Operation,
    Put,
    ReadResult,
    Revision,
    ScanResult,
    TxnResult,
)
from mint_catalog.storage.watch import watch
from mint_core.calls import remaining_s
from mint_core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    MintError,
    OutOfRange,
    ResourceExhausted,
    RevisionCompacted,
    Unavailable,
)
from mint_core.log import get_logger

__all__ = ["METADATA", "EtcdStore", "channel_to", "translate"]

_logger = get_logger(__name__)
_T = TypeVar("_T")

_READ_BACKOFF_S: Final = (0.05, 0.2)
_OLDEST: Final = (3, 4, 22)
_CORRUPTING: Final = ((3, 5, 0), (3, 5, 2))
# A member without a leader answers "no leader" at once instead of serving a watch that stands still.
METADATA: Final = grpc.aio.Metadata(("hasleader", "true"))
_CHANNEL_OPTIONS: Final = [
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC's own maximum of two minutes between connection attempts would outlast most outages of etcd.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
_UNAVAILABLE_CODES: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)


def translate(error: grpc.aio.AioRpcError, what: str) -> MintError | LeaseGone:
    """The error of ours that an error of etcd's means; ``what`` tells which call failed."""
    code, details = error.code(), error.details() or ""
    if "has been compacted" in details:
        return RevisionCompacted("the catalog revision asked for was compacted away; list again")
    if "future revision" in details:
        return OutOfRange("the catalog revision asked for lies in the future; list again")
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseGone(details)
    if "database space exceeded" in details:
        return ResourceExhausted(
            "etcd's database has reached its quota and takes no writes; compact and defragment it or raise the quota"
        )
    if "request is too large" in details:
        return ResourceExhausted("the record is larger than etcd takes in one request (1.5 MB); make it smaller")
    if code in _UNAVAILABLE_CODES or code in (
        grpc.StatusCode.FAILED_PRECONDITION,  # "not leader"
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # "too many requests"
    ):
        return Unavailable(f"etcd did not answer {what} ({code.name}: {details}); retry")
    return FailedPrecondition(f"etcd refused {what} ({code.name}: {details}); check its configuration")


def _compare(compare: Compare) -> pb.Compare:
    if compare.field is Field.VALUE:
        return pb.Compare(key=compare.key, target=pb.Compare.VALUE, result=pb.Compare.EQUAL, value=compare.value)
    if compare.field is Field.CREATE:
        return pb.Compare(
            key=compare.key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=compare.revision
        )
    return pb.Compare(key=compare.key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=compare.revision)


def _operation(operation: Operation) -> pb.RequestOp:
    match operation:
        case Put(key, value, lease):
            return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        case Delete(key):
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
        case DeleteRange(start, end):
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=start, range_end=end))


def _get(keys: Sequence[bytes], *, revision: int = 0, serializable: bool = False) -> tuple[str, Any]:
    """The method and the request that read these keys."""
    if len(keys) == 1:
        return "Range", pb.RangeRequest(key=keys[0], revision=revision, serializable=serializable)
    ranges = [pb.RangeRequest(key=key, revision=revision, serializable=serializable) for key in keys]
    return "Txn", pb.TxnRequest(success=[pb.RequestOp(request_range=each) for each in ranges])


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _target(endpoints: Sequence[str]) -> str:
    """gRPC's name for one host, or for a list of addresses (it takes no list of host names)."""
    if len(endpoints) == 1:
        return f"dns:///{endpoints[0]}"
    addresses = []
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        addresses.append(f"{socket.gethostbyname(host)}:{port}")
    return f"ipv4:{','.join(addresses)}"


def channel_to(settings: EtcdSettings) -> grpc.aio.Channel:
    """A channel to the members that the settings name, by turns."""
    target = _target(settings.endpoints)
    options: list[tuple[str, Any]] = list(_CHANNEL_OPTIONS)
    if settings.ca_file is None:
        return grpc.aio.insecure_channel(target, options=options)
    if settings.server_name is not None:
        options.append(("grpc.ssl_target_name_override", settings.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=settings.ca_file.read_bytes(),
        private_key=settings.key_file.read_bytes() if settings.key_file else None,
        certificate_chain=settings.cert_file.read_bytes() if settings.cert_file else None,
    )
    return grpc.aio.secure_channel(target, credentials, options=options)


class EtcdStore:
    """:class:`~mint_catalog.storage.store.Store` over one etcd cluster. Close it, or use it as a context manager."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._channel = channel_to(settings)
        self._kv = pb.KVStub(self._channel)
        self._lease = pb.LeaseStub(self._channel)
        self._maintenance = pb.MaintenanceStub(self._channel)
        self._watch = pb.WatchStub(self._channel)
        self._wrote: list[Callable[[Sequence[Operation], int], None]] = []
        self._seen_revision = 0

    async def __aenter__(self) -> EtcdStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running calls end with ``Unavailable``."""
        await self._channel.close()

    async def check_version(self) -> str:
        """Return etcd's version; raise one clear sentence if it is unreachable or unfit, warn if it is known bad."""
        where = ", ".join(self._settings.endpoints)
        try:
            status = await self._call(self._maintenance.Status, pb.StatusRequest(), "Status", wait_for_ready=True)
        except Unavailable as error:
            raise Unavailable(
                f"etcd at {where} does not answer within {self._settings.call_timeout_s:g} s: start it, or set "
                "etcd.endpoints to where it listens"
            ) from error
        version: str = status.version
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        number = tuple(int(part) for part in match.groups()) if match else (0, 0, 0)
        if number < _OLDEST:
            raise FailedPrecondition(f"etcd at {where} is version {version}: the catalog needs 3.4.22 or newer")
        if _CORRUPTING[0] <= number <= _CORRUPTING[1]:
            _logger.warning(
                "etcd 3.5.0 to 3.5.2 can corrupt its data when killed under load; use 3.4.22+ or 3.5.3+",
                extra={"fields": {"endpoints": where, "version": version}},
            )
        return version

    def _timeout_s(self) -> float:
        remaining = remaining_s()
        if remaining is None:
            return self._settings.call_timeout_s
        if remaining <= 0:
            raise DeadlineExceeded("the call's deadline passed before etcd was asked")
        return min(remaining, self._settings.call_timeout_s)

    async def _call(
        self, method: Callable[..., Awaitable[_T]], request: object, what: str, *, wait_for_ready: bool = False
    ) -> _T:
        try:
            return await method(request, timeout=self._timeout_s(), metadata=METADATA, wait_for_ready=wait_for_ready)
        except grpc.aio.AioRpcError as error:
            raise translate(error, what) from error

    async def _read(self, method: Callable[..., Awaitable[_T]], request: object, what: str) -> _T:
        """A call that may be repeated."""
        for backoff_s in _READ_BACKOFF_S:
            try:
                return await self._call(method, request, what)
            except Unavailable:
                await asyncio.sleep(backoff_s)
        return await self._call(method, request, what)

    @property
    def seen_revision(self) -> int:
        return self._seen_revision

    def _saw(self, answer: Any) -> int:
        """The revision that an answer is of."""
        revision: int = answer.header.revision
        if revision > self._seen_revision:
            self._seen_revision = revision
        return revision

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> ReadResult:
        method, request = _get(keys, revision=revision)
        return self._got(await self._read(getattr(self._kv, method), request, "a read"))

    async def get_nearby(self, keys: Sequence[bytes]) -> ReadResult:
        # Not repeated: who cannot have it from one member asks them all.
        method, request = _get(keys, serializable=True)
        return self._got(await self._call(getattr(self._kv, method), request, "a read"))

    def _got(self, answer: Any) -> ReadResult:
        revision = self._saw(answer)
        if isinstance(answer, pb.RangeResponse):
            return ReadResult((_key_value(answer.kvs[0]) if answer.kvs else None,), revision)
        found = [response.response_range.kvs for response in answer.responses]
        return ReadResult(tuple(_key_value(kvs[0]) if kvs else None for kvs in found), revision)

    async def scan(
        self, start: bytes, end: bytes, *, limit: int, revision: int = 0, keys_only: bool = False
    ) -> ScanResult:
        request = pb.RangeRequest(key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only)
        answer = await self._read(self._kv.Range, request, "a scan")
        return ScanResult(tuple(_key_value(kv) for kv in answer.kvs), answer.more, self._saw(answer))

    async def scan_each(
        self, ranges: Sequence[tuple[bytes, bytes]], *, limit: int, revision: int = 0
    ) -> list[ScanResult]:
        requests = [
            pb.RequestOp(request_range=pb.RangeRequest(key=start, range_end=end, limit=limit, revision=revision))
            for start, end in ranges
        ]
        result = await self._read(self._kv.Txn, pb.TxnRequest(success=requests), "a scan of several ranges")
        answers = [response.response_range for response in result.responses]
        read_at = self._saw(result)
        return [ScanResult(tuple(_key_value(kv) for kv in answer.kvs), answer.more, read_at) for answer in answers]

    async def count(self, start: bytes, end: bytes, *, revision: int = 0) -> int:
        request = pb.RangeRequest(key=start, range_end=end, revision=revision, count_only=True)
        number: int = (await self._read(self._kv.Range, request, "a count")).count
        return number

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        request = pb.TxnRequest(
            compare=[_compare(compare) for compare in compares],
            success=[_operation(operation) for operation in operations],
        )
        answer = await self._call(self._kv.Txn, request, "a transaction, which may have been applied")
        revision = self._saw(answer)
        if answer.succeeded:
            for tell in self._wrote:
                tell(operations, revision)
        return TxnResult(answer.succeeded, revision)

    def on_write(self, tell: Callable[[Sequence[Operation], int], None]) -> None:
        """Tell of each transaction that was applied, with its revision, before anybody here knows that it was."""
        self._wrote.append(tell)

    async def grant(self, ttl_s: int) -> int:
        answer = await self._call(self._lease.LeaseGrant, pb.LeaseGrantRequest(TTL=ttl_s), "a lease grant")
        lease: int = answer.ID
        return lease

    async def keep_alive(self, lease: int) -> bool:
        async def one() -> AsyncIterator[pb.LeaseKeepAliveRequest]:
            yield pb.LeaseKeepAliveRequest(ID=lease)

        stream = self._lease.LeaseKeepAlive(one(), timeout=self._timeout_s(), metadata=METADATA)
        try:
            async for answer in stream:
                return bool(answer.TTL > 0)
        except grpc.aio.AioRpcError as error:
            raise translate(error, "a lease renewal") from error
        finally:
            stream.cancel()
        raise Unavailable("etcd ended a lease renewal without an answer; retry")

    async def revoke(self, lease: int) -> None:
        try:
            await self._call(self._lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease), "a lease revocation")
        except LeaseGone:
            return

    async def compact(self, revision: int) -> None:
        try:
            await self._call(self._kv.Compact, pb.CompactionRequest(revision=revision), "a compaction")
        except RevisionCompacted:
            return  # another catalog was first

    def watch(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[Revision, None]:
        return watch(self._watch, start, end, after=after)
