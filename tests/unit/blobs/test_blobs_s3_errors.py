from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from mint_blobs._s3_errors import translate
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


def _told(error: Exception) -> MintError:
    return translate(error, what="put", key="a/b", endpoint="http://s3", bucket="mint", access_key_id="AK")


def _answer(status: int, code: str) -> ClientError:
    response: Any = {
        "Error": {"Code": code, "Message": f"said {code}"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(response, "PutObject")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "SignatureDoesNotMatch", Unauthenticated),
        (403, "InvalidAccessKeyId", Unauthenticated),
        (400, "ExpiredToken", Unauthenticated),
        (403, "RequestTimeTooSkewed", Unauthenticated),
        (403, "AccessDenied", PermissionDenied),
        (403, "403", PermissionDenied),
        (404, "NoSuchBucket", FailedPrecondition),
        (404, "NoSuchKey", NotFound),
        (404, "404", NotFound),
        (400, "BadDigest", DigestMismatch),
        (400, "XAmzContentChecksumMismatch", DigestMismatch),
        (400, "EntityTooLarge", ResourceExhausted),
        (500, "InternalError", Unavailable),
        (503, "SlowDown", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (400, "RequestTimeout", Unavailable),
        (412, "PreconditionFailed", Aborted),
        (409, "ConditionalRequestConflict", Aborted),
        (400, "MalformedXML", Internal),
    ],
)
def test_answers(status: int, code: str, expected: type[MintError]) -> None:
    told = _told(_answer(status, code))
    assert type(told) is expected
    assert told.metadata["store_code"] == code
    assert "http://s3" in str(told) or "a/b" in str(told)


def test_network() -> None:
    told = _told(EndpointConnectionError(endpoint_url="http://s3"))
    assert type(told) is Unavailable
    assert told.retry_after_s == 1.0
    assert type(_told(TimeoutError())) is Unavailable
    assert type(_told(ConnectionResetError())) is Unavailable


def test_no_credentials() -> None:
    assert type(_told(NoCredentialsError())) is Unauthenticated
