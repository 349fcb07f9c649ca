"""The object store over S3, by aiobotocore. One client per process, opened as an async context manager."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import functools
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, Self

from mint_blobs._local import ArrivalDigest, opening_source, write_at, write_whole, writing_target
from mint_blobs._s3_calls import S3Calls, first_error
from mint_blobs._s3_errors import STORE_FAILURES, error_code
from mint_blobs.digests import digest_base64, digest_bytes, digest_hex, format_digest
from mint_blobs.keys import check_key
from mint_blobs.objects import ObjectInfo, PartUpload
from mint_blobs.settings import ObjectStoreSettings
from mint_core import log
from mint_core.errors import (
    Aborted,
    AlreadyExists,
    BlobCorrupt,
    DigestMismatch,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import check_digest
from mint_core.threads import run_to_end

__all__ = ["S3ObjectStore"]

_DIGEST_METADATA = "mint-sha256"
_CHUNK_BYTES = 1 << 20
_MAX_PARTS = 10_000
_SMALL_BYTES = 1 << 20
"""What is not larger is read into memory and written in one go: its steps would cost more than its bytes."""
_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    etag: str
    checksum: str


class S3ObjectStore:
    """An :class:`~mint_blobs.objects.ObjectStore` in one bucket.

    ::

        async with S3ObjectStore(settings.object_store) as store:
            await store.ensure_bucket()
            await store.put_file(key, path, digest=digest)
    """

    def __init__(self, settings: ObjectStoreSettings) -> None:
        self._settings = settings
        self._calls = S3Calls(settings)
        self._bucket = settings.bucket

    async def __aenter__(self) -> Self:
        await self._calls.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._calls.close()

    async def ensure_bucket(self) -> None:
        client = self._calls.client
        async with self._calls.limit(self._settings.operation_timeout_s, "open bucket", self._bucket):
            try:
                await self._calls.call("open bucket", self._bucket, lambda: client.head_bucket(Bucket=self._bucket))
            except NotFound:
                with contextlib.suppress(Aborted):  # another process created it at the same moment
                    await self._calls.call(
                        "create bucket", self._bucket, lambda: client.create_bucket(Bucket=self._bucket)
                    )

    async def put_file(self, key: str, path: Path, *, digest: str, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        check_digest(digest, field="digest")
        with opening_source(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            async with self._calls.limit(self._settings.transfer_timeout_s, "put", key):
                if size_bytes > self._settings.part_size_bytes:
                    return await self._put_parts(key, file, size_bytes, digest, if_absent=if_absent)
                async with self._calls.slots.slot(file):
                    data = await run_to_end(file.read)
                    actual = await run_to_end(digest_bytes, data)
                    if actual != digest:
                        raise _announced(str(path), actual, digest)
                    return await self._put_whole(key, data, digest, if_absent=if_absent)

    async def put_bytes(self, key: str, data: bytes, *, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        async with self._calls.limit(self._settings.operation_timeout_s, "put", key):
            return await self._put_whole(key, data, await run_to_end(digest_bytes, data), if_absent=if_absent)

    async def get_file(
        self, key: str, path: Path, *, digest: str, size_bytes: int | None = None, durable: bool = True
    ) -> None:
        check_key(key)
        check_digest(digest, field="digest")
        async with self._calls.limit(self._settings.transfer_timeout_s, "get", key):
            total = (await self._head(key)).size_bytes if size_bytes is None else size_bytes
            get = self._get_small if total <= min(_SMALL_BYTES, self._settings.range_size_bytes) else self._get_ranges
            try:
                await get(key, path, digest, total, durable=durable)
            except BlobCorrupt as error:
                if "actual_digest" not in error.metadata:
                    raise
                # What TCP's sum of 16 bits let pass on the way is no loss of data.
                _log.warning("object arrived with another digest: reading it again", extra={"fields": {"key": key}})
                await get(key, path, digest, total, durable=durable)

    async def get_bytes(self, key: str, *, digest: str | None = None, max_bytes: int) -> bytes:
        check_key(key)

        def check_size(size_bytes: int) -> None:
            if size_bytes > max_bytes:
                raise ResourceExhausted(
                    f"object {key} has {size_bytes} bytes, allowed are {max_bytes}", metadata={"key": key}
                )

        async with self._calls.limit(self._settings.operation_timeout_s, "get", key):
            data = await self._get_whole(key, check_size)
            if digest is not None:
                actual = await run_to_end(digest_bytes, data)
                if actual != check_digest(digest, field="digest"):
                    raise _corrupt(key, f"digest {actual}", digest, actual_digest=actual)
            return data

    async def verify(self, key: str, *, digest: str, size_bytes: int) -> None:
        check_key(key)
        check_digest(digest, field="digest")
        limit = self._calls.limit(self._settings.transfer_timeout_s, "get", key)
        async with limit, self._calls.slots.slot(limit):
            actual = await self._calls.call("get", key, functools.partial(self._hash_stored, key, size_bytes))
            if actual != digest:
                raise _corrupt(key, f"digest {actual}", digest, actual_digest=actual)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        async with self._calls.limit(self._settings.operation_timeout_s, "head", key):
            try:
                return await self._head(key)
            except NotFound:
                return None

    async def delete(self, key: str) -> None:
        check_key(key)
        client = self._calls.client
        async with self._calls.limit(self._settings.operation_timeout_s, "delete", key):
            with contextlib.suppress(NotFound):
                await self._calls.call("delete", key, lambda: client.delete_object(Bucket=self._bucket, Key=key))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        asked: dict[str, str] = {"Bucket": self._bucket, "Prefix": prefix}
        while True:
            async with self._calls.limit(self._settings.operation_timeout_s, "list", prefix):
                page = await self._calls.call(
                    "list", prefix, functools.partial(self._calls.client.list_objects_v2, **asked)
                )
            for item in page.get("Contents", []):
                yield ObjectInfo(item["Key"], int(item["Size"]), None, item["LastModified"].astimezone(UTC))
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    async def list_part_uploads(self, prefix: str) -> AsyncIterator[PartUpload]:
        asked: dict[str, str] = {"Bucket": self._bucket, "Prefix": prefix}
        while True:
            async with self._calls.limit(self._settings.operation_timeout_s, "list uploads", prefix):
                page = await self._calls.call(
                    "list uploads", prefix, functools.partial(self._calls.client.list_multipart_uploads, **asked)
                )
            for item in page.get("Uploads", []):
                yield PartUpload(item["Key"], item["UploadId"], item["Initiated"].astimezone(UTC))
            if not page.get("IsTruncated"):
                return
            asked |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    async def abort_part_upload(self, upload: PartUpload) -> None:
        where = {"Bucket": self._bucket, "Key": check_key(upload.key), "UploadId": upload.upload_id}
        async with self._calls.limit(self._settings.operation_timeout_s, "abort upload", upload.key):
            with contextlib.suppress(NotFound):
                abort = functools.partial(self._calls.client.abort_multipart_upload, **where)
                await self._calls.call("abort upload", upload.key, abort)

    # Single requests

    async def _head(self, key: str) -> ObjectInfo:
        client = self._calls.client
        answer: Any = await self._calls.call("head", key, lambda: client.head_object(Bucket=self._bucket, Key=key))
        recorded = answer.get("Metadata", {}).get(_DIGEST_METADATA)
        return ObjectInfo(
            key=key,
            size_bytes=int(answer["ContentLength"]),
            digest=f"sha256:{recorded}" if recorded else None,
            modified_at=answer["LastModified"].astimezone(UTC),
        )

    async def _put_whole(self, key: str, data: bytes, digest: str, *, if_absent: bool) -> ObjectInfo:
        put = functools.partial(
            self._calls.client.put_object,
            Bucket=self._bucket,
            Key=key,
            Body=data,
            ChecksumSHA256=digest_base64(digest),
            Metadata={_DIGEST_METADATA: digest_hex(digest)},
            **_condition(if_absent),
        )
        try:
            answer: Any = await self._calls.call("put", key, put)
        except Aborted:
            return await self._same_content(key, len(data), digest)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        modified_at = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return ObjectInfo(key=key, size_bytes=len(data), digest=digest, modified_at=modified_at)

    async def _same_content(self, key: str, size_bytes: int, digest: str) -> ObjectInfo:
        """The object that ``key`` holds, if it is the one that was to be put."""
        try:
            return _matching(await self._head(key), size_bytes, digest)
        except NotFound:
            raise Unavailable(f"key {key} was deleted while it was being put; repeat the call") from None

    async def _hash_stored(self, key: str, size_bytes: int) -> str:
        answer = await self._calls.client.get_object(Bucket=self._bucket, Key=key)
        hasher = hashlib.sha256()
        num_read = 0
        async with answer["Body"] as body:
            if int(answer["ContentLength"]) != size_bytes:
                raise _corrupt(key, f"{answer['ContentLength']} bytes", f"{size_bytes} bytes")
            while chunk := await body.read(_CHUNK_BYTES):
                await run_to_end(hasher.update, chunk)
                num_read += len(chunk)
        if num_read != size_bytes:
            raise Unavailable(f"object {key} broke off after {num_read} of {size_bytes} bytes")
        return format_digest(hasher.digest())

    async def _get_whole(self, key: str, check_size: Callable[[int], None]) -> bytes:
        """All bytes by one request; ``check_size`` is told how many there are before they are read."""

        async def read() -> bytes:
            answer = await self._calls.client.get_object(Bucket=self._bucket, Key=key)
            async with answer["Body"] as body:
                size_bytes = int(answer["ContentLength"])
                check_size(size_bytes)
                data: bytes = await body.read()
            if len(data) != size_bytes:
                raise Unavailable(f"object {key} broke off after {len(data)} of {size_bytes} bytes")
            return data

        return await self._calls.call("get", key, read)

    async def _get_small(self, key: str, path: Path, digest: str, total: int, *, durable: bool) -> None:
        def check_size(size_bytes: int) -> None:
            if size_bytes != total:
                raise _corrupt(key, f"{size_bytes} bytes", f"{total} bytes")

        def check_and_write(data: bytes) -> None:
            if (actual := digest_bytes(data)) != digest:
                raise _corrupt(key, f"digest {actual}", digest, actual_digest=actual)
            write_whole(path, data, durable=durable)

        async with self._calls.slots.slot(check_size):
            data = await self._get_whole(key, check_size)
        await run_to_end(check_and_write, data)

    async def _get_ranges(self, key: str, path: Path, digest: str, total: int, *, durable: bool) -> None:
        async with writing_target(path, durable=durable) as file:
            digesting = ArrivalDigest(file, total, self._settings.range_size_bytes)

            async def fetch(start: int, length: int) -> None:
                await self._read_into(file, key, start, length, total)
                digesting.arrived(start)

            with first_error():
                async with asyncio.TaskGroup() as group:
                    followed = group.create_task(digesting.follow())
                    await self._calls.all_in_slots(
                        functools.partial(fetch, start, length) for start, length in digesting.ranges
                    )
            if (actual := followed.result()) != digest:
                raise _corrupt(key, f"digest {actual}", digest, actual_digest=actual)

    async def _read_into(self, file: BufferedRandom, key: str, start: int, length: int, total: int) -> None:
        """Write ``length`` bytes of the object from ``start`` to the same place in ``file``."""
        whole = length == total
        asked = {} if whole else {"Range": f"bytes={start}-{start + length - 1}"}

        async def read() -> None:
            try:
                answer = await self._calls.client.get_object(Bucket=self._bucket, Key=key, **asked)
            except STORE_FAILURES as error:
                if error_code(error) == "InvalidRange":
                    raise _corrupt(key, f"fewer than {start + length} bytes", f"{total} bytes") from error
                raise
            async with answer["Body"] as body:
                held = answer["ContentLength"] if whole else answer["ContentRange"].rpartition("/")[2]
                if int(held) != total:
                    raise _corrupt(key, f"{held} bytes", f"{total} bytes")
                at = start
                while chunk := await body.read(_CHUNK_BYTES):
                    await run_to_end(write_at, file, chunk, at)
                    at += len(chunk)
            if at != start + length:
                raise Unavailable(f"object {key} broke off after {at - start} of {length} bytes from {start}")

        await self._calls.call("get", key, read)

    # Multipart

    async def _put_parts(
        self, key: str, file: BinaryIO, size_bytes: int, digest: str, *, if_absent: bool
    ) -> ObjectInfo:
        client = self._calls.client
        if if_absent:
            with contextlib.suppress(NotFound):
                return _matching(await self._head(key), size_bytes, digest)
        where = {"Bucket": self._bucket, "Key": key}
        upload = await self._calls.call("put", key, functools.partial(self._begin, where, digest))
        try:
            parts = await self._upload_parts(key, file, size_bytes, digest, upload)
            listed = [{"PartNumber": p.number, "ETag": p.etag, "ChecksumSHA256": p.checksum} for p in parts]
            complete = functools.partial(
                client.complete_multipart_upload,
                **upload,
                MultipartUpload={"Parts": listed},
                **_condition(if_absent),
            )
            await self._calls.call("put", key, complete)
            return await self._same_content(key, size_bytes, digest)
        except (Aborted, NotFound):
            # Another writer was first, or the answer to our own completion was lost and the upload is gone: both are
            # decided by what the key holds now.
            await self._abort(upload)
            return await self._same_content(key, size_bytes, digest)
        except BaseException:  # also when cancelled, no parts may stay behind
            await self._abort(upload)
            raise

    async def _begin(self, where: dict[str, str], digest: str) -> dict[str, str]:
        """One attempt to begin an upload; gives its address.

        A caller that is cancelled while the request is on its way waits for the answer: only the answer names the
        upload that the store may already have begun.
        """
        metadata = {_DIGEST_METADATA: digest_hex(digest)}
        creating: asyncio.Future[Any] = asyncio.ensure_future(
            self._calls.client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256", Metadata=metadata)
        )
        try:
            created = await asyncio.shield(creating)
        except asyncio.CancelledError:
            with contextlib.suppress(*STORE_FAILURES, TimeoutError):
                created = await asyncio.wait_for(creating, self._settings.connect_timeout_s)
                await self._abort({**where, "UploadId": created["UploadId"]})
            raise
        return {**where, "UploadId": created["UploadId"]}

    async def _upload_parts(
        self, key: str, file: BinaryIO, size_bytes: int, digest: str, upload: dict[str, str]
    ) -> builtins.list[_Part]:
        step = max(self._settings.part_size_bytes, -(-size_bytes // _MAX_PARTS))
        whole = hashlib.sha256()

        def next_part() -> tuple[bytes, str]:
            data = file.read(step)
            whole.update(data)
            return data, digest_base64(digest_bytes(data))

        slots = self._calls.slots
        tasks: builtins.list[asyncio.Task[_Part]] = []
        with first_error():
            async with asyncio.TaskGroup() as group:
                for number in range(1, -(-size_bytes // step) + 1):
                    # The slot is taken before the part is read, so that no more parts are in memory than may be on
                    # their way.
                    await slots.acquire(file)
                    try:
                        data, checksum = await run_to_end(next_part)
                    except BaseException:  # also when cancelled, the slot goes back
                        slots.release(file)
                        raise
                    task = group.create_task(self._upload_part(key, number, data, checksum, upload))
                    task.add_done_callback(lambda _: slots.release(file))
                    tasks.append(task)
        actual = format_digest(whole.digest())
        if actual != digest:
            raise _announced(f"the file for {key}", actual, digest)
        return [task.result() for task in tasks]

    async def _upload_part(self, key: str, number: int, data: bytes, checksum: str, upload: dict[str, str]) -> _Part:
        send = functools.partial(
            self._calls.client.upload_part, **upload, PartNumber=number, Body=data, ChecksumSHA256=checksum
        )
        answer: Any = await self._calls.call("put", key, send)
        return _Part(number, answer["ETag"], checksum)

    async def _abort(self, upload: dict[str, str]) -> None:
        """Give the space of an unfinished upload back; best effort, because the put's own outcome is what the caller
        must see."""
        with contextlib.suppress(*STORE_FAILURES):
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._calls.client.abort_multipart_upload(**upload)


def _condition(if_absent: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if if_absent else {}


def _matching(held: ObjectInfo, size_bytes: int, digest: str) -> ObjectInfo:
    if (held.digest, held.size_bytes) != (digest, size_bytes):
        raise AlreadyExists(
            f"key {held.key} already holds other content ({held.digest}, {held.size_bytes} bytes)",
            metadata={"key": held.key},
        )
    return held


def _announced(source: str, actual: str, digest: str) -> DigestMismatch:
    return DigestMismatch(f"{source} has digest {actual}, announced was {digest}: nothing was stored", field="digest")


def _corrupt(key: str, found: str, expected: str, **more: str) -> BlobCorrupt:
    return BlobCorrupt(
        f"object {key} has {found}, expected {expected}: restore it or upload it again",
        metadata={"key": key, "expected": expected, **more},
    )
