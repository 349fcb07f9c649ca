"""Files to and from an object store, as fast as this machine's sockets: for a competitor that checks nothing.

Requests are signed beforehand (a presigned URL), so that no byte of the payload is hashed; the kernel sends files by
itself; several files go at one time.
"""

from __future__ import annotations

import http.client
import os
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mint_blobs.settings import ObjectStoreSettings

__all__ = ["PlainS3"]

_BUFFER_BYTES = 4 << 20
_ATTEMPTS = 3


class PlainS3:
    """One bucket."""

    def __init__(self, settings: ObjectStoreSettings, *, num_threads: int = 4) -> None:
        import botocore.config
        import botocore.session

        self._settings = settings
        self._threads = ThreadPoolExecutor(num_threads)
        self._client: Any = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key.get_secret_value(),
            config=botocore.config.Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def put_files(self, files: Mapping[str, Path]) -> None:
        """Store each file under its key; what the store fails at is tried again."""
        list(self._threads.map(lambda item: self._put(*item), files.items()))

    def get_files(self, files: Mapping[str, Path]) -> None:
        """Write each object to its file, synced."""
        list(self._threads.map(lambda item: self._get(*item), files.items()))

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self._client.delete_object(Bucket=self._settings.bucket, Key=key)

    def _connection(self) -> http.client.HTTPConnection:
        address = urllib.parse.urlsplit(self._settings.endpoint_url)
        assert address.hostname is not None
        return http.client.HTTPConnection(address.hostname, address.port, blocksize=_BUFFER_BYTES, timeout=600)

    def _target(self, call: str, key: str) -> str:
        url = self._client.generate_presigned_url(call, Params={"Bucket": self._settings.bucket, "Key": key})
        parts = urllib.parse.urlsplit(url)
        return f"{parts.path}?{parts.query}"

    def _put(self, key: str, path: Path) -> None:
        for _ in range(_ATTEMPTS):
            status, content = self._try_put(key, path)
            if status == 200:
                return
            if status < 500:
                break
        raise RuntimeError(f"put of {key} answered {status}: {content[:300]!r}")

    def _try_put(self, key: str, path: Path) -> tuple[int, bytes]:
        connection = self._connection()
        with path.open("rb") as file:
            connection.putrequest("PUT", self._target("put_object", key))
            connection.putheader("Content-Length", str(os.fstat(file.fileno()).st_size))
            connection.endheaders()
            connection.sock.sendfile(file)
            answer = connection.getresponse()
            content = answer.read()
        connection.close()
        return answer.status, content

    def _get(self, key: str, path: Path) -> None:
        connection = self._connection()
        connection.request("GET", self._target("get_object", key))
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"get of {key} answered {answer.status}: {answer.read()[:300]!r}")
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        with path.open("wb", buffering=0) as file:
            while length := answer.readinto(buffer):
                file.write(buffer[:length])
            os.fsync(file.fileno())
        connection.close()
