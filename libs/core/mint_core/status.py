"""The one table between MinT's errors and gRPC statuses, used in both directions.

Every status carries a ``google.rpc.ErrorInfo`` with domain ``mint`` and the error's reason, plus
``BadRequest`` for a bad field and ``RetryInfo`` where the error says when to come back.
"""

from __future__ import annotations

import math

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from mint_core import errors

__all__ = ["DOMAIN", "error_from_status", "from_rpc_error", "status_code", "to_status"]

DOMAIN = "mint"
"""``ErrorInfo.domain`` of every error MinT raises on purpose."""

_CODES: dict[type[errors.MintError], int] = {
    errors.InvalidArgument: code_pb2.INVALID_ARGUMENT,
    errors.Unauthenticated: code_pb2.UNAUTHENTICATED,
    errors.PermissionDenied: code_pb2.PERMISSION_DENIED,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.Aborted: code_pb2.ABORTED,
    errors.FailedPrecondition: code_pb2.FAILED_PRECONDITION,
    errors.OutOfRange: code_pb2.OUT_OF_RANGE,
    errors.ResourceExhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
    errors.Cancelled: code_pb2.CANCELLED,
    errors.Unimplemented: code_pb2.UNIMPLEMENTED,
    errors.DataLoss: code_pb2.DATA_LOSS,
    errors.Internal: code_pb2.INTERNAL,
}
_BY_CODE = {code: cls for cls, code in _CODES.items()}


def _tree(cls: type[errors.MintError]) -> list[type[errors.MintError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _tree(child))]


_BY_REASON = {cls.reason: cls for cls in _tree(errors.MintError) if cls is not errors.MintError}
_GRPC_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def status_code(error: errors.MintError) -> int:
    """The ``google.rpc.Code`` of an error, by the nearest class in the table."""
    for cls in type(error).__mro__:
        if cls in _CODES:
            return _CODES[cls]
    return int(code_pb2.INTERNAL)


def to_status(error: errors.MintError) -> status_pb2.Status:
    """Encode an error with its details."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    extra: list[object] = []
    if isinstance(error, errors.InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        extra.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        fraction, seconds = math.modf(error.retry_after_s)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(fraction * 1e9))
        extra.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=status_code(error), message=error.message)
    for detail in [*details, *extra]:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_from_status(status: status_pb2.Status) -> errors.MintError:
    """Decode a status; one that is not ours becomes the error of its code."""
    cls = _BY_CODE.get(status.code, errors.Internal)
    field, retry_after_s, metadata = "", None, {}
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN:
                cls = _BY_REASON.get(info.reason, cls)
                metadata = dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            field = bad.field_violations[0].field if bad.field_violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    error = cls(status.message, metadata=metadata, retry_after_s=retry_after_s)
    if isinstance(error, errors.InvalidArgument):
        error.field = field
    return error


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.MintError:
    """Decode what a stub raised, with the details the server sent if there are any."""
    status = rpc_status.from_call(error)
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or error.code().name)
    return error_from_status(status)


def grpc_status(error: errors.MintError) -> grpc.Status:
    """The form ``context.abort_with_status`` takes."""
    return rpc_status.to_status(to_status(error))
