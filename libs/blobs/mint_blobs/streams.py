"""Streams of unknown length to and from S3, for what is too large for memory and no blob: backups.

Unlike blobs they are not named by a digest and may be replaced; what they hold must tell by itself whether it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

from mint_blobs._s3_calls import S3Calls
from mint_blobs._s3_errors import STORE_FAILURES
from mint_blobs.digests import digest_base64, format_digest
from mint_blobs.keys import check_key
from mint_blobs.settings import ObjectStoreSettings
from mint_core.errors import ResourceExhausted, Unavailable
from mint_core.threads import run_to_end

__all__ = ["StreamWriter", "read_stream", "writing_stream"]

_MAX_PARTS: Final = 10_000


class StreamWriter:
    """Takes bytes; see :func:`writing_stream`."""

    def __init__(self, calls: S3Calls, upload: dict[str, str]) -> None:
        self._calls = calls
        self._upload = upload
        self._pending = bytearray()
        self._parts: list[dict[str, Any]] = []
        self.num_bytes = 0
        """Written so far."""

    async def write(self, data: bytes) -> None:
        """Append ``data``. Raises ``Unavailable`` and the store's other errors; the stream is lost then."""
        self.num_bytes += len(data)
        self._pending += data
        size = self._calls.settings.part_size_bytes
        while len(self._pending) >= size:
            part = bytes(self._pending[:size])
            del self._pending[:size]
            await self._send(part)

    async def _send(self, part: bytes) -> None:
        number = len(self._parts) + 1
        if number > _MAX_PARTS:
            most = _MAX_PARTS * self._calls.settings.part_size_bytes
            raise ResourceExhausted(
                f"{self._upload['Key']} is longer than {most} bytes, {_MAX_PARTS} parts: raise part_size_bytes"
            )
        digest = await run_to_end(hashlib.sha256, part)
        checksum = digest_base64(format_digest(digest.digest()))
        send = functools.partial(
            self._calls.client.upload_part, **self._upload, PartNumber=number, Body=part, ChecksumSHA256=checksum
        )
        async with self._calls.limit(self._calls.settings.transfer_timeout_s, "put", self._upload["Key"]):
            answer: Any = await self._calls.call("put", self._upload["Key"], send)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum})

    async def finish(self) -> None:
        if self._pending or not self._parts:
            await self._send(bytes(self._pending))
        complete = functools.partial(
            self._calls.client.complete_multipart_upload, **self._upload, MultipartUpload={"Parts": self._parts}
        )
        async with self._calls.limit(self._calls.settings.operation_timeout_s, "put", self._upload["Key"]):
            await self._calls.call("put", self._upload["Key"], complete)


@contextlib.asynccontextmanager
async def writing_stream(settings: ObjectStoreSettings, key: str) -> AsyncIterator[StreamWriter]:
    """The object appears, whole, when the block ends well; if it raises, nothing does.

    Memory is bounded by two parts of ``settings.part_size_bytes``. Raises the errors of
    :class:`~mint_blobs.objects.ObjectStore`.
    """
    check_key(key)
    calls = S3Calls(settings)
    await calls.open()
    try:
        where = {"Bucket": settings.bucket, "Key": key}
        begin = functools.partial(calls.client.create_multipart_upload, **where, ChecksumAlgorithm="SHA256")
        async with calls.limit(settings.operation_timeout_s, "put", key):
            created: Any = await calls.call("put", key, begin)
        upload = {**where, "UploadId": created["UploadId"]}
        writer = StreamWriter(calls, upload)
        try:
            yield writer
            await writer.finish()
        except BaseException:  # also when interrupted, no parts may stay behind
            with contextlib.suppress(*STORE_FAILURES):
                await calls.client.abort_multipart_upload(**upload)
            raise
    finally:
        await calls.close()


async def read_stream(settings: ObjectStoreSettings, key: str) -> AsyncGenerator[bytes, None]:
    """The content in ranges of ``settings.range_size_bytes``, each tried again where its failure may pass.

    Raises ``NotFound``, ``Unavailable`` and the errors of :class:`~mint_blobs.objects.ObjectStore`.
    """
    check_key(key)
    calls = S3Calls(settings)
    await calls.open()
    try:
        where = {"Bucket": settings.bucket, "Key": key}
        async with calls.limit(settings.operation_timeout_s, "head", key):
            head: Any = await calls.call("head", key, functools.partial(calls.client.head_object, **where))
        size_bytes, step = int(head["ContentLength"]), settings.range_size_bytes

        async def read(start: int, length: int) -> bytes:
            answer = await calls.client.get_object(
                **where, Range=f"bytes={start}-{start + length - 1}", IfMatch=head["ETag"]
            )
            async with answer["Body"] as body:
                data: bytes = await body.read()
            if len(data) != length:
                raise Unavailable(f"object {key} broke off after {len(data)} of {length} bytes from {start}")
            return data

        for start in range(0, size_bytes, step):
            length = min(step, size_bytes - start)
            async with calls.limit(settings.transfer_timeout_s, "get", key):
                yield await calls.call("get", key, functools.partial(read, start, length))
    finally:
        await calls.close()
