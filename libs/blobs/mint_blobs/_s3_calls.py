"""One aiobotocore client with attempts, time limits and bounded parallelism around every request."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from mint_blobs._s3_errors import STORE_FAILURES, translate
from mint_blobs._slots import TransferSlots
from mint_blobs.settings import ObjectStoreSettings
from mint_core.errors import FailedPrecondition, MintError, Unavailable

__all__ = ["S3Calls", "first_error"]

_T = TypeVar("_T")
_MAX_BACKOFF_S = 2.0


class S3Calls:
    """The client of one bucket; ``slots`` bounds the requests that carry file bytes."""

    def __init__(self, settings: ObjectStoreSettings) -> None:
        self.settings = settings
        self.slots = TransferSlots(settings.max_concurrency)
        self._stack = contextlib.AsyncExitStack()
        self._client: Any = None

    async def open(self) -> None:
        """Create the client; makes no request."""
        settings = self.settings
        config = AioConfig(
            # The usual one, with all that it says of this machine, is put together anew for each request.
            user_agent="mint",
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            # Attempts are counted here and not in botocore, because a body that breaks off must be retried too.
            retries={"total_max_attempts": 1},
            max_pool_connections=settings.max_concurrency + 8,
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            # Checksums are ours: SHA-256 on the way up, the caller's digest on the way down.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._client = await self._stack.enter_async_context(
            get_session().create_client(
                "s3",
                endpoint_url=settings.endpoint_url or None,
                region_name=settings.region,
                aws_access_key_id=settings.access_key_id or None,
                aws_secret_access_key=settings.secret_access_key.get_secret_value() or None,
                config=config,
            )
        )

    async def close(self) -> None:
        """Close all connections."""
        self._client = None
        await self._stack.aclose()

    @property
    def client(self) -> Any:
        """The open client; :class:`FailedPrecondition` outside of the store's ``async with``."""
        if self._client is None:
            raise FailedPrecondition("the object store client is not open: use it inside 'async with'")
        return self._client

    async def call(self, what: str, key: str, call: Callable[[], Awaitable[_T]]) -> _T:
        """Await ``call()``, again while the failure may pass; failures come out as errors of ``mint_core.errors``.

        ``what`` says in words what is tried (``put``, ``get``).
        """
        settings = self.settings
        num_attempts_left = settings.max_attempts
        pause_s = settings.backoff_s
        while True:
            failure: MintError
            try:
                return await call()
            except Unavailable as error:
                failure = error
            except STORE_FAILURES as error:
                failure = translate(
                    error,
                    what=what,
                    key=key,
                    endpoint=settings.endpoint_url,
                    bucket=settings.bucket,
                    access_key_id=settings.access_key_id,
                )
                failure.__cause__ = error
            num_attempts_left -= 1
            if not isinstance(failure, Unavailable) or num_attempts_left == 0:
                raise failure
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MAX_BACKOFF_S)

    async def all_in_slots(self, works: Iterable[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Run the ``works`` of one transfer, as many at one time as it gets slots; the first error cancels the
        others.
        """
        transfer = object()

        async def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
            async with self.slots.slot(transfer):
                await work()

        with first_error():
            async with asyncio.TaskGroup() as group:
                for work in works:
                    group.create_task(run(work))

    @contextlib.asynccontextmanager
    async def limit(self, timeout_s: float, what: str, key: str) -> AsyncIterator[None]:
        """Give the block ``timeout_s`` seconds, then :class:`Unavailable`."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise Unavailable(
                f"the object store at {self.settings.endpoint_url or 'AWS S3'} did not {what} {key} "
                f"within {timeout_s} s",
                metadata={"key": key},
            ) from error


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Let the first error out of a task group, bare: callers of the store know single errors only."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
