"""What an S3 server or the way to it can answer, told in MinT's errors."""

from __future__ import annotations

from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from mint_core.errors import (
    Aborted,
    DigestMismatch,
    FailedPrecondition,
    Internal,
    MintError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

__all__ = ["STORE_FAILURES", "error_code", "translate"]

STORE_FAILURES = (ClientError, BotoCoreError, aiohttp.ClientError, OSError, TimeoutError)
"""Everything a request may raise because of the store or the network; anything else is a bug of ours."""

_BAD_IDENTITY = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
_BUSY = frozenset(
    {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown", "ThrottlingException"}
)


def error_code(error: BaseException) -> str:
    """The store's code (``NoSuchKey``, ``PreconditionFailed``, or the bare HTTP status of a HEAD); empty for others."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def translate(error: Exception, *, what: str, key: str, endpoint: str, bucket: str, access_key_id: str) -> MintError:
    """The MinT error for one of :data:`STORE_FAILURES`; only :class:`Unavailable` is worth another attempt.

    ``what`` says in words what was tried (``put``, ``get``).
    """
    place = f"{endpoint or 'AWS S3'}, bucket {bucket}"
    metadata = {"key": key, "bucket": bucket, "endpoint": endpoint}
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Unauthenticated(
            f"no credentials for the object store at {place}: set access_key_id and secret_access_key",
            metadata=metadata,
        )
    if not isinstance(error, ClientError):
        return Unavailable(f"the object store at {place} cannot be reached to {what} {key}: {error}", metadata=metadata)
    return _from_answer(error, what=what, key=key, place=place, access_key_id=access_key_id, metadata=metadata)


def _from_answer(
    error: ClientError, *, what: str, key: str, place: str, access_key_id: str, metadata: dict[str, str]
) -> MintError:
    response: dict[str, Any] = dict(error.response)
    code = error_code(error)
    said = str(response.get("Error", {}).get("Message", "")) or code
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    metadata["store_code"] = code
    if code in _BAD_IDENTITY:
        return Unauthenticated(
            f"the object store at {place} refuses access key {access_key_id!r}: {said} "
            "Check access_key_id, secret_access_key and the clock.",
            metadata=metadata,
        )
    if status in (401, 403):
        return PermissionDenied(
            f"the object store at {place} does not let access key {access_key_id!r} {what} {key}: {said}. "
            "Check the secret and the key's rights.",
            metadata=metadata,
        )
    if code == "NoSuchBucket":
        return FailedPrecondition(
            f"bucket {metadata['bucket']} does not exist at {place}: create it first", metadata=metadata
        )
    if status == 404:
        return NotFound(f"the object store holds no object {key}", metadata=metadata)
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest"):
        return DigestMismatch(
            f"the object store at {place} received other bytes for {key} than were announced: {said}",
            field="digest",
            metadata=metadata,
        )
    if code in ("QuotaExceeded", "EntityTooLarge", "XMinioStorageFull"):
        return ResourceExhausted(f"the object store at {place} cannot take {key}: {said}", metadata=metadata)
    if code in _BUSY or status >= 500 or status == 429:
        return Unavailable(f"the object store at {place} cannot {what} {key} now: {said}", metadata=metadata)
    if status in (409, 412):
        return Aborted(f"the object store at {place} saw another writer of {key}: {said}", metadata=metadata)
    return Internal(f"the object store at {place} answered {status} {code} to {what} {key}: {said}", metadata=metadata)
